"""The pool branch: 3x3 max pooling on load, 1x1 projection, bias, ReLU, stored into its slice of
the concatenation."""

import triton
import triton.language as tl

from fused_inception.kernels.tiles import finish_tile, tap_validity


@triton.jit
def pool_project_tile(
    # tensors
    x_ptr,  # [P, C_IN]
    w_ptr,  # [C_OUT, C_IN] packed projection
    b_ptr,  # [C_OUT] fp32
    y_ptr,  # [P, Y_STRIDE] first channel of the slice
    index_ptr,  # [P, C_IN] uint8, winning tap of each window
    mask_ptr,  # [P, MASK_STRIDE] first byte of the slice's ReLU bits
    # sizes
    pid_p,
    pid_co,
    n_pixels,
    height,
    width,
    # strides
    x_stride,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    moments_ptr=None,  # [tiles of pixels, 3, C_OUT] fp32
):
    """y[p, o] = relu(sum_i max_tap x[p + tap, i] * w[o, i] + b[o]); with SAVE also index and bits
    of one tile; with moments the sum alone, and its moments in place of bits.

    torch's rule: the first maximum in row-major order wins, the last NaN wins, padding takes no
    part.
    """
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_co = pid_co * BLOCK_CO + tl.arange(0, BLOCK_CO)
    offs_ci = tl.arange(0, BLOCK_CI)
    valid = tap_validity(offs_p, n_pixels, height, width, 3)
    mask_p = offs_p < n_pixels
    mask_co = offs_co < C_OUT
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    local_p = tl.arange(0, BLOCK_P)
    x_tile_ptr = x_ptr + p0 * x_stride
    x_offs = (local_p * x_stride)[:, None] + offs_ci[None, :]
    w_offs = offs_co[None, :] * C_IN + offs_ci[:, None]

    # a window of -inf alone has a winner too: its first tap inside the map
    first_row = tl.where(offs_p // width % height > 0, 0, 1)
    first_tap = first_row * 3 + tl.where(offs_p % width > 0, 0, 1)
    # Triton gives these bytes and x one layout, by the widest vector of either: with 16 channels a
    # thread x would be two vectors of 16 bits, and each request would reach into twice the sectors
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    # one stage: more of them would pipeline nine loads each
    for ci0 in tl.range(0, C_IN, BLOCK_CI, num_stages=1):
        mask_ci = offs_ci < C_IN - ci0
        # comparisons need fp32; a maximum alone stays in pairs of 16 bits
        best_type: tl.constexpr = tl.float32 if SAVE else x_ptr.dtype.element_ty
        best = tl.full((BLOCK_P, BLOCK_CI), float("-inf"), best_type)
        winner = tl.broadcast_to(first_tap[:, None], (BLOCK_P, BLOCK_CI))
        for tap in tl.static_range(9):
            inside = (((valid >> tap) & 1) != 0)[:, None] & mask_ci[None, :]
            shift = ((tap // 3 - 1) * width + (tap % 3 - 1)) * x_stride + ci0
            v = tl.load(x_tile_ptr + shift + x_offs, mask=inside, other=float("-inf"))
            if SAVE:
                # a tap outside reads -inf, which is no more than any maximum before it
                v = v.to(tl.float32)
                take = (v > best) | (v != v)
                best = tl.where(take, v, best)
                winner = tl.where(take, tap, winner)
            else:
                best = tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)
        inside = mask_p[:, None] & mask_ci[None, :]
        if SAVE:
            if pid_co == 0:
                index_tile_ptr = index_ptr + p0 * C_IN + ci0
                index_offs = (local_p * C_IN)[:, None] + offs_ci[None, :]
                index_offs = tl.max_contiguous(index_offs, [1, VECTOR])
                tl.store(index_tile_ptr + index_offs, winner.to(tl.uint8), mask=inside)
        pooled = tl.where(inside, best, 0.0).to(x_ptr.dtype.element_ty)
        w_mask = mask_ci[:, None] & mask_co[None, :]
        w_tile = tl.load(w_ptr + ci0 + w_offs, mask=w_mask, other=0.0)
        acc = tl.dot(pooled, w_tile, acc, input_precision=PRECISION)

    finish_tile(
        acc, b_ptr, y_ptr, mask_ptr, moments_ptr, pid_p, pid_co * BLOCK_CO, n_pixels,
        C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
    )  # fmt: skip

"""The tiles of launch L2: the gradient of x, one GEMM over the concatenated 1x1 filters behind the
gather of the pool gradient; where x is the output of another module, masked by its ReLU, so that
module needs no launch M."""

import triton
import triton.language as tl

from fused_inception.kernels.tiles import load_bits, tap_validity


@triton.jit
def _accumulate(
    acc,
    g_ptr,  # [P, G_STRIDE] at the first pixel of the tile
    w_ptr,  # [C_IN, W_STRIDE] first of the C_OUT columns
    mask_p,
    pid_ci,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    G_STRIDE: tl.constexpr,
    W_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """acc[p, i] += sum_o g[p, o] * w[i, o]."""
    offs_ci = pid_ci * BLOCK_CI + tl.arange(0, BLOCK_CI)
    offs_co = tl.arange(0, BLOCK_CO)
    g_offs = (tl.arange(0, BLOCK_P) * G_STRIDE)[:, None] + offs_co[None, :]
    w_offs = offs_ci[None, :] * W_STRIDE + offs_co[:, None]
    for co0 in tl.range(0, C_OUT, BLOCK_CO, num_stages=NUM_STAGES):
        g_mask = mask_p[:, None]
        w_mask = (offs_ci < C_IN)[None, :]
        if C_OUT % BLOCK_CO != 0:
            mask_co = offs_co < C_OUT - co0
            g_mask = g_mask & mask_co[None, :]
            w_mask = w_mask & mask_co[:, None]
        g_tile = tl.load(g_ptr + co0 + g_offs, mask=g_mask, other=0.0)
        w_tile = tl.load(w_ptr + co0 + w_offs, mask=w_mask, other=0.0)
        acc = tl.dot(g_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def gather_pool(
    dp_ptr,  # [P, dp_stride] gradient of the pooled map, at the first pixel of the tile
    index_ptr,  # [P, S_IN] uint8, winning tap of each window, likewise
    valid,  # [BLOCK_P] bits of the taps inside the map
    pid_ci,
    width,
    dp_stride,
    S_IN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
):
    """Sum of dp over the 3x3 windows of stride 1 that p won, fp32."""
    local_p = tl.arange(0, BLOCK_P)
    offs_ci = pid_ci * BLOCK_CI + tl.arange(0, BLOCK_CI)
    index_offs = (local_p * S_IN)[:, None] + offs_ci[None, :]
    dp_offs = (local_p * dp_stride)[:, None] + offs_ci[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
    # the window centred one tap away contains this pixel at the opposite tap
    for tap in tl.range(0, 9, num_stages=1):
        shift = (tap // 3 - 1) * width + (tap % 3 - 1)
        inside = (((valid >> tap) & 1) != 0)[:, None] & (offs_ci < S_IN)[None, :]
        winner = tl.load(index_ptr + shift * S_IN + index_offs, mask=inside, other=255)
        dp_tile = tl.load(dp_ptr + shift * dp_stride + dp_offs, mask=inside, other=0.0)
        acc += tl.where(winner.to(tl.int32) == 8 - tap, dp_tile.to(tl.float32), 0.0)
    return acc


@triton.jit
def input_grad_tile(
    # tensors
    dz_ptr,  # [P, DZ_STRIDE] masked gradient, 1x1 branch first
    dr_ptr,  # [P, SR] gradients of both reduced maps
    dp_ptr,  # [P, S_IN] gradient of the pooled map
    index_ptr,  # [P, S_IN] uint8, winning tap of each window
    w_ptr,  # [S_IN, S1 + SR] packed for the data gradients
    # of the module whose output x is, else None; C_IN is a multiple of 8 then
    mask_ptr,  # [P, C_IN / 8] uint8, its ReLU bits
    other_ptr,  # [P, C_IN] what others than this module add to the gradient of x, or None
    dx_ptr,  # [P, C_IN]
    partial_ptr,  # [tiles of pixels, C_IN] fp32, with a mask
    # sizes
    pid,
    n_pixels,
    height,
    width,
    # problem
    C_IN: tl.constexpr,
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    SR: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx[p, i] = sum over windows that p won of dp + sum_o [dz1 | dr][p, o] * w[i, o].

    With a mask dx[p, i] + other[p, i] where the bit is set, else 0, and its sums over the tile.
    """
    TILES_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    pid_p = pid // TILES_CI
    pid_ci = pid % TILES_CI
    local_p = tl.arange(0, BLOCK_P)
    offs_p = pid_p * BLOCK_P + local_p
    offs_ci = pid_ci * BLOCK_CI + tl.arange(0, BLOCK_CI)
    mask_p = offs_p < n_pixels
    p0 = (pid_p * BLOCK_P).to(tl.int64)

    acc = gather_pool(
        dp_ptr + p0 * S_IN, index_ptr + p0 * S_IN,
        tap_validity(offs_p, n_pixels, height, width, 3),
        pid_ci, width, S_IN, S_IN, BLOCK_P, BLOCK_CI,
    )  # fmt: skip
    acc = _accumulate(
        acc, dz_ptr + p0 * DZ_STRIDE, w_ptr, mask_p, pid_ci,
        S1, S_IN, DZ_STRIDE, S1 + SR, PRECISION, BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    acc = _accumulate(
        acc, dr_ptr + p0 * SR, w_ptr + S1, mask_p, pid_ci,
        SR, S_IN, SR, S1 + SR, PRECISION, BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    dx_mask = mask_p[:, None] & (offs_ci < C_IN)[None, :]
    dx_offs = (local_p * C_IN)[:, None] + offs_ci[None, :]
    if mask_ptr is None:
        tl.store(dx_ptr + p0 * C_IN + dx_offs, acc.to(dx_ptr.dtype.element_ty), mask=dx_mask)
    else:
        if other_ptr is not None:
            other_tile = tl.load(other_ptr + p0 * C_IN + dx_offs, mask=dx_mask, other=0.0)
            acc += other_tile.to(tl.float32)
        is_open = load_bits(mask_ptr + p0 * (C_IN // 8), local_p, offs_ci, dx_mask, C_IN)
        # select, never multiply: a closed gate stops NaN and infinity too
        dx_tile = tl.where(is_open, acc.to(dx_ptr.dtype.element_ty), 0.0)
        tl.store(dx_ptr + p0 * C_IN + dx_offs, dx_tile, mask=dx_mask)
        sums = tl.sum(dx_tile.to(tl.float32), axis=0)
        tl.store(partial_ptr + pid_p * C_IN + offs_ci, sums, mask=offs_ci < C_IN)

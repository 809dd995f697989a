"""Device functions that several kernels share: window validity, epilogues, packed ReLU masks."""

import triton
import triton.language as tl


@triton.jit
def tap_validity(offs_p, n_pixels, height, width, K: tl.constexpr):
    """Bit `tap` of element p says that this tap of a "same" K x K window around pixel p lies inside
    its map.

    Zero for pixels beyond the last one. K * K <= 25 bits.
    """
    if K == 1:
        return (offs_p < n_pixels).to(tl.int32)
    else:
        column = offs_p % width
        row = (offs_p // width) % height
        R: tl.constexpr = K // 2
        row_bits = tl.zeros_like(offs_p)
        column_bits = tl.zeros_like(offs_p)
        # one bit per tap of a filter row, and of a filter column
        ROW_ONES: tl.constexpr = (1 << K) - 1
        COLUMN_ONES: tl.constexpr = 0b1001001 if K == 3 else 0b100001000010000100001
        for i in tl.static_range(K):
            row_inside = (row + (i - R) >= 0) & (row + (i - R) < height)
            column_inside = (column + (i - R) >= 0) & (column + (i - R) < width)
            row_bits |= row_inside.to(tl.int32) * (ROW_ONES << (i * K))
            column_bits |= column_inside.to(tl.int32) * (COLUMN_ONES << i)
        return tl.where(offs_p < n_pixels, row_bits & column_bits, 0)


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN, as in torch."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_open(y):
    """Where ReLU lets the gradient through: not (y <= 0), so NaN is open, as in torch."""
    return (y.to(tl.float32) <= 0.0) == 0


@triton.jit
def pack_bits(bits, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_P, BLOCK_C] booleans to [BLOCK_P, BLOCK_C / 8] bytes, first channel in the lowest
    bit."""
    groups = tl.reshape(bits.to(tl.int32), (BLOCK_P, BLOCK_C // 8, 8))
    return tl.sum(groups << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def store_slice(
    y_tile,  # [BLOCK_P, BLOCK_CO] rounded outputs
    y_ptr,  # [P, Y_STRIDE] first channel of the slice
    mask_ptr,  # [P, MASK_STRIDE] first byte of the slice
    p0,  # int64, first pixel of the tile
    co0,
    n_pixels,
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Store one tile into its slice of the concatenation, with SAVE its ReLU bits too."""
    local_p = tl.arange(0, BLOCK_P)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    mask_p = p0 + local_p < n_pixels
    mask_y = mask_p[:, None] & (offs_co < C_OUT)[None, :]
    y_offs = (local_p * Y_STRIDE)[:, None] + offs_co[None, :]
    tl.store(y_ptr + p0 * Y_STRIDE + y_offs, y_tile, mask=mask_y)
    if SAVE:
        bits = pack_bits(is_open(y_tile) & (offs_co < C_OUT)[None, :], BLOCK_P, BLOCK_CO)
        offs_byte = co0 // 8 + tl.arange(0, BLOCK_CO // 8)
        mask_byte = mask_p[:, None] & (offs_byte < (C_OUT + 7) // 8)[None, :]
        byte_offs = (local_p * MASK_STRIDE)[:, None] + offs_byte[None, :]
        tl.store(mask_ptr + p0 * MASK_STRIDE + byte_offs, bits, mask=mask_byte)

"""Device functions that several kernels share: window validity, epilogues, packed ReLU masks."""

import triton
import triton.language as tl


@triton.jit
def window_bits(row, column, height, width, K: tl.constexpr):
    """Bit `tap` says that this tap of a "same" K x K window around (row, column) is inside the map.

    K * K <= 25 bits. Rows and columns inside are ranges, so both bit sets are differences of
    powers.
    """
    R: tl.constexpr = K // 2
    first_row = tl.maximum(R - row, 0)
    end_row = tl.minimum(height - row + R, K)
    row_bits = (1 << (end_row * K)) - (1 << (first_row * K))
    first_column = tl.maximum(R - column, 0)
    end_column = tl.minimum(width - column + R, K)
    one_row = (1 << end_column) - (1 << first_column)
    # the same columns in every row of the window
    EVERY_ROW: tl.constexpr = 0b1001001 if K == 3 else 0b100001000010000100001
    return row_bits & (one_row * EVERY_ROW)


@triton.jit
def tap_validity(offs_p, n_pixels, height, width, K: tl.constexpr):
    """`window_bits` of pixels counted through all images; 0 for pixels beyond the last one."""
    if K == 1:
        return (offs_p < n_pixels).to(tl.int32)
    else:
        bits = window_bits(offs_p // width % height, offs_p % width, height, width, K)
        return tl.where(offs_p < n_pixels, bits, 0)


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
        bits = pack_bits(is_open(y_tile), BLOCK_P, BLOCK_CO)
        offs_byte = co0 // 8 + tl.arange(0, BLOCK_CO // 8)
        mask_byte = mask_p[:, None] & (offs_byte < (C_OUT + 7) // 8)[None, :]
        byte_offs = (local_p * MASK_STRIDE)[:, None] + offs_byte[None, :]
        tl.store(mask_ptr + p0 * MASK_STRIDE + byte_offs, bits, mask=mask_byte)

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
def load_bits(
    mask_ptr,  # [P, C / 8] at the first pixel of the tile
    local_p,
    offs_c,
    inside,
    C: tl.constexpr,
):
    """[pixels, channels] booleans of a packed ReLU mask; closed where not `inside`."""
    byte_offs = (local_p * (C // 8))[:, None] + (offs_c // 8)[None, :]
    byte = tl.load(mask_ptr + byte_offs, mask=inside, other=0).to(tl.int32)
    return ((byte >> (offs_c % 8)[None, :]) & 1) != 0


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


@triton.jit
def finish_tile(
    acc,  # [BLOCK_P, BLOCK_CO] fp32 sums of a convolution
    b_ptr,  # [C_OUT]
    y_ptr,  # [P, Y_STRIDE] first channel of the slice
    mask_ptr,  # [P, MASK_STRIDE] first byte of the slice
    moments_ptr,  # [tiles of pixels, 3, C_OUT] fp32, or None
    pid_p,
    co0,
    n_pixels,
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """Store relu(acc + b), with SAVE its bits too; or, ahead of a BatchNorm, acc and its moments
    over the tile."""
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    if moments_ptr is None:
        offs_co = co0 + tl.arange(0, BLOCK_CO)
        bias = tl.load(b_ptr + offs_co, mask=offs_co < C_OUT, other=0.0).to(tl.float32)
        y_tile = relu(acc + bias[None, :]).to(y_ptr.dtype.element_ty)
        store_slice(
            y_tile, y_ptr, mask_ptr, p0, co0, n_pixels,
            C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
        )  # fmt: skip
    else:
        z_tile = acc.to(y_ptr.dtype.element_ty)
        store_slice(
            z_tile, y_ptr, y_ptr, p0, co0, n_pixels,
            C_OUT, Y_STRIDE, MASK_STRIDE, False, BLOCK_P, BLOCK_CO,
        )  # fmt: skip
        store_moments(z_tile, moments_ptr, pid_p, co0, n_pixels, C_OUT, BLOCK_P, BLOCK_CO)


@triton.jit
def store_moments(
    z_tile,  # [BLOCK_P, BLOCK_C] rounded results
    moments_ptr,  # [tiles of pixels, 3, C] fp32
    pid_p,
    c0,
    n_pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Moments of each channel over the pixels of one tile: the mean rounded to fp32, what the
    rounding left of it, and the sum of squared deviations from both together.

    A mean of 1000 is rounded by 3e-5: where tiles are merged, their means are told apart by less.
    """
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    mask_p = (offs_p < n_pixels)[:, None]
    mask_c = offs_c < C
    count = tl.minimum(n_pixels - pid_p * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(tl.where(mask_p, z_tile.to(tl.float32), 0.0), axis=0) / count
    deviation = tl.where(mask_p, z_tile.to(tl.float32) - mean[None, :], 0.0)
    rest = tl.sum(deviation, axis=0) / count
    deviation = tl.where(mask_p, deviation - rest[None, :], 0.0)
    row_ptr = moments_ptr + pid_p * (3 * C) + offs_c
    tl.store(row_ptr, mean, mask=mask_c)
    tl.store(row_ptr + C, rest, mask=mask_c)
    tl.store(row_ptr + 2 * C, tl.sum(deviation * deviation, axis=0), mask=mask_c)


@triton.jit
def load_norm(norm_ptr, row: tl.constexpr, offs_c, mask_c, NORM_STRIDE: tl.constexpr):
    """Row 0 to 3 of BatchNorm's coefficients [4, NORM_STRIDE]: mean, inverse deviation, scale
    (gamma times inverse deviation), beta; 0 outside of the mask."""
    return tl.load(norm_ptr + row * NORM_STRIDE + offs_c, mask=mask_c, other=0.0)


@triton.jit
def load_norms(norm_ptr, offs_c, mask_c, NORM_STRIDE: tl.constexpr):
    """All four rows."""
    return (
        load_norm(norm_ptr, 0, offs_c, mask_c, NORM_STRIDE),
        load_norm(norm_ptr, 1, offs_c, mask_c, NORM_STRIDE),
        load_norm(norm_ptr, 2, offs_c, mask_c, NORM_STRIDE),
        load_norm(norm_ptr, 3, offs_c, mask_c, NORM_STRIDE),
    )


@triton.jit
def batch_norm(z_tile, mean, scale, beta):
    """(z - mean) * scale + beta in fp32, rounded to the dtype of z as PyTorch's result is.

    The mean is subtracted first: a large one would cancel in z * scale + shift.
    """
    y = (z_tile.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :]
    return y.to(z_tile.dtype)


@triton.jit
def channel_of(
    slot,
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """(channel of the concatenation, whether there is one) of channels of a scratch tensor."""
    C_OUT: tl.constexpr = N1 + N3 + N5 + NP
    if C_OUT == SLOTS:
        channel = slot
        is_channel = slot < SLOTS
    else:
        branch3 = (slot >= SLOT_3) & (slot < SLOT_5)
        branch5 = (slot >= SLOT_5) & (slot < SLOT_P)
        pool = slot >= SLOT_P
        channel = slot - tl.where(branch3, SLOT_3 - N1, 0)
        channel -= tl.where(branch5, SLOT_5 - N1 - N3, 0)
        channel -= tl.where(pool, SLOT_P - N1 - N3 - N5, 0)
        end = tl.where(branch3, N1 + N3, N1)
        end = tl.where(branch5, N1 + N3 + N5, end)
        end = tl.where(pool, C_OUT, end)
        is_channel = channel < end
    return channel, is_channel

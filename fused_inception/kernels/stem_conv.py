"""conv1 of the network: 7x7, stride 2, padding 3, of images of at most 3 channels, packed so that
all loads are of 16 bytes. What is launched here is the forward; `stem` packs and `stem_wgrad` takes
the gradients, for the whole stem and for conv1 alone.

The packed image [N, H_out + 3, W_out + 3, 16] has a pixel for 2 x 2 of the image's: element dx * 8
+ dy * 3 + c of pixel (u, v) is channel c at row 2u + dy - 4, column 2v + dx - 4, and 0 outside the
image. Element ONE is 1, whose filter gradient is that of the bias; the rest is 0.

Output pixel (i, j) reads 4 x 4 of these from (i, j) on: four rows of 64 elements that follow each
other in memory. Filters are packed alike, [C_OUT, 4 x 64].

So it reads 8 x 8 of the image, a row and a column more than the filter has. Filters are 0 there;
but 0 times infinity or NaN is NaN, so the forward leaves out the column, which is the first 16
bytes of every row, and clears the row.
"""

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import finish_tile
from fused_inception.tuning.configs import StemConvConfig

CHANNELS = 16  # of a packed pixel
BORDER = 3  # packed pixels beyond the output's, each way
DEPTH = 256  # elements of a packed filter: 4 rows of 4 pixels
ONE = 6  # the element that is 1; of the first pixel it is this row of the filter gradient


def packed_image_shape(n: int, out_height: int, out_width: int) -> tuple[int, int, int, int]:
    """[N, rows, columns, elements] of the packed image behind which conv1 has so many pixels."""
    return n, out_height + BORDER, out_width + BORDER, CHANNELS


@triton.jit
def packed_pixel(p, height, width):
    """The packed pixel at which the window of output pixel p begins, counted through all images."""
    row = p // width
    return p + 3 * row + 3 * (width + 3) * (row // height)


@triton.jit
def pack_image(
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype
    packed_ptr,  # [N, ROWS, COLUMNS, 16]
    pid,
    n_packed,
    rows,
    columns,
    height,
    width,
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    C_IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of the packed image."""
    PIXELS: tl.constexpr = BLOCK // 16
    local_p = tl.arange(0, PIXELS)
    offs_p = pid * PIXELS + local_p
    element = tl.arange(0, 16)
    dy = element % 8 // 3
    channel = element % 8 % 3
    row = (offs_p // columns % rows * 2 - 4)[:, None] + dy[None, :]
    column = (offs_p % columns * 2 - 4)[:, None] + (element // 8)[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask_p = (offs_p < n_packed)[:, None]
    mask = mask_p & inside & ((dy < 2) & (channel < C_IN))[None, :]
    image_offs = (offs_p // (rows * columns)).to(tl.int64) * x_image_stride
    offs = row * x_row_stride + column * x_column_stride + (channel * x_channel_stride)[None, :]
    value = tl.load(x_ptr + (image_offs[:, None] + offs), mask=mask, other=0.0)
    value = tl.where((element == 6)[None, :], 1.0, value.to(tl.float32))
    packed_offs = (local_p * 16)[:, None] + element[None, :]
    packed_tile_ptr = packed_ptr + tl.cast(pid * PIXELS, tl.int64) * 16
    tl.store(packed_tile_ptr + packed_offs, value.to(packed_ptr.dtype.element_ty), mask=mask_p)


@triton.jit
def pack_image_filter(
    w_ptr,  # [C_OUT, C_IN, 7, 7]
    packed_ptr,  # [C_OUT, 256]
    pid,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of the packed filters."""
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    k = offs % 256
    dy = k % 8 // 3
    channel = k % 8 % 3
    row = k // 64 * 2 + dy - 1
    column = k % 64 // 8 - 1
    mask = offs < C_OUT * 256
    live = mask & (dy < 2) & (channel < C_IN) & (row >= 0) & (column >= 0)
    source = ((offs // 256 * C_IN + channel) * 7 + row) * 7 + column
    value = tl.load(w_ptr + source, mask=live, other=0.0)
    tl.store(packed_ptr + offs, value.to(packed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_pixels", "height", "width"])
def _stem_conv_fwd_kernel(
    # tensors
    x_ptr,  # [N, H + 3, W + 3, 16] packed image
    w_ptr,  # [C_OUT, 256] packed filters
    b_ptr,  # [C_OUT]
    y_ptr,  # [P, Y_STRIDE]
    mask_ptr,  # [P, MASK_STRIDE]
    moments_ptr,  # [tiles of pixels, 3, Y_STRIDE] fp32 ahead of a BatchNorm, else None
    # sizes
    n_pixels,
    height,  # of the output
    width,
    # problem
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """y[p, o] = relu(sum over k of window(p)[k] * w[o, k] + b[o]); with moments the sum alone, and
    its moments. One program per tile of y."""
    TILES_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    STEPS: tl.constexpr = 64 // BLOCK_K  # of one row of a window
    pid_p = tl.program_id(0) // TILES_CO
    co0 = tl.program_id(0) % TILES_CO * BLOCK_CO
    p0 = pid_p * BLOCK_P
    # behind the last pixel the last one again, which is not stored: no load needs a mask for it
    offs_p = tl.minimum(p0 + tl.arange(0, BLOCK_P), n_pixels - 1)
    offs_k = tl.arange(0, BLOCK_K)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    begin = packed_pixel(p0, height, width)
    x_offs = ((packed_pixel(offs_p, height, width) - begin) * 16)[:, None] + offs_k[None, :]
    w_offs = offs_co[None, :] * 256 + offs_k[:, None]
    x_ptr += tl.cast(begin, tl.int64) * 16
    x_row_stride = (width + 3) * 16
    mask_co = (offs_co < C_OUT)[None, :]
    # the first row is cleared in registers, so it is loaded early and multiplied last
    column = (offs_k >= 8)[None, :]
    first_tile = tl.load(x_ptr + x_offs, mask=column, other=0.0)
    w_tile = tl.load(w_ptr + w_offs, mask=mask_co, other=0.0)
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    for step in tl.range(STEPS, 4 * STEPS, num_stages=NUM_STAGES):
        row = step // STEPS
        k0 = (step - row * STEPS) * BLOCK_K
        x_tile = tl.load(
            x_ptr + row * x_row_stride + k0 + x_offs, mask=(k0 + offs_k >= 8)[None, :], other=0.0
        )
        w_step = tl.load(w_ptr + step * BLOCK_K + w_offs, mask=mask_co, other=0.0)
        acc = tl.dot(x_tile, w_step, acc, input_precision=PRECISION)
    second = (offs_k % 8 >= 3)[None, :]  # of the two rows of the image
    for step in tl.static_range(STEPS):
        if step > 0:
            first_tile = tl.load(x_ptr + step * BLOCK_K + x_offs)
            w_tile = tl.load(w_ptr + step * BLOCK_K + w_offs, mask=mask_co, other=0.0)
        first_tile = tl.where(second, first_tile, 0.0)
        acc = tl.dot(first_tile, w_tile, acc, input_precision=PRECISION)
    finish_tile(
        acc, b_ptr, y_ptr, mask_ptr, moments_ptr, pid_p, co0, n_pixels,
        Y_STRIDE, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
    )  # fmt: skip


def launch_stem_conv_fwd(
    packed: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    config: StemConvConfig,
    *,
    precision: str,
    save: bool = False,
    moments: torch.Tensor | None = None,
) -> None:
    """Fill `y`, mask and moments as `image_conv.launch_image_conv_fwd` does.

    packed, weight: image and filter, packed.
    """
    n, slots, height, width = y.shape
    c_out, n_pixels, tile = weight.shape[0], n * height * width, config.forward
    run(
        _stem_conv_fwd_kernel,
        (cdiv(n_pixels, tile.block_m) * cdiv(c_out, tile.block_n),),
        (packed, weight, bias, y, mask, moments, n_pixels, height, width),
        dict(
            C_OUT=c_out,
            Y_STRIDE=slots,
            MASK_STRIDE=cdiv(c_out, 8),
            SAVE=save,
            PRECISION=precision,
            BLOCK_P=tile.block_m,
            BLOCK_CO=tile.block_n,
            BLOCK_K=tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )


def windows_until_last(n_pixels: int, height: int, width: int) -> int:
    """Packed pixels up to the last one at which the window of an output pixel begins."""
    images = n_pixels // (height * width)
    _, rows, columns, _ = packed_image_shape(images, height, width)
    return images * rows * columns - BORDER * (columns + 1) if images else 0


@triton.jit
def output_pixel(at, height, width):
    """The output pixel whose window begins at a packed one, counted through all images; of those
    behind the end of a row, or below the last, one that is to be masked."""
    row = at // (width + 3)
    image = row // (height + 3)
    return at - 3 * row - 3 * width * image


@triton.jit
def packed_wgrad_tile(
    # tensors
    x_ptr,  # [N, H + 3, W + 3, 16] packed image
    dz_ptr,  # [P, C_OUT]
    out_ptr,  # [splits, 256, C_OUT] fp32
    # sizes
    pid,
    chunk,
    n_windows,
    height,  # of the output
    width,
    # problem
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[split, k, o] = sum over the split's windows of window[k] * dz[its output pixel, o]; row
    ONE is the gradient of the bias.

    A window begins at every packed pixel: they follow each other in memory without coordinates. To
    those of no output pixel, a twentieth, belongs a gradient of 0.
    """
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (256 + BLOCK_M - 1) // BLOCK_M * TILES_N
    split = pid // TILES
    offs_m = pid % TILES // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    mask_n = (offs_n < C_OUT)[None, :]
    first = split * chunk
    last = tl.minimum(first + chunk, n_windows)
    rows = height + 3
    columns = width + 3
    x_offs = (offs_p * 16)[:, None] + (offs_m // 64 * (columns * 16) + offs_m % 64)[None, :]
    begin = output_pixel(first, height, width)
    dz_ptr += tl.cast(begin, tl.int64) * C_OUT
    # carried from step to step, as divisions cost more than the rest
    pixel = output_pixel(first + offs_p, height, width) - begin
    row = (first + offs_p) // columns % rows
    column = (first + offs_p) % columns
    step_pixels = output_pixel(BLOCK_P, height, width)
    step_rows = BLOCK_P // columns % rows
    step_columns = BLOCK_P % columns
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=NUM_STAGES):
        mask_p = start + offs_p < last
        x_mask = mask_p[:, None]
        if 256 % BLOCK_M != 0:
            x_mask = x_mask & (offs_m < 256)[None, :]
        x_tile_ptr = x_ptr + tl.cast(start, tl.int64) * 16
        x_tile = tl.load(x_tile_ptr + x_offs, mask=x_mask, other=0.0)
        dz_mask = (mask_p & (row < height) & (column < width))[:, None] & mask_n
        dz_offs = (pixel * C_OUT)[:, None] + offs_n[None, :]
        dz_tile = tl.load(dz_ptr + dz_offs, mask=dz_mask, other=0.0)
        acc = tl.dot(tl.trans(x_tile), dz_tile, acc, input_precision=PRECISION)
        column += step_columns
        next_row = column >= columns
        column -= tl.where(next_row, columns, 0)
        row += step_rows + next_row.to(tl.int32)
        next_image = row >= rows
        row -= tl.where(next_image, rows, 0)
        pixel += step_pixels - tl.where(next_row, 3, 0) - tl.where(next_image, 3 * width, 0)
    out_offs = (offs_m * C_OUT)[:, None] + offs_n[None, :]
    out_tile_ptr = out_ptr + split.to(tl.int64) * (256 * C_OUT)
    tl.store(out_tile_ptr + out_offs, acc, mask=(offs_m < 256)[:, None] & mask_n)


@triton.jit
def finish_image_filter(
    partial_ptr,  # [splits, 256, SLOTS] fp32
    dw_ptr,  # [C_OUT, C_IN, 7, 7]
    pid,
    splits,
    C_OUT: tl.constexpr,
    SLOTS: tl.constexpr,
    C_IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dw[o, position] = sum over splits of partial[split, the position's row, o], in tiles as
    `finish.finish_filter` has them."""
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    position = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_co = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    row = position // 7 % 7 + 1
    column = position % 7 + 1
    k = row // 2 * 64 + column * 8 + row % 2 * 3 + position // 49
    mask = (position < C_IN * 49)[:, None] & (offs_co < C_OUT)[None, :]
    source = (k * SLOTS)[:, None] + offs_co[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.range(0, splits, num_stages=1):
        start = tl.cast(split, tl.int64) * (256 * SLOTS)
        total += tl.load(partial_ptr + start + source, mask=mask, other=0.0)
    target = offs_co[None, :] * (C_IN * 49) + position[:, None]
    tl.store(dw_ptr + target, total.to(dw_ptr.dtype.element_ty), mask=mask)

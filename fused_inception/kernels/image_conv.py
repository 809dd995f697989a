"""Convolutions of images: so few input channels that no tap fills a vector load.

The filter positions (channel, row, column) are flattened into the reduction in the order in which
torch stores a filter, so filters are read as they are, in any dtype; pixels are gathered one
element at a time from an image of any layout and dtype, cast on load. GoogLeNet's first
convolution: 7x7, stride 2, 3 channels, 147 positions.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.geometry import STEM_CHANNELS, STEM_CONV, sums_in_stages
from fused_inception.kernels.finish import launch_sum
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import finish_tile
from fused_inception.tuning.configs import FinishConfig, ImageConvConfig

# elements from the first of an image to its last: offsets inside an image have 32 bits
REACH = 2**31


def within_reach(x: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] of any strides; copied where one reaches too far, as frames of a long
    clip [C, T, H, W] that stands for a batch."""
    steps = zip(x.shape[1:], x.stride()[1:], strict=True)
    reach = sum((size - 1) * stride for size, stride in steps)
    return x if reach < REACH else x.contiguous()


@dataclass(frozen=True)
class ImageConv:
    """Shape of one convolution of images."""

    c_in: int
    c_out: int
    kernel: int
    stride: int
    padding: int

    @property
    def positions(self) -> int:
        """Filter positions: input channels times taps."""
        return self.c_in * self.kernel**2

    @property
    def packs(self) -> bool:
        """Whether it is conv1 of the network, which can read its image packed (`stem_conv`)."""
        return self.c_in <= STEM_CHANNELS and (self.kernel, self.stride, self.padding) == STEM_CONV


@triton.jit
def _gather(
    x_ptr,
    image_offs,  # int64, [BLOCK] offsets of the images of the pixels
    row0,  # [BLOCK] top row of each pixel's window
    column0,  # [BLOCK] left column
    inside,  # [BLOCK] which pixels exist
    position,  # [BLOCK_K]
    height,
    width,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    C_IN: tl.constexpr,
    K: tl.constexpr,
):
    """[BLOCK, BLOCK_K] window elements; 0 outside the image and behind the last position."""
    channel = position // (K * K)
    row = row0[:, None] + (position // K % K)[None, :]
    column = column0[:, None] + (position % K)[None, :]
    mask = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    mask = mask & inside[:, None] & (position < C_IN * K * K)[None, :]
    offs = row * x_row_stride + column * x_column_stride + (channel * x_channel_stride)[None, :]
    return tl.load(x_ptr + (image_offs[:, None] + offs), mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "out_height", "out_width",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _image_conv_fwd_kernel(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype
    w_ptr,  # [C_OUT, C_IN, K, K]
    b_ptr,  # [C_OUT]
    y_ptr,  # [P, Y_STRIDE]
    mask_ptr,  # [P, MASK_STRIDE]
    moments_ptr,  # [tiles of pixels, 3, Y_STRIDE] fp32 ahead of a BatchNorm, else None
    # sizes
    n_pixels,  # of the output
    height,
    width,
    out_height,
    out_width,
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[p, o] = relu(sum over positions of window(p) * w[o] + b[o]); with moments the sum alone,
    and its moments. One program per tile of y."""
    TILES_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    POSITIONS: tl.constexpr = C_IN * K * K
    pid_p = tl.program_id(0) // TILES_CO
    co0 = tl.program_id(0) % TILES_CO * BLOCK_CO
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    mask_co = offs_co < C_OUT
    image_offs = (offs_p // (out_height * out_width)).to(tl.int64) * x_image_stride
    row0 = offs_p // out_width % out_height * STRIDE - PADDING
    column0 = offs_p % out_width * STRIDE - PADDING
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    for k0 in tl.range(0, POSITIONS, BLOCK_K, num_stages=1):
        position = k0 + tl.arange(0, BLOCK_K)
        x_tile = _gather(
            x_ptr, image_offs, row0, column0, offs_p < n_pixels, position, height, width,
            x_channel_stride, x_row_stride, x_column_stride, C_IN, K,
        )  # fmt: skip
        w_mask = (position < POSITIONS)[:, None] & mask_co[None, :]
        w_offs = offs_co[None, :] * POSITIONS + position[:, None]
        w_tile = tl.load(w_ptr + w_offs, mask=w_mask, other=0.0)
        dtype: tl.constexpr = y_ptr.dtype.element_ty
        acc = tl.dot(x_tile.to(dtype), w_tile.to(dtype), acc, input_precision=PRECISION)
    finish_tile(
        acc, b_ptr, y_ptr, mask_ptr, moments_ptr, pid_p, co0, n_pixels,
        Y_STRIDE, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
    )  # fmt: skip


@triton.jit
def image_wgrad_tile(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype
    dz_ptr,  # [P, DZ_STRIDE]
    out_ptr,  # [splits, POSITIONS + 1, C_OUT] fp32; the last row is the bias gradient
    # sizes
    pid,
    chunk,
    n_pixels,
    height,
    width,
    out_height,
    out_width,
    # strides
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[split, position, o] = sum over the split's pixels of window(p)[position] * dz[p, o].

    A window has one more position, always 1, whose product is the gradient of the bias. Output
    channels are the rows of the tile, positions its columns.
    """
    ROWS: tl.constexpr = C_IN * K * K + 1
    TILES_N: tl.constexpr = (ROWS + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (C_OUT + BLOCK_M - 1) // BLOCK_M * TILES_N
    split = pid // TILES
    offs_co = pid % TILES // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    position = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_co = offs_co < C_OUT
    first = split * chunk
    last = tl.minimum(first + chunk, n_pixels)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=1):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last
        image_offs = (offs_p // (out_height * out_width)).to(tl.int64) * x_image_stride
        row0 = offs_p // out_width % out_height * STRIDE - PADDING
        column0 = offs_p % out_width * STRIDE - PADDING
        x_tile = _gather(
            x_ptr, image_offs, row0, column0, mask_p, position, height, width,
            x_channel_stride, x_row_stride, x_column_stride, C_IN, K,
        ).to(dz_ptr.dtype.element_ty)  # fmt: skip
        one = (position == ROWS - 1)[None, :] & mask_p[:, None]
        x_tile = tl.where(one, 1.0, x_tile).to(dz_ptr.dtype.element_ty)
        dz_offs = (tl.arange(0, BLOCK_P) * DZ_STRIDE)[:, None] + offs_co[None, :]
        dz_tile = tl.load(
            dz_ptr + tl.cast(start, tl.int64) * DZ_STRIDE + dz_offs,
            mask=mask_p[:, None] & mask_co[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(dz_tile), x_tile, acc, input_precision=PRECISION)
    out_offs = position[None, :] * C_OUT + offs_co[:, None]
    out_mask = mask_co[:, None] & (position < ROWS)[None, :]
    tl.store(out_ptr + split.to(tl.int64) * (ROWS * C_OUT) + out_offs, acc, mask=out_mask)


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "out_height", "out_width", "chunk",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _image_conv_wgrad_kernel(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides
    dz_ptr,  # [P, DZ_STRIDE]
    out_ptr,  # [splits, POSITIONS + 1, C_OUT] fp32
    # sizes
    chunk,
    n_pixels,  # of the output
    height,
    width,
    out_height,
    out_width,
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Partial gradients of filter and bias; one program per (split, tile)."""
    image_wgrad_tile(
        x_ptr, dz_ptr, out_ptr,
        tl.program_id(0), chunk, n_pixels, height, width, out_height, out_width,
        x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
        C_IN, C_OUT, K, STRIDE, PADDING, DZ_STRIDE, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "out_height", "out_width"])
def _image_conv_dgrad_kernel(
    # tensors
    dz_ptr,  # [P, DZ_STRIDE]
    w_ptr,  # [C_OUT, C_IN, K, K]
    dx_ptr,  # [N * H * W, C_IN]
    # sizes
    n_pixels,  # of the image
    height,
    width,
    out_height,
    out_width,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
):
    """dx[p, i] = sum over the windows that hold p, at their tap, of dz[window, o] * w[o, i, tap].

    Images rarely need a gradient: every tap is tried, and those that the stride steps over are
    masked.
    """
    offs_p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_ci = tl.arange(0, BLOCK_CI)
    image = (offs_p // (height * width)).to(tl.int64) * (out_height * out_width)
    row = offs_p // width % height + PADDING
    column = offs_p % width + PADDING
    acc = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
    for tap in tl.range(0, K * K, num_stages=1):
        above = row - tap // K
        left = column - tap % K
        out_row = above // STRIDE
        out_column = left // STRIDE
        inside = (offs_p < n_pixels) & (above >= 0) & (left >= 0)
        inside = inside & (above - out_row * STRIDE == 0) & (left - out_column * STRIDE == 0)
        inside = inside & (out_row < out_height) & (out_column < out_width)
        dz_row = (image + out_row * out_width + out_column) * DZ_STRIDE
        for co0 in tl.range(0, C_OUT, BLOCK_CO, num_stages=1):
            offs_co = co0 + tl.arange(0, BLOCK_CO)
            mask_co = offs_co < C_OUT
            dz_tile = tl.load(
                dz_ptr + (dz_row[:, None] + offs_co[None, :]),
                mask=inside[:, None] & mask_co[None, :],
                other=0.0,
            )
            w_offs = (offs_co[:, None] * C_IN + offs_ci[None, :]) * (K * K) + tap
            w_mask = mask_co[:, None] & (offs_ci < C_IN)[None, :]
            w_tile = tl.load(w_ptr + w_offs, mask=w_mask, other=0.0).to(dz_ptr.dtype.element_ty)
            acc = tl.dot(dz_tile, w_tile, acc, input_precision=PRECISION)
    dx_offs = (offs_p.to(tl.int64) * C_IN)[:, None] + offs_ci[None, :]
    dx_mask = (offs_p < n_pixels)[:, None] & (offs_ci < C_IN)[None, :]
    tl.store(dx_ptr + dx_offs, acc.to(dx_ptr.dtype.element_ty), mask=dx_mask)


def _sizes(x: torch.Tensor, map_shape: torch.Size) -> tuple[int, ...]:
    n, _, out_height, out_width = map_shape
    return (n * out_height * out_width, x.shape[2], x.shape[3], out_height, out_width)


def _constants(shape: ImageConv, precision: str) -> dict[str, object]:
    return dict(
        C_IN=shape.c_in,
        C_OUT=shape.c_out,
        K=shape.kernel,
        STRIDE=shape.stride,
        PADDING=shape.padding,
        PRECISION=precision,
    )


def launch_image_conv_fwd(
    shape: ImageConv,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    config: ImageConvConfig,
    *,
    save: bool,
    precision: str,
    moments: torch.Tensor | None = None,
) -> None:
    """Fill `y`, [N, C_OUT, H_out, W_out] exactly channels last; with `save` its ReLU bits in
    `mask`.

    With `moments`, as `conv2d.launch_conv2d_fwd` has it, ahead of a BatchNorm.

    x: [N, C_IN, H, W] of any strides and floating dtype; weight contiguous in any floating dtype.
    """
    tile, x = config.forward, within_reach(x)
    sizes = _sizes(x, y.shape)
    run(
        _image_conv_fwd_kernel,
        (cdiv(sizes[0], tile.block_m) * cdiv(shape.c_out, tile.block_n),),
        (x, weight, bias, y, mask, moments, *sizes, *x.stride()),
        dict(
            **_constants(shape, precision),
            Y_STRIDE=y.shape[1],
            MASK_STRIDE=cdiv(shape.c_out, 8),
            SAVE=save,
            BLOCK_P=tile.block_m,
            BLOCK_CO=tile.block_n,
            BLOCK_K=tile.block_k,
        ),
        num_warps=config.num_warps,
    )


def launch_image_conv_wgrad(
    shape: ImageConv,
    x: torch.Tensor,
    dz: torch.Tensor,
    config: ImageConvConfig,
    finish: FinishConfig,
    *,
    precision: str,
) -> torch.Tensor:
    """Partial gradients [splits, positions + 1, C_OUT] in fp32, the bias behind the last
    position; where tiles are many their sum, by one more launch."""
    job, x = config.wgrad, within_reach(x)
    sizes = _sizes(x, dz.shape)
    chunk, splits = job.chunks(sizes[0])
    rows = shape.positions + 1
    out = torch.empty((splits, rows, shape.c_out), dtype=torch.float32, device=x.device)
    tiles = cdiv(shape.c_out, job.tile.block_m) * cdiv(rows, job.tile.block_n)
    run(
        _image_conv_wgrad_kernel,
        (tiles * splits,),
        (x, dz, out, chunk, *sizes, *x.stride()),
        dict(
            **_constants(shape, precision),
            DZ_STRIDE=dz.shape[1],
            BLOCK_M=job.tile.block_m,
            BLOCK_N=job.tile.block_n,
            BLOCK_P=job.tile.block_k,
        ),
        num_warps=config.num_warps,
    )
    return launch_sum(out, finish) if sums_in_stages(sizes[0]) else out


def launch_image_conv_dgrad(
    shape: ImageConv,
    dz: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    config: ImageConvConfig,
    *,
    precision: str,
) -> None:
    """Fill `dx`, [N, C_IN, H, W] exactly channels last, from `dz`, [N, slots of C_OUT, ...]
    dense."""
    tile = config.dgrad
    n, _, height, width = dx.shape
    n_pixels = n * height * width
    run(
        _image_conv_dgrad_kernel,
        (cdiv(n_pixels, tile.block_m),),
        (dz, weight, dx, n_pixels, height, width, dz.shape[2], dz.shape[3]),
        dict(
            **_constants(shape, precision),
            DZ_STRIDE=dz.shape[1],
            BLOCK_P=tile.block_m,
            BLOCK_CI=tile.block_n,
            BLOCK_CO=tile.block_k,
        ),
        num_warps=config.num_warps,
    )

"""All filter and bias gradients of the stem: one launch of partial sums, one that finishes them."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.finish import finish_bias, finish_ends, finish_filter
from fused_inception.kernels.image_conv import image_wgrad_tile
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter
from fused_inception.kernels.stem import StemShape
from fused_inception.kernels.stem_conv import (
    DEPTH,
    ONE,
    finish_image_filter,
    packed_wgrad_tile,
    windows_until_last,
)
from fused_inception.kernels.wgrad import wgrad_tile
from fused_inception.tuning.configs import FinishConfig, StemWgradConfig


@triton.jit
def column_sums(
    dz_ptr,  # [P, C]
    partial_ptr,  # [chunks, C] fp32
    pid,
    chunk,
    n_pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[chunk, c] = sum of dz[p, c] over the chunk's pixels."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    part = pid // TILES_C
    local_p = tl.arange(0, BLOCK_P)
    offs_c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    first = part * chunk
    last = tl.minimum(first + chunk, n_pixels)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=1):
        mask = (start + local_p < last)[:, None] & mask_c[None, :]
        offs = (local_p * C)[:, None] + offs_c[None, :]
        dz_tile = tl.load(dz_ptr + tl.cast(start, tl.int64) * C + offs, mask=mask, other=0.0)
        sums += dz_tile.to(tl.float32)
    tl.store(partial_ptr + part * C + offs_c, tl.sum(sums, axis=0), mask=mask_c)


@triton.jit(
    do_not_specialize=[
        "end1", "end3", "end2", "chunk1", "chunk3", "chunk2", "chunk_sums",
        "n_pixels", "height", "width",
        "n_windows1", "image_height", "image_width", "height1", "width1",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _stem_wgrad_kernel(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype; with PACKED of `stem_conv`
    dz1_ptr,  # [P1, C1]
    z_ptr,  # [P, C1] input of conv2
    dz2_ptr,  # [P, C2]
    r_ptr,  # [P, C2] input of conv3
    dz3_ptr,  # [P, C3]
    # [splits, POSITIONS + 1, C1] fp32, the last row is the bias gradient; with PACKED
    # [splits, 256, C1], row ONE is
    out1_ptr,
    out2_ptr,  # [splits, C1, C2] fp32
    out3_ptr,  # [splits, 9 * C2, C3] fp32
    sums_ptr,  # [chunks, C3] fp32 column sums of dz3
    # sizes
    end1,  # first program behind each filter
    end3,
    end2,
    chunk1,  # pixels of one split of each
    chunk3,
    chunk2,
    chunk_sums,
    n_pixels,  # of the maps of conv2 and conv3
    height,
    width,
    n_windows1,  # output pixels of conv1, or of the packed image up to the last window
    image_height,
    image_width,
    height1,
    width1,
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C_IN: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    K1: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    M1: tl.constexpr,
    N1: tl.constexpr,
    P1: tl.constexpr,
    M3: tl.constexpr,
    N3: tl.constexpr,
    P3: tl.constexpr,
    M2: tl.constexpr,
    N2: tl.constexpr,
    P2: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: conv1 with its bias, whose programs run longest where they gather, conv3,
    conv2, column sums for the bias of conv3; a range that is not needed has no programs."""
    pid = tl.program_id(0)
    if pid < end1:
        if PACKED:
            packed_wgrad_tile(
                x_ptr, dz1_ptr, out1_ptr,
                pid, chunk1, n_windows1, height1, width1, C1, PRECISION, M1, N1, P1, NUM_STAGES,
            )  # fmt: skip
        else:
            image_wgrad_tile(
                x_ptr, dz1_ptr, out1_ptr,
                pid, chunk1, n_windows1, image_height, image_width, height1, width1,
                x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
                C_IN, C1, K1, STRIDE, PADDING, C1, PRECISION, M1, N1, P1,
            )  # fmt: skip
    elif pid < end3:
        wgrad_tile(
            r_ptr, r_ptr, dz3_ptr, out3_ptr,
            pid - end1, chunk3, n_pixels, height, width, C2, C3,
            3, C2, C3, False, PRECISION, M3, N3, P3, NUM_STAGES,
        )  # fmt: skip
    elif pid < end2:
        wgrad_tile(
            z_ptr, z_ptr, dz2_ptr, out2_ptr,
            pid - end3, chunk2, n_pixels, height, width, C1, C2,
            1, C1, C2, False, PRECISION, M2, N2, P2, NUM_STAGES,
        )  # fmt: skip
    else:
        column_sums(dz3_ptr, sums_ptr, pid - end2, chunk_sums, n_pixels, C3, BLOCK_P, BLOCK_C)


@dataclass(frozen=True)
class StemMaps:
    """What the convolutions read, and the gradients of what they make before their ReLU.

    x: the image, any strides, or packed; z, r: inputs of conv2 and conv3, dense; dz1, dz2: None
    where nothing needs them.
    """

    x: torch.Tensor
    z: torch.Tensor
    r: torch.Tensor
    dz1: torch.Tensor | None
    dz2: torch.Tensor | None
    dz3: torch.Tensor
    packed: bool  # is x the packed image of `stem_conv`?


@dataclass(frozen=True)
class StemPartials:
    """Partial sums of the stem's gradients, the first dimension to be summed; no rows where not
    needed."""

    filters: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    sums3: torch.Tensor  # of the bias of conv3


def launch_stem_wgrad(
    shape: StemShape,
    maps: StemMaps,
    config: StemWgradConfig,
    *,
    filters: tuple[bool, bool, bool],
    bias3: bool,
    precision: str,
) -> StemPartials:
    """Partial gradients of the filters asked for (with conv1's comes that of its bias), and with
    `bias3` column sums of `dz3`."""
    conv1, (n, c3, height, width) = shape.conv1, maps.dz3.shape
    # what is not there is not read either
    dz1, dz2 = (maps.dz3 if dz is None else dz for dz in (maps.dz1, maps.dz2))
    n_pixels, n_pixels1 = n * height * width, n * dz1.shape[2] * dz1.shape[3]
    # of each filter gradient: positions x output channels, and the tile's extents along them
    tile1, tile2, tile3 = config.conv1.tile, config.conv2.tile, config.conv3.tile
    n_windows1 = n_pixels1
    extents1 = (conv1.positions + 1, conv1.c_out, tile1.block_n, tile1.block_m)
    if maps.packed:
        n_windows1 = windows_until_last(n_pixels1, *dz1.shape[2:])
        extents1 = (DEPTH, conv1.c_out, tile1.block_m, tile1.block_n)
    jobs = (
        (config.conv1, n_windows1, *extents1),
        (config.conv2, n_pixels, conv1.c_out, shape.c2, tile2.block_m, tile2.block_n),
        (config.conv3, n_pixels, 9 * shape.c2, c3, tile3.block_m, tile3.block_n),
    )
    partial, chunks, programs = [], [], []
    for (job, pixels, rows, columns, high, wide), needed in zip(jobs, filters, strict=True):
        chunk, splits = job.chunks(pixels) if needed else (1, 0)
        chunks.append(chunk)
        programs.append(splits * cdiv(rows, high) * cdiv(columns, wide))
        partial.append(torch.empty((splits, rows, columns), dtype=torch.float32, device=dz1.device))
    sums = config.sums
    parts = cdiv(n_pixels, sums.pixels) if bias3 else 0
    sums3 = torch.empty((parts, c3), dtype=torch.float32, device=dz1.device)
    end1 = programs[0]
    end3 = end1 + programs[2]
    end2 = end3 + programs[1]
    run(
        _stem_wgrad_kernel,
        (end2 + parts * cdiv(c3, sums.block_c),),
        (
            *(maps.x, dz1, maps.z, dz2, maps.r, maps.dz3, *partial, sums3),
            *(end1, end3, end2, chunks[0], chunks[2], chunks[1], sums.pixels),
            *(n_pixels, height, width),
            *(n_windows1, *maps.x.shape[2:], *dz1.shape[2:], *maps.x.stride()),
        ),
        dict(
            C_IN=conv1.c_in,
            C1=conv1.c_out,
            C2=shape.c2,
            C3=c3,
            K1=conv1.kernel,
            STRIDE=conv1.stride,
            PADDING=conv1.padding,
            PACKED=maps.packed,
            PRECISION=precision,
            **config.tiles(),
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    return StemPartials((partial[0], partial[1], partial[2]), sums3)


@triton.jit(
    do_not_specialize=[
        "splits1", "splits2", "splits3", "rows2", "rows3",
        "end_w3", "end_w2", "end_w1", "end_b3", "end_b2",
    ]
)  # fmt: skip
def _stem_finish_kernel(
    # tensors
    partial1_ptr,  # [splits1, ROWS1, C1] fp32, and so on as the launch before left them
    partial2_ptr,
    partial3_ptr,
    sums2_ptr,  # [rows2, C2] column sums of dz2
    sums3_ptr,  # [rows3, C3] column sums of dz3
    dw1_ptr,  # [C1, C_IN, K1, K1]
    dw2_ptr,  # [C2, C1]
    dw3_ptr,  # [C3, C2, 9], or [C3, 9, C2] with LAST3
    db1_ptr,
    db2_ptr,
    db3_ptr,
    # sizes
    splits1,
    splits2,
    splits3,
    rows2,
    rows3,
    end_w3,  # first program behind each result
    end_w2,
    end_w1,
    end_b3,
    end_b2,
    # problem
    POSITIONS: tl.constexpr,  # of a filter of conv1
    ROWS1: tl.constexpr,
    BIAS1: tl.constexpr,  # the row that is the gradient of conv1's bias
    PACKED: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    LAST3: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program ranges: three filters, three biases; a result that is not needed has no programs."""
    pid = tl.program_id(0)
    if pid < end_w3:
        finish_filter(
            partial3_ptr, dw3_ptr, pid, splits3, C3, C2, 9, C2, C3, LAST3, BLOCK_M, BLOCK_N
        )
    elif pid < end_w2:
        finish_filter(
            partial2_ptr, dw2_ptr, pid - end_w3, splits2,
            C2, C1, 1, C1, C2, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end_w1:
        if PACKED:
            finish_image_filter(
                partial1_ptr, dw1_ptr, pid - end_w2, splits1,
                C1, POSITIONS // 49, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            finish_filter(
                partial1_ptr, dw1_ptr, pid - end_w2, splits1,
                C1, POSITIONS, 1, ROWS1, C1, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    elif pid < end_b3:
        finish_bias(sums3_ptr, db3_ptr, pid - end_w1, rows3, C3, C3, BLOCK_M, BLOCK_N)
    elif pid < end_b2:
        finish_bias(sums2_ptr, db2_ptr, pid - end_b3, rows2, C2, C2, BLOCK_M, BLOCK_N)
    else:
        finish_bias(
            partial1_ptr + BIAS1 * C1, db1_ptr, pid - end_b2, splits1,
            C1, ROWS1 * C1, BLOCK_M, BLOCK_N,
        )  # fmt: skip


def launch_stem_finish(
    shape: StemShape,
    partials: StemPartials,
    sums2: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
    config: FinishConfig,
    *,
    packed: bool,
) -> None:
    """Fill the gradients of three filters and three biases; those with no elements are left out.

    That of conv1's filter is contiguous, the others contiguous or channels last; any dtype. sums2:
    [rows, C2] column sums of conv2's gradient. packed: of conv1's partial sums, as
    `StemMaps.packed`.
    """
    filters, sums3 = partials.filters, partials.sums3
    ends = finish_ends(filter_grads[::-1], bias_grads[::-1], config)
    run(
        _stem_finish_kernel,
        (ends[-1],),
        (
            *(*filters, sums2, sums3, *filter_grads, *bias_grads),
            *(*(partial.shape[0] for partial in filters), sums2.shape[0], sums3.shape[0]),
            *ends[:-1],
        ),
        dict(
            POSITIONS=shape.conv1.positions,
            ROWS1=DEPTH if packed else shape.conv1.positions + 1,
            BIAS1=ONE if packed else shape.conv1.positions,
            PACKED=packed,
            C1=shape.conv1.c_out,
            C2=shape.c2,
            C3=shape.c3,
            LAST3=is_channels_last_filter(filter_grads[2]),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        ),
        num_warps=config.num_warps,
    )

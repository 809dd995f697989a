"""All filter and bias gradients of the stem: one launch of partial sums, one that finishes them;
and of conv1's filter alone, where it is an operator of its own."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.geometry import even_share, sums_in_stages
from fused_inception.kernels.finish import (
    BiasSum,
    FilterSum,
    Sums,
    Unfinished,
    finish_all,
    finish_arguments,
    launch_finish,
    launch_sum,
)
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.stem import StemShape
from fused_inception.kernels.stem_conv import (
    DEPTH,
    ONE,
    finish_image_filter,
    packed_wgrad_tile,
    windows_until_last,
)
from fused_inception.kernels.wgrad import wgrad_tile
from fused_inception.tuning.configs import FinishConfig, PackedWgradConfig, StemWgradConfig


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
        "n_windows1", "height1", "width1",
    ]
)  # fmt: skip
def _stem_wgrad_kernel(
    # tensors
    x_ptr,  # packed image of `stem_conv`
    dz1_ptr,  # [P1, C1]
    z_ptr,  # [P, C1] input of conv2
    dz2_ptr,  # [P, C2]
    r_ptr,  # [P, C2] input of conv3
    dz3_ptr,  # [P, C3]
    out1_ptr,  # [splits, 256, C1] fp32, row ONE is the bias gradient
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
    n_windows1,  # pixels of the packed image up to the last window
    height1,
    width1,
    # problem
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
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
    """Program ranges: conv1 with its bias, conv3, conv2, column sums for the bias of conv3; a
    range that is not needed has no programs."""
    pid = tl.program_id(0)
    if pid < end1:
        packed_wgrad_tile(
            x_ptr, dz1_ptr, out1_ptr,
            pid, chunk1, n_windows1, height1, width1, C1, PRECISION, M1, N1, P1, NUM_STAGES,
        )  # fmt: skip
    elif pid < end3:
        wgrad_tile(
            r_ptr, dz3_ptr, out3_ptr,
            pid - end1, chunk3, n_pixels, height, width, C2, C3,
            3, C2, C3, False, PRECISION, M3, N3, P3, NUM_STAGES,
        )  # fmt: skip
    elif pid < end2:
        wgrad_tile(
            z_ptr, dz2_ptr, out2_ptr,
            pid - end3, chunk2, n_pixels, height, width, C1, C2,
            1, C1, C2, False, PRECISION, M2, N2, P2, NUM_STAGES,
        )  # fmt: skip
    else:
        column_sums(dz3_ptr, sums_ptr, pid - end2, chunk_sums, n_pixels, C3, BLOCK_P, BLOCK_C)


@dataclass(frozen=True)
class StemMaps:
    """What the convolutions read, and the gradients of what they make before their ReLU.

    x: the packed image of `stem_conv`; z, r: inputs of conv2 and conv3, dense; dz1, dz2: None
    where nothing needs them.
    """

    x: torch.Tensor
    z: torch.Tensor
    r: torch.Tensor
    dz1: torch.Tensor | None
    dz2: torch.Tensor | None
    dz3: torch.Tensor


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
    finish: FinishConfig,
    *,
    filters: tuple[bool, bool, bool],
    bias3: bool,
    precision: str,
) -> StemPartials:
    """Partial gradients of the filters asked for (with conv1's comes that of its bias), and with
    `bias3` column sums of `dz3`. Where tiles are many those of conv1 are added up by one more
    launch."""
    conv1, (n, c3, height, width) = shape.conv1, maps.dz3.shape
    # what is not there is not read either
    dz1, dz2 = (maps.dz3 if dz is None else dz for dz in (maps.dz1, maps.dz2))
    n_pixels, n_pixels1 = n * height * width, n * dz1.shape[2] * dz1.shape[3]
    # of each filter gradient: positions x output channels, and the tile's extents along them
    tile1, tile2, tile3 = config.conv1.tile, config.conv2.tile, config.conv3.tile
    n_windows1 = windows_until_last(n_pixels1, *dz1.shape[2:])
    jobs = (
        (config.conv1, n_windows1, DEPTH, conv1.c_out, tile1.block_m, tile1.block_n),
        (config.conv2, n_pixels, conv1.c_out, shape.c2, tile2.block_m, tile2.block_n),
        (config.conv3, n_pixels, 9 * shape.c2, c3, tile3.block_m, tile3.block_n),
    )
    partial, chunks, programs = [], [], []
    for (job, pixels, rows, columns, high, wide), needed in zip(jobs, filters, strict=True):
        chunk, splits = job.chunks(pixels, columns) if needed else (1, 0)
        chunks.append(chunk)
        programs.append(splits * cdiv(rows, high) * cdiv(columns, wide))
        partial.append(torch.empty((splits, rows, columns), dtype=torch.float32, device=dz1.device))
    sums = config.sums
    chunk_sums = even_share(n_pixels, sums.pixels, sums.block_p)
    parts = cdiv(n_pixels, chunk_sums) if bias3 else 0
    sums3 = torch.empty((parts, c3), dtype=torch.float32, device=dz1.device)
    end1 = programs[0]
    end3 = end1 + programs[2]
    end2 = end3 + programs[1]
    run(
        _stem_wgrad_kernel,
        (end2 + parts * cdiv(c3, sums.block_c),),
        (
            *(maps.x, dz1, maps.z, dz2, maps.r, maps.dz3, *partial, sums3),
            *(end1, end3, end2, chunks[0], chunks[2], chunks[1], chunk_sums),
            *(n_pixels, height, width),
            *(n_windows1, *dz1.shape[2:]),
        ),
        dict(
            C1=conv1.c_out,
            C2=shape.c2,
            C3=c3,
            PRECISION=precision,
            **config.tiles(),
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    if filters[0] and sums_in_stages(n_pixels1):
        partial[0] = launch_sum(partial[0], finish)
    return StemPartials((partial[0], partial[1], partial[2]), sums3)


@triton.jit(do_not_specialize=["splits1", "image_end"])
def _stem_finish_kernel(
    # tensors
    partial1_ptr,  # [splits1, 256, SLOTS1] fp32
    dw1_ptr,  # [C1, C_IN, 7, 7]
    # sizes
    splits1,
    image_end,  # first program behind conv1's filter
    # of `finish_all`, for all else
    filters,
    biases,
    sizes,
    rows,
    # problem
    C1: tl.constexpr,
    SLOTS1: tl.constexpr,
    C_IN: tl.constexpr,
    FILTERS: tl.constexpr,
    BIASES: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program ranges: conv1's filter; all other gradients."""
    pid = tl.program_id(0)
    if pid < image_end:
        finish_image_filter(partial1_ptr, dw1_ptr, pid, splits1, C1, SLOTS1, C_IN, BLOCK_M, BLOCK_N)
    else:
        finish_all(filters, biases, sizes, rows, pid - image_end, FILTERS, BIASES, BLOCK_M, BLOCK_N)


def launch_stem_finish(
    shape: StemShape,
    partials: StemPartials,
    sums2: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
    config: FinishConfig,
) -> None:
    """Fill the gradients of three filters and three biases; those with no elements are left out.

    That of conv1's filter is contiguous, the others contiguous or channels last; any dtype. sums2:
    [rows, C2] column sums of conv2's gradient.
    """
    partial1, *_ = partials.filters
    dw1, dw2, dw3 = filter_grads
    part = Unfinished(
        _sums(shape),
        # conv1's is not among those that lie as all do
        (dw3, dw2),
        partials.filters[:0:-1],
        [0] * 2,
        [partial.shape[0] for partial in partials.filters[:0:-1]],
        bias_grads[::-1], (partials.sums3, sums2, partial1),
    )  # fmt: skip
    if dw1.numel() == 0:
        launch_finish([part], config)
        return
    _launch_finish(partial1, dw1, [part], config)


def _launch_finish(
    partial1: torch.Tensor, dw1: torch.Tensor, parts: list[Unfinished], config: FinishConfig
) -> None:
    """Fill the gradient of conv1's filter, and those of `parts`."""
    programs, constants, arguments = finish_arguments(parts, config)
    splits, _, slots = partial1.shape
    c1, c_in, _, _ = dw1.shape
    image_end = cdiv(c_in * 49, config.block_m) * cdiv(c1, config.block_n)
    run(
        _stem_finish_kernel,
        (image_end + programs,),
        (partial1, dw1, splits, image_end, *arguments),
        dict(C1=c1, SLOTS1=slots, C_IN=c_in, **constants),
        num_warps=config.num_warps,
    )


@functools.lru_cache(maxsize=1024)
def _sums(shape: StemShape) -> Sums:
    c1, c2, c3 = shape.conv1.c_out, shape.c2, shape.c3
    return Sums(
        filters=(
            FilterSum(c3, c2, 9, c2, c3, 0),
            FilterSum(c2, c1, 1, c1, c2, 0),
        ),
        biases=(
            BiasSum(c3, c3, 0),
            BiasSum(c2, c2, 0),
            # a row of conv1's partial sums
            BiasSum(c1, DEPTH * c1, ONE * c1),
        ),
    )


@triton.jit(do_not_specialize=["chunk", "n_windows", "height", "width"])
def _packed_wgrad_kernel(
    # tensors
    x_ptr,  # [N, H + 3, W + 3, 16] packed image
    dz_ptr,  # [P, SLOTS]
    out_ptr,  # [splits, 256, SLOTS] fp32
    # sizes
    chunk,
    n_windows,
    height,  # of the output
    width,
    # problem
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Partial gradients; one program per (split, tile)."""
    packed_wgrad_tile(
        x_ptr, dz_ptr, out_ptr, tl.program_id(0), chunk, n_windows, height, width,
        SLOTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P, NUM_STAGES,
    )  # fmt: skip


def launch_packed_wgrad(
    packed: torch.Tensor,
    dz: torch.Tensor,
    dw: torch.Tensor,
    config: PackedWgradConfig,
    finish: FinishConfig,
    *,
    precision: str,
) -> None:
    """Fill `dw`, [C_OUT, C_IN, 7, 7] contiguous, from `dz`, [N, slots of C_OUT, H, W] dense.

    Two launches; where tiles are many one between them adds up the splits.
    """
    n, slots, height, width = dz.shape
    job, n_pixels = config.wgrad, n * height * width
    n_windows = windows_until_last(n_pixels, height, width)
    chunk, splits = job.chunks(n_windows, slots)
    partial = torch.empty((splits, DEPTH, slots), dtype=torch.float32, device=dz.device)
    run(
        _packed_wgrad_kernel,
        (splits * cdiv(DEPTH, job.tile.block_m) * cdiv(slots, job.tile.block_n),),
        (packed, dz, partial, chunk, n_windows, height, width),
        dict(
            SLOTS=slots,
            PRECISION=precision,
            BLOCK_M=job.tile.block_m,
            BLOCK_N=job.tile.block_n,
            BLOCK_P=job.tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    if sums_in_stages(n_pixels):
        partial = launch_sum(partial, finish)
    _launch_finish(partial, dw, [], finish)

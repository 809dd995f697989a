"""Launch L3: all six filter gradients as split reductions over the pixels, five groups in one
launch."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.finish import BiasSum, FilterSum, Sums, Unfinished
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import window_bits
from fused_inception.tuning.configs import WgradConfig, WgradJob


@triton.jit
def wgrad_tile(
    # tensors
    x_ptr,  # [P, x_stride] input of the convolution, first channel of its slot
    index_ptr,  # [P, C_IN] uint8 winning taps, with POOLED
    dz_ptr,  # [P, dz_stride] gradient behind the convolution, first channel of its slot
    out_ptr,  # [splits, K * K * C_IN, C_OUT] fp32 partial sums of this group
    # sizes
    pid,
    chunk,
    n_pixels,
    height,
    width,
    # strides
    x_stride,
    dz_stride,
    # problem
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    POOLED: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[split, (tap, i), o] = sum over the split's pixels of x[p + tap, i] * dz[p, o].

    Rows are the filter positions (tap, i) flattened, so that narrow inputs still fill a tile. With
    POOLED x is max
    pooled: the winner is fetched through its tap.
    """
    ROWS: tl.constexpr = K * K * C_IN
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M * TILES_N
    split = pid // TILES
    pid_m = pid % TILES // TILES_N
    pid_n = pid % TILES_N
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_p = tl.arange(0, BLOCK_P)
    mask_m = offs_m < ROWS
    mask_n = offs_n < C_OUT
    tap = offs_m // C_IN
    offs_ci = offs_m % C_IN
    shift = ((tap // K - K // 2) * width + (tap % K - K // 2)) * x_stride
    x_offs = (offs_p * x_stride)[:, None] + (shift + offs_ci)[None, :]
    dz_offs = (offs_p * dz_stride)[:, None] + offs_n[None, :]
    first = split * chunk
    last = tl.minimum(first + chunk, n_pixels)

    # one bit per row of the tile, to be met by the bits of a pixel
    tap_bit = tl.where(mask_m, 1 << tap, 0)
    # coordinates are carried from step to step: a division per pixel and step costs more than the
    # rest
    row = (first + offs_p) // width % height
    column = (first + offs_p) % width
    step_rows = BLOCK_P // width % height
    step_columns = BLOCK_P % width
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=NUM_STAGES):
        p0 = tl.cast(start, tl.int64)
        mask_p = start + offs_p < last
        if K > 1:
            valid = tl.where(mask_p, window_bits(row, column, height, width, K), 0)
            x_mask = (valid[:, None] & tap_bit[None, :]) != 0
            column += step_columns
            wrap = column >= width
            column -= tl.where(wrap, width, 0)
            row += step_rows + wrap.to(tl.int32)
            row -= tl.where(row >= height, height, 0)
        else:
            x_mask = mask_p[:, None] & mask_m[None, :]
        x_tile_ptr = x_ptr + p0 * x_stride
        if POOLED:
            index_offs = (offs_p * C_IN)[:, None] + offs_ci[None, :]
            winner = tl.load(index_ptr + p0 * C_IN + index_offs, mask=x_mask, other=4)
            winner = winner.to(tl.int32)
            if PRECISION == "ieee":
                # Triton takes x for a cast of these bytes, and TF32 for exact enough, on Blackwell;
                # it does not look behind a reduction
                winner = tl.sum(winner[:, :, None], axis=2)
            to_winner = ((winner // 3 - 1) * width + (winner % 3 - 1)) * x_stride
            x_tile = tl.load(x_tile_ptr + (x_offs + to_winner), mask=x_mask, other=0.0)
        else:
            x_tile = tl.load(x_tile_ptr + x_offs, mask=x_mask, other=0.0)
        dz_mask = mask_p[:, None] & mask_n[None, :]
        dz_tile = tl.load(dz_ptr + p0 * dz_stride + dz_offs, mask=dz_mask, other=0.0)
        acc = tl.dot(tl.trans(x_tile), dz_tile, acc, input_precision=PRECISION)

    out_offs = (offs_m * C_OUT)[:, None] + offs_n[None, :]
    out_tile_ptr = out_ptr + split.to(tl.int64) * (ROWS * C_OUT)
    tl.store(out_tile_ptr + out_offs, acc, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "x_stride8",
        "end3", "end1", "end_r", "end5",
        "chunk3", "chunk1", "chunk_r", "chunk5", "chunk_p",
        "start1", "start_r", "start5", "start_p",
    ]
)  # fmt: skip
def _wgrad_kernel(
    # tensors
    x_ptr,  # [P, S_IN]
    index_ptr,  # [P, S_IN] uint8
    r_ptr,  # [P, S3R + S5R]
    dz_ptr,  # [P, DZ_STRIDE]
    dr_ptr,  # [P, S3R + S5R]
    out_ptr,  # partial sums of all groups, fp32
    # sizes
    n_pixels,
    height,
    width,
    end3,  # first program behind each group
    end1,
    end_r,
    end5,
    chunk3,  # pixels of one split of each group
    chunk1,
    chunk_r,
    chunk5,
    chunk_p,
    start1,  # first element of each group in out, in units of 64
    start_r,
    start5,
    start_p,
    # strides
    x_stride8,
    # problem
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    S3R: tl.constexpr,
    S3: tl.constexpr,
    S5R: tl.constexpr,
    S5: tl.constexpr,
    SP: tl.constexpr,
    K5: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    M3: tl.constexpr,
    N3: tl.constexpr,
    M1: tl.constexpr,
    N1: tl.constexpr,
    MR: tl.constexpr,
    NR: tl.constexpr,
    M5: tl.constexpr,
    N5: tl.constexpr,
    MP: tl.constexpr,
    NP: tl.constexpr,
    P3: tl.constexpr,
    P1: tl.constexpr,
    PR: tl.constexpr,
    P5: tl.constexpr,
    PP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: projection, 3x3, 1x1 branch, both reduces, 5x5; a group that is not needed
    has no programs.

    The gather of the winners takes several times as long as the others, so it begins first.
    """
    # its results lie behind the others': ends and starts count it last
    pid = tl.program_id(0) + end5
    pid -= tl.where(pid >= tl.num_programs(0), tl.num_programs(0), 0)
    x_stride = x_stride8 * 8
    R_STRIDE: tl.constexpr = S3R + S5R
    if pid < end3:
        wgrad_tile(
            r_ptr, index_ptr, dz_ptr + SLOT_3, out_ptr,
            pid, chunk3, n_pixels, height, width, R_STRIDE, DZ_STRIDE,
            3, S3R, S3, False, PRECISION, M3, N3, P3, NUM_STAGES,
        )  # fmt: skip
    elif pid < end1:
        wgrad_tile(
            x_ptr, index_ptr, dz_ptr, out_ptr + start1.to(tl.int64) * 64,
            pid - end3, chunk1, n_pixels, height, width, x_stride, DZ_STRIDE,
            1, S_IN, S1, False, PRECISION, M1, N1, P1, NUM_STAGES,
        )  # fmt: skip
    elif pid < end_r:
        wgrad_tile(
            x_ptr, index_ptr, dr_ptr, out_ptr + start_r.to(tl.int64) * 64,
            pid - end1, chunk_r, n_pixels, height, width, x_stride, R_STRIDE,
            1, S_IN, R_STRIDE, False, PRECISION, MR, NR, PR, NUM_STAGES,
        )  # fmt: skip
    elif pid < end5:
        wgrad_tile(
            r_ptr + S3R, index_ptr, dz_ptr + SLOT_5, out_ptr + start5.to(tl.int64) * 64,
            pid - end_r, chunk5, n_pixels, height, width, R_STRIDE, DZ_STRIDE,
            K5, S5R, S5, False, PRECISION, M5, N5, P5, NUM_STAGES,
        )  # fmt: skip
    else:
        wgrad_tile(
            x_ptr, index_ptr, dz_ptr + SLOT_P, out_ptr + start_p.to(tl.int64) * 64,
            pid - end5, chunk_p, n_pixels, height, width, x_stride, DZ_STRIDE,
            1, S_IN, SP, True, PRECISION, MP, NP, PP, NUM_STAGES,
        )  # fmt: skip


@dataclass(frozen=True)
class PartialFilters:
    """Where a launch left its partial sums: the buffer, and (first element, splits) of each
    group."""

    buffer: torch.Tensor
    groups: dict[str, tuple[int, int]]

    def of(self, *names: str) -> tuple[list[torch.Tensor], list[int], list[int]]:
        """Of the groups of these names: the buffer, first elements, splits."""
        groups = [self.groups[name] for name in names]
        return [self.buffer] * len(names), [at for at, _ in groups], [n for _, n in groups]


@dataclass(frozen=True)
class GroupedSplits:
    """Program ranges of one launch over several weight gradients, in order."""

    placed: dict[str, tuple[int, int]]  # (first element of the partial sums, splits)
    chunks: list[int]  # pixels of one split
    ends: list[int]  # first program behind each group
    elements: int  # of all partial sums


def group_splits(
    jobs: dict[str, tuple[WgradJob, int, int]], n_pixels: int, needed: frozenset[str]
) -> GroupedSplits:
    """Lay out `jobs`, name -> (job, rows, columns); one that is not needed has no programs."""
    placed: dict[str, tuple[int, int]] = {}
    chunks: list[int] = []
    ends: list[int] = []
    programs = elements = 0
    for name, (job, rows, columns) in jobs.items():
        chunk, splits = job.chunks(n_pixels) if name in needed else (1, 0)
        placed[name] = (elements, splits)
        chunks.append(chunk)
        programs += splits * cdiv(rows, job.tile.block_m) * cdiv(columns, job.tile.block_n)
        ends.append(programs)
        elements += splits * rows * columns
    return GroupedSplits(placed, chunks, ends, elements)


def launch_wgrad(
    dims: InceptionDims,
    x: torch.Tensor,
    index: torch.Tensor,
    r: torch.Tensor,
    dz: torch.Tensor,
    dr: torch.Tensor,
    config: WgradConfig,
    *,
    groups: frozenset[str],
    precision: str,
) -> PartialFilters:
    """Partial filter gradients of the groups asked for: of "conv3", "branch1", "reduces", "conv5",
    "projection".

    Each group is [splits, filter positions (tap, channel), output channels] in fp32, channels
    padded to slots.
    """
    n, s_in, height, width = x.shape
    n_pixels = n * height * width
    splits, starts, constants = _plan(dims, s_in, n_pixels, config, groups, precision)
    buffer = torch.empty(splits.elements, dtype=torch.float32, device=x.device)
    run(
        _wgrad_kernel,
        (splits.ends[-1],),
        (
            x,
            index,
            r,
            dz,
            dr,
            buffer,
            n_pixels,
            height,
            width,
            *splits.ends[:-1],
            *splits.chunks,
            *starts,
            x.stride(3) // 8,
        ),
        constants,
        num_warps=config.num_warps,
    )
    return PartialFilters(buffer, splits.placed)


@functools.lru_cache(maxsize=1024)
def _plan(
    dims: InceptionDims,
    s_in: int,
    n_pixels: int,
    config: WgradConfig,
    groups: frozenset[str],
    precision: str,
) -> tuple[GroupedSplits, list[int], dict[str, Any]]:
    """Program ranges, where the groups behind the first one begin in units of 64, constants."""
    s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
    s3r, s5r = align_up(dims.ch3x3red), align_up(dims.ch5x5red)
    splits = group_splits(_jobs(dims, s_in, config), n_pixels, groups)
    starts = [start // 64 for start, _ in splits.placed.values()]
    constants = dict(
        S_IN=s_in,
        S1=s1,
        S3R=s3r,
        S3=s3,
        S5R=s5r,
        S5=s5,
        SP=sp,
        K5=dims.kernel_5x5,
        SLOT_3=dims.slots[1],
        SLOT_5=dims.slots[2],
        SLOT_P=dims.slots[3],
        DZ_STRIDE=dims.slot_channels,
        PRECISION=precision,
        M3=config.conv3.tile.block_m,
        N3=config.conv3.tile.block_n,
        M1=config.branch1.tile.block_m,
        N1=config.branch1.tile.block_n,
        MR=config.reduces.tile.block_m,
        NR=config.reduces.tile.block_n,
        M5=config.conv5.tile.block_m,
        N5=config.conv5.tile.block_n,
        MP=config.projection.tile.block_m,
        NP=config.projection.tile.block_n,
        P3=config.conv3.tile.block_k,
        P1=config.branch1.tile.block_k,
        PR=config.reduces.tile.block_k,
        P5=config.conv5.tile.block_k,
        PP=config.projection.tile.block_k,
        NUM_STAGES=config.num_stages,
    )
    return splits, starts[1:], constants


def _jobs(
    dims: InceptionDims, s_in: int, config: WgradConfig
) -> dict[str, tuple[WgradJob, int, int]]:
    """Name -> (job, rows, columns), in the order of the program ranges."""
    s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
    s3r, s5r = align_up(dims.ch3x3red), align_up(dims.ch5x5red)
    return {
        "conv3": (config.conv3, 9 * s3r, s3),
        "branch1": (config.branch1, s_in, s1),
        "reduces": (config.reduces, s_in, s3r + s5r),
        "conv5": (config.conv5, dims.kernel_5x5**2 * s5r, s5),
        "projection": (config.projection, s_in, sp),
    }


@functools.lru_cache(maxsize=1024)
def partial_bytes(dims: InceptionDims, config: WgradConfig) -> int:
    """Of all partial sums, fp32, for as many pixels as the configuration is for."""
    jobs = _jobs(dims, align_up(dims.in_channels), config).values()
    return 4 * sum(job.splits * rows * columns for job, rows, columns in jobs)


def unfinished(
    dims: InceptionDims,
    partial_filters: PartialFilters,
    partial_m: torch.Tensor,
    partial3: torch.Tensor,
    partial5: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
) -> Unfinished:
    """What launch F makes the six filter and six bias gradients of; those with no elements are not
    needed.

    partial_m: [rows, slots] column sums of dz; partial3 and partial5: [rows, reduced channels],
    those of dr behind the 3x3 and the 5x5 branch.
    """
    return Unfinished(
        _sums(dims), filter_grads,
        *partial_filters.of("branch1", "reduces", "conv3", "reduces", "conv5", "projection"),
        bias_grads, (partial_m, partial3, partial_m, partial5, partial_m, partial_m),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _sums(dims: InceptionDims) -> Sums:
    c_in, s_in = dims.in_channels, align_up(dims.in_channels)
    r3, r5, reduced = dims.ch3x3red, dims.ch5x5red, dims.reduced_channels
    s3r, s5r = align_up(r3), align_up(r5)
    s1, s3, s5, sp = map(align_up, dims.branch_widths)
    n1, n3, n5, np = dims.branch_widths
    _, slot3, slot5, slot_p = dims.slots
    return Sums(
        filters=(
            FilterSum(n1, c_in, 1, s_in, s1, 0),
            FilterSum(r3, c_in, 1, s_in, reduced, 0),
            FilterSum(n3, r3, 9, s3r, s3, 0),
            FilterSum(r5, c_in, 1, s_in, reduced, s3r),
            FilterSum(n5, r5, dims.kernel_5x5**2, s5r, s5, 0),
            FilterSum(np, c_in, 1, s_in, sp, 0),
        ),
        biases=(
            BiasSum(n1, dims.slot_channels, 0),
            BiasSum(r3, reduced, 0),
            BiasSum(n3, dims.slot_channels, slot3),
            BiasSum(r5, reduced, s3r),
            BiasSum(n5, dims.slot_channels, slot5),
            BiasSum(np, dims.slot_channels, slot_p),
        ),
    )

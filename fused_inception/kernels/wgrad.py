"""The tiles of launch L3: filter gradients as split reductions over the pixels."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv
from fused_inception.kernels.tiles import window_bits
from fused_inception.tuning.configs import WgradJob


@triton.jit
def wgrad_tile(
    # tensors
    x_ptr,  # [P, x_stride] input of the convolution, first channel of its slot
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

    Rows are the filter positions (tap, i) flattened, so that narrow inputs still fill a tile.

    With POOLED x is max pooled, 3x3 of stride 1: all taps are read again. Each is read as wide as
    memory is, the winners alone would be an element at a time.
    """
    ROWS: tl.constexpr = K * K * C_IN
    WINDOW: tl.constexpr = 3 if POOLED else K
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
        x_mask = mask_p[:, None] & mask_m[None, :]
        if WINDOW > 1:
            valid = tl.where(mask_p, window_bits(row, column, height, width, WINDOW), 0)
            if K > 1:
                x_mask = (valid[:, None] & tap_bit[None, :]) != 0
            column += step_columns
            wrap = column >= width
            column -= tl.where(wrap, width, 0)
            row += step_rows + wrap.to(tl.int32)
            row -= tl.where(row >= height, height, 0)
        x_tile_ptr = x_ptr + p0 * x_stride
        x_tile = tl.load(x_tile_ptr + x_offs, mask=x_mask, other=0.0)
        dz_mask = mask_p[:, None] & mask_n[None, :]
        dz_tile = tl.load(dz_ptr + p0 * dz_stride + dz_offs, mask=dz_mask, other=0.0)
        if POOLED:
            # x_tile has the centre of each window, and 0 where there is none. Three taps a step:
            # more of them wait for each other, fewer for memory
            for r in tl.range(0, 3, num_stages=1):
                for s in tl.static_range(3):
                    inside = (((valid >> (r * 3 + s)) & 1) != 0)[:, None] & mask_m[None, :]
                    to_tap = ((r - 1) * width + (s - 1)) * x_stride
                    v = tl.load(x_tile_ptr + to_tap + x_offs, mask=inside, other=float("-inf"))
                    x_tile = tl.maximum(x_tile, v, propagate_nan=tl.PropagateNan.ALL).to(v.dtype)
        acc = tl.dot(tl.trans(x_tile), dz_tile, acc, input_precision=PRECISION)

    out_offs = (offs_m * C_OUT)[:, None] + offs_n[None, :]
    out_tile_ptr = out_ptr + split.to(tl.int64) * (ROWS * C_OUT)
    tl.store(out_tile_ptr + out_offs, acc, mask=mask_m[:, None] & mask_n[None, :])


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

"""Moments of raw convolution results, which BatchNorm's statistics are made of.

The convolutions leave mean, what rounding left of it, and sum of squared deviations of each tile
(`tiles.store_moments`). They are merged by Chan's rule, first the mean, then the deviations from
it, never as E[x^2] - E[x]^2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv, run
from fused_inception.tuning.configs import StatisticsConfig


@triton.jit
def merge_moments(
    moments_ptr,  # [rows, 3, STRIDE] fp32, first channel of this BatchNorm
    rows,
    n_pixels,
    offs_c,
    mask_c,
    TILE: tl.constexpr,  # pixels of a row
    STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(mean, sum of squared deviations from it) of BLOCK_C channels over all pixels.

    Means are summed as differences from that of the first tile. Where they are large, their sum
    would be some roundings off, and gradients of filters that read such maps a thousand times that.
    The second sum takes whatever is common to the errors of all shifts: they add up to nothing.
    """
    offs_row = tl.arange(0, BLOCK_R)
    first = tl.load(moments_ptr + offs_c, mask=mask_c & (rows > 0), other=0.0)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row0 in tl.range(0, rows, BLOCK_R, num_stages=1):
        row = row0 + offs_row
        in_tile = tl.maximum(tl.minimum(n_pixels - row * TILE, TILE), 0).to(tl.float32)
        mask = (row < rows)[:, None] & mask_c[None, :]
        offs = (row * (3 * STRIDE))[:, None] + offs_c[None, :]
        mean = tl.load(moments_ptr + offs, mask=mask, other=0.0)
        rest = tl.load(moments_ptr + STRIDE + offs, mask=mask, other=0.0)
        total += in_tile[:, None] * (mean - first[None, :] + rest)
    merged = first + tl.sum(total, axis=0) / n_pixels.to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row0 in tl.range(0, rows, BLOCK_R, num_stages=1):
        row = row0 + offs_row
        in_tile = tl.minimum(n_pixels - row * TILE, TILE).to(tl.float32)
        mask = (row < rows)[:, None] & mask_c[None, :]
        offs = (row * (3 * STRIDE))[:, None] + offs_c[None, :]
        mean = tl.load(moments_ptr + offs, mask=mask, other=0.0)
        rest = tl.load(moments_ptr + STRIDE + offs, mask=mask, other=0.0)
        spread = tl.load(moments_ptr + 2 * STRIDE + offs, mask=mask, other=0.0)
        shift = mean - merged[None, :] + rest
        total += tl.where(mask, spread + in_tile[:, None] * shift * shift, 0.0)
    return merged, tl.sum(total, axis=0)


@triton.jit
def _merge_group(
    moments_ptr,  # [rows, 3, STRIDE] fp32
    merged_ptr,  # [groups, 3, STRIDE] fp32
    pid,
    rows,
    n_pixels,
    TILE: tl.constexpr,  # pixels of a row
    STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The moments of BLOCK_R tiles together, as `tiles.store_moments` has those of one; one program
    per (group, block of channels)."""
    COLUMNS: tl.constexpr = (STRIDE + BLOCK_C - 1) // BLOCK_C
    group = pid // COLUMNS
    row = group * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = pid % COLUMNS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < STRIDE
    mask = (row < rows)[:, None] & mask_c[None, :]
    offs = (row * (3 * STRIDE))[:, None] + offs_c[None, :]
    mean = tl.load(moments_ptr + offs, mask=mask, other=0.0)
    rest = tl.load(moments_ptr + STRIDE + offs, mask=mask, other=0.0)
    spread = tl.load(moments_ptr + 2 * STRIDE + offs, mask=mask, other=0.0)
    in_tile = tl.maximum(tl.minimum(n_pixels - row * TILE, TILE), 0).to(tl.float32)
    count = tl.sum(in_tile, axis=0)
    merged = tl.sum(in_tile[:, None] * mean, axis=0) / count
    shift = tl.where(mask, mean - merged[None, :] + rest, 0.0)
    merged_rest = tl.sum(in_tile[:, None] * shift, axis=0) / count
    shift = tl.where(mask, shift - merged_rest[None, :], 0.0)
    merged_spread = tl.sum(spread + in_tile[:, None] * shift * shift, axis=0)
    row_ptr = merged_ptr + group * (3 * STRIDE) + offs_c
    tl.store(row_ptr, merged, mask=mask_c)
    tl.store(row_ptr + STRIDE, merged_rest, mask=mask_c)
    tl.store(row_ptr + 2 * STRIDE, merged_spread, mask=mask_c)


@triton.jit(do_not_specialize=["end_a", "rows_a", "rows_b", "n_pixels"])
def _merge_moments_kernel(
    # tensors
    moments_a_ptr,  # [rows_a, 3, STRIDE_A] fp32
    moments_b_ptr,  # [rows_b, 3, STRIDE_B] fp32
    merged_a_ptr,  # the same of fewer rows
    merged_b_ptr,
    # sizes
    end_a,  # first program of b
    rows_a,
    rows_b,
    n_pixels,
    # problem
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program ranges: the moments of two convolutions."""
    pid = tl.program_id(0)
    if pid < end_a:
        _merge_group(
            moments_a_ptr, merged_a_ptr, pid, rows_a, n_pixels, TILE_A, STRIDE_A, BLOCK_R, BLOCK_C
        )
    else:
        _merge_group(
            moments_b_ptr, merged_b_ptr, pid - end_a, rows_b, n_pixels,
            TILE_B, STRIDE_B, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """What convolutions left of their results: [tiles of pixels, 3, channels] fp32."""

    partial: torch.Tensor
    tile: int  # pixels


def merged_moments(
    first: Moments, second: Moments | None, n_pixels: int, config: StatisticsConfig
) -> tuple[Moments, Moments]:
    """The moments of one or two convolutions in fewer and larger tiles, in one launch.

    A program that merges a thousand tiles waits for memory a hundred times.
    """

    def fewer(moments: Moments) -> Moments:
        rows, _, stride = moments.partial.shape
        shape = (cdiv(rows, config.block_r), 3, stride)
        return Moments(moments.partial.new_empty(shape), moments.tile * config.block_r)

    def programs(moments: Moments) -> int:
        rows, _, stride = moments.partial.shape
        return cdiv(rows, config.block_r) * cdiv(stride, config.block_c)

    end = programs(first)
    grid = end if second is None else end + programs(second)
    second = first if second is None else second
    merged = fewer(first), fewer(second)
    run(
        _merge_moments_kernel,
        (grid,),
        (
            *(first.partial, second.partial, merged[0].partial, merged[1].partial),
            *(end, first.partial.shape[0], second.partial.shape[0], n_pixels),
        ),
        dict(
            TILE_A=first.tile,
            TILE_B=second.tile,
            STRIDE_A=first.partial.shape[2],
            STRIDE_B=second.partial.shape[2],
            BLOCK_R=config.block_r,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )
    return merged

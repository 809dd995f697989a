"""Launch F: fixed-order sums of partial results, of as many operators as run behind each other,
cast and laid out as the parameters are."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter
from fused_inception.tuning.configs import FinishConfig


class FilterSum(NamedTuple):
    """A filter's gradient in partial sums [splits, taps * slot_in, row] fp32: C_OUT elements of
    each row, from `column` on."""

    c_out: int
    c_in: int
    taps: int
    slot_in: int
    row: int
    column: int


class BiasSum(NamedTuple):
    """A bias's gradient in partial sums [rows, row] fp32, from `column` of each on."""

    c_out: int
    row: int
    column: int


@dataclass(frozen=True, eq=False)
class Sums:
    """Those of one operator. There is one object for each: launches are looked up by it."""

    filters: tuple[FilterSum, ...]
    biases: tuple[BiasSum, ...]


class Unfinished(NamedTuple):
    """Gradients of an operator's parameters that are partial sums yet."""

    sums: Sums
    # of each filter: its gradient, partial sums, their first element, a multiple of 64, splits
    filter_grads: Sequence[torch.Tensor]
    partials: Sequence[torch.Tensor]
    starts: Sequence[int]
    splits: Sequence[int]
    # of each bias: its gradient, and partial sums, a row of which has those of many biases
    bias_grads: Sequence[torch.Tensor]
    columns: Sequence[torch.Tensor]


@triton.jit
def finish_filter(
    partial_ptr,  # [splits, TAPS * SLOT_IN, SLOT_OUT] fp32, first column of the filter
    dw_ptr,  # [C_OUT, C_IN, TAPS], or [C_OUT, TAPS, C_IN] with CHANNELS_LAST
    pid,
    splits,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    SLOT_IN: tl.constexpr,
    SLOT_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dw[o, i, tap] = sum over splits of partial[split, (tap, i), o].

    Tiles are [positions in the order of dw, output channels]: reads run along o, writes along the
    positions.
    """
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    position = pid // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_co = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    if CHANNELS_LAST:
        tap = position // C_IN
        offs_ci = position % C_IN
    else:
        tap = position % TAPS
        offs_ci = position // TAPS
    mask = (position < C_IN * TAPS)[:, None] & (offs_co < C_OUT)[None, :]
    source = ((tap * SLOT_IN + offs_ci) * SLOT_OUT)[:, None] + offs_co[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.range(0, splits, num_stages=1):
        start = tl.cast(split, tl.int64) * (TAPS * SLOT_IN * SLOT_OUT)
        total += tl.load(partial_ptr + start + source, mask=mask, other=0.0)
    target = offs_co[None, :] * (C_IN * TAPS) + position[:, None]
    tl.store(dw_ptr + target, total.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_bias(
    partial_ptr,  # [rows, ROW_STRIDE] fp32, first column of the bias
    db_ptr,  # [C_OUT]
    pid,
    rows,
    C_OUT: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """db[o] = sum over rows of partial[row, o].

    There may be over a thousand rows, and each step waits for its loads: four times the rows of a
    filter's tile in flight.
    """
    BLOCK_R: tl.constexpr = 4 * BLOCK_M
    offs_co = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_row = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for row0 in tl.range(0, rows, BLOCK_R, num_stages=1):
        mask = (row0 + offs_row < rows)[:, None] & (offs_co < C_OUT)[None, :]
        offs = ((row0 + offs_row) * ROW_STRIDE)[:, None] + offs_co[None, :]
        total += tl.load(partial_ptr + offs, mask=mask, other=0.0)
    tl.store(
        db_ptr + offs_co, tl.sum(total, axis=0).to(db_ptr.dtype.element_ty), mask=offs_co < C_OUT
    )


@triton.jit
def finish_all(
    filters,  # of each filter: partial sums, fp32, and gradient
    biases,  # of each bias: partial sums [rows, ROW] fp32, and gradient
    sizes,  # of each filter: first element of its partial sums, in units of 64, and splits; 2 n + 3
    rows,  # of each bias, 2 n + 3
    pid,
    FILTERS: tl.constexpr,  # of each: its programs, column, C_OUT ... of `finish_filter`
    BIASES: tl.constexpr,  # of each: its programs, column, C_OUT, ROW_STRIDE
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program ranges: all filters, all biases."""
    for i in tl.static_range(len(FILTERS)):
        if (pid >= FILTERS[i][0]) & (pid < FILTERS[i][1]):
            start = ((sizes[2 * i] >> 1) - 1).to(tl.int64) * 64
            finish_filter(
                filters[2 * i] + (start + FILTERS[i][2]), filters[2 * i + 1],
                pid - FILTERS[i][0], (sizes[2 * i + 1] >> 1) - 1,
                FILTERS[i][3], FILTERS[i][4], FILTERS[i][5], FILTERS[i][6], FILTERS[i][7],
                FILTERS[i][8], BLOCK_M, BLOCK_N,
            )  # fmt: skip
    for i in tl.static_range(len(BIASES)):
        if (pid >= BIASES[i][0]) & (pid < BIASES[i][1]):
            finish_bias(
                biases[2 * i] + BIASES[i][2], biases[2 * i + 1], pid - BIASES[i][0],
                (rows[i] >> 1) - 1, BIASES[i][3], BIASES[i][4], BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _finish_kernel(
    # tensors
    filters,
    biases,
    # sizes
    sizes,
    rows,
    # problem
    FILTERS: tl.constexpr,
    BIASES: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`finish_all`."""
    pid = tl.program_id(0)
    finish_all(filters, biases, sizes, rows, pid, FILTERS, BIASES, BLOCK_M, BLOCK_N)


def launch_finish(parts: Sequence[Unfinished], config: FinishConfig) -> None:
    """Fill all gradients; those with no elements are left out.

    A filter gradient is contiguous or channels last, in any dtype; sums run in fp32 in a fixed
    order.
    """
    if not parts:
        return
    programs, constants, arguments = finish_arguments(parts, config)
    run(_finish_kernel, (programs,), arguments, constants, num_warps=config.num_warps)


def launch_row_sums(
    parts: Sequence[tuple[torch.Tensor, torch.Tensor, int]], config: FinishConfig
) -> None:
    """Fill vectors with the sums over the rows of fp32 matrices, from one of their columns on:
    (vector, matrix, column) each."""
    totals, matrices, columns = zip(*parts, strict=True)
    rows = [matrix.shape[1] for matrix in matrices]
    sums = _row_sums(tuple(zip(map(len, totals), rows, columns, strict=True)))
    launch_finish([Unfinished(sums, (), (), (), (), totals, matrices)], config)


def launch_sum(partial: torch.Tensor, config: FinishConfig) -> torch.Tensor:
    """[1, ...] fp32: the sum over the first dimension, by programs for 32 of the others' elements:
    those that finish a small filter are few."""
    total = torch.empty_like(partial[:1])
    launch_row_sums([(total.view(-1), partial.flatten(1), 0)], config)
    return total


@functools.lru_cache(maxsize=1024)
def _row_sums(sizes: tuple[tuple[int, int, int], ...]) -> Sums:
    return Sums((), tuple(BiasSum(*of) for of in sizes))


def finish_arguments(
    parts: Sequence[Unfinished], config: FinishConfig
) -> tuple[int, dict[str, Any], tuple[Any, ...]]:
    """Programs of `finish_all`, its constants, its other arguments in the order of
    `_finish_kernel`'s."""
    filters: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []
    sizes: list[int] = []
    rows: list[int] = []
    needed, channels_last = [], []
    for sums, filter_grads, partials, starts, splits, bias_grads, columns in parts:
        # sizes in a tuple have Triton compile anew for 1 and for multiples of 16, whatever
        # `do_not_specialize` says: 2 n + 3 is neither
        for grad, partial, start, n in zip(filter_grads, partials, starts, splits, strict=True):
            if grad.numel():
                filters += (partial, grad)
                sizes += (start // 64 * 2 + 3, n * 2 + 3)
                channels_last.append(is_channels_last_filter(grad))
        for grad, column in zip(bias_grads, columns, strict=True):
            if grad.numel():
                biases += (column, grad)
                rows.append(column.shape[0] * 2 + 3)
        needs = tuple([grad.numel() > 0 for grad in (*filter_grads, *bias_grads)])
        needed.append((sums, needs))
    programs, constants = _constants(tuple(needed), tuple(channels_last), config)
    return programs, constants, (tuple(filters), tuple(biases), tuple(sizes), tuple(rows))


@functools.lru_cache(maxsize=1024)
def _constants(
    needed: tuple[tuple[Sums, tuple[bool, ...]], ...],
    channels_last: tuple[bool, ...],
    config: FinishConfig,
) -> tuple[int, dict[str, Any]]:
    filters, biases = [], []
    program, last = 0, iter(channels_last)
    for of, needs in needed:
        for (c_out, c_in, taps, slot_in, row, column), need in zip(of.filters, needs, strict=False):
            if need:
                tiles = cdiv(c_in * taps, config.block_m) * cdiv(c_out, config.block_n)
                programs = program, program + tiles
                filters.append((*programs, column, c_out, c_in, taps, slot_in, row, next(last)))
                program += tiles
    for of, needs in needed:
        for (c_out, row, column), need in zip(of.biases, needs[len(of.filters) :], strict=True):
            if need:
                programs = program, program + cdiv(c_out, config.block_n)
                biases.append((*programs, column, c_out, row))
                _, program = programs
    return program, dict(
        FILTERS=tuple(filters), BIASES=tuple(biases),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n,
    )  # fmt: skip

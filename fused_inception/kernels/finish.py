"""Launch F: fixed-order sums of all partial results, cast and laid out as the parameters are."""

import functools
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter
from fused_inception.kernels.wgrad import PartialFilters
from fused_inception.tuning.configs import FinishConfig


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


@triton.jit(
    do_not_specialize=[
        "splits1", "splits_r", "splits3", "splits5", "splits_p",
        "start1", "start_r", "start5", "start_p",
        "rows_m", "rows3", "rows5",
        "end1", "end3r", "end3", "end5r", "end5", "end_p",
        "end_b1", "end_b3r", "end_b3", "end_b5r", "end_b5",
    ]
)  # fmt: skip
def _finish_kernel(
    # tensors
    filters_ptr,  # partial filter gradients of launch L3
    partial_m_ptr,  # [rows_m, SLOTS] column sums of dz
    partial3_ptr,  # [rows3, SR] column sums of dr behind the 3x3 branch
    partial5_ptr,  # [rows5, SR] likewise behind the 5x5 branch
    dw1_ptr,
    dw3r_ptr,
    dw3_ptr,
    dw5r_ptr,
    dw5_ptr,
    dwp_ptr,
    db1_ptr,
    db3r_ptr,
    db3_ptr,
    db5r_ptr,
    db5_ptr,
    dbp_ptr,
    # sizes
    splits1,
    splits_r,
    splits3,
    splits5,
    splits_p,
    start1,  # first element of each group in filters, in units of 64
    start_r,
    start5,
    start_p,
    rows_m,
    rows3,
    rows5,
    end1,  # first program behind each result
    end3r,
    end3,
    end5r,
    end5,
    end_p,
    end_b1,
    end_b3r,
    end_b3,
    end_b5r,
    end_b5,
    # problem
    C_IN: tl.constexpr,
    N1: tl.constexpr,
    R3: tl.constexpr,
    N3: tl.constexpr,
    R5: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    K5: tl.constexpr,
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    S3R: tl.constexpr,
    S5R: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    SP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    LAST3: tl.constexpr,
    LAST5: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program ranges: six filters, six biases; a result that is not needed has no programs."""
    pid = tl.program_id(0)
    SR: tl.constexpr = S3R + S5R
    SLOTS: tl.constexpr = S1 + S3 + S5 + SP
    reduces_ptr = filters_ptr + start_r.to(tl.int64) * 64
    if pid < end1:
        finish_filter(
            filters_ptr + start1.to(tl.int64) * 64, dw1_ptr, pid, splits1,
            N1, C_IN, 1, S_IN, S1, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end3r:
        finish_filter(
            reduces_ptr, dw3r_ptr, pid - end1, splits_r,
            R3, C_IN, 1, S_IN, SR, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end3:
        finish_filter(
            filters_ptr, dw3_ptr, pid - end3r, splits3,
            N3, R3, 9, S3R, S3, LAST3, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end5r:
        finish_filter(
            reduces_ptr + S3R, dw5r_ptr, pid - end3, splits_r,
            R5, C_IN, 1, S_IN, SR, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end5:
        finish_filter(
            filters_ptr + start5.to(tl.int64) * 64, dw5_ptr, pid - end5r, splits5,
            N5, R5, K5 * K5, S5R, S5, LAST5, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end_p:
        finish_filter(
            filters_ptr + start_p.to(tl.int64) * 64, dwp_ptr, pid - end5, splits_p,
            NP, C_IN, 1, S_IN, SP, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    elif pid < end_b1:
        finish_bias(partial_m_ptr, db1_ptr, pid - end_p, rows_m, N1, SLOTS, BLOCK_M, BLOCK_N)
    elif pid < end_b3r:
        finish_bias(partial3_ptr, db3r_ptr, pid - end_b1, rows3, R3, SR, BLOCK_M, BLOCK_N)
    elif pid < end_b3:
        finish_bias(
            partial_m_ptr + SLOT_3, db3_ptr, pid - end_b3r, rows_m, N3, SLOTS, BLOCK_M, BLOCK_N
        )
    elif pid < end_b5r:
        finish_bias(partial5_ptr + S3R, db5r_ptr, pid - end_b3, rows5, R5, SR, BLOCK_M, BLOCK_N)
    elif pid < end_b5:
        finish_bias(
            partial_m_ptr + SLOT_5, db5_ptr, pid - end_b5r, rows_m, N5, SLOTS, BLOCK_M, BLOCK_N
        )
    else:
        finish_bias(
            partial_m_ptr + SLOT_P, dbp_ptr, pid - end_b5, rows_m, NP, SLOTS, BLOCK_M, BLOCK_N
        )


def finish_ends(
    filter_grads: list[torch.Tensor], bias_grads: list[torch.Tensor], config: FinishConfig
) -> list[int]:
    """First program behind each result, filters first; one with no elements has no programs."""
    programs = [
        cdiv(n // g.shape[0], config.block_m) * cdiv(g.shape[0], config.block_n) if n else 0
        for g in filter_grads
        for n in [g.numel()]
    ] + [cdiv(g.numel(), config.block_n) for g in bias_grads]
    return list(accumulate(programs))


def launch_finish(
    dims: InceptionDims,
    partial_filters: PartialFilters,
    partial_m: torch.Tensor,
    partial3: torch.Tensor,
    partial5: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
    config: FinishConfig,
) -> None:
    """Fill the six filter and six bias gradients; those with no elements are left out.

    A filter gradient is contiguous or channels last, in any dtype; sums run in fp32 in a fixed
    order.
    """
    groups = partial_filters.groups
    starts = [groups[k][0] // 64 for k in ("branch1", "reduces", "conv5", "projection")]
    splits = [groups[k][1] for k in ("branch1", "reduces", "conv3", "conv5", "projection")]
    ends = finish_ends(filter_grads, bias_grads, config)
    run(
        _finish_kernel,
        (ends[-1],),
        (
            partial_filters.buffer,
            partial_m,
            partial3,
            partial5,
            *filter_grads,
            *bias_grads,
            *splits,
            *starts,
            partial_m.shape[0],
            partial3.shape[0],
            partial5.shape[0],
            *ends[:-1],
        ),
        _constants(
            dims,
            config,
            is_channels_last_filter(filter_grads[2]),
            is_channels_last_filter(filter_grads[4]),
        ),
        num_warps=config.num_warps,
    )


@functools.lru_cache(maxsize=1024)
def _constants(
    dims: InceptionDims, config: FinishConfig, last3: bool, last5: bool
) -> dict[str, Any]:
    return dict(
        C_IN=dims.in_channels,
        N1=dims.ch1x1,
        R3=dims.ch3x3red,
        N3=dims.ch3x3,
        R5=dims.ch5x5red,
        N5=dims.ch5x5,
        NP=dims.pool_proj,
        K5=dims.kernel_5x5,
        S_IN=align_up(dims.in_channels),
        S1=align_up(dims.ch1x1),
        S3R=align_up(dims.ch3x3red),
        S5R=align_up(dims.ch5x5red),
        S3=align_up(dims.ch3x3),
        S5=align_up(dims.ch5x5),
        SP=align_up(dims.pool_proj),
        SLOT_3=dims.slots[1],
        SLOT_5=dims.slots[2],
        SLOT_P=dims.slots[3],
        LAST3=last3,
        LAST5=last5,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )

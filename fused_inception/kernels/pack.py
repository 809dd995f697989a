"""Packing of filters and biases, of as many operators as run behind each other, into the layout
that kernels read, in one launch."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import PackedLayout

ELEMENTS = 2048  # of a program
OUTPUTS = 32  # channels of its tile, for the data gradients


class PackedFilter(NamedTuple):
    """Where a filter lies among packed ones, [slots of C_OUT, taps, slots of C_IN]; for the data
    gradient [slots of C_IN, taps backwards, slots of C_OUT]."""

    c_out: int
    c_in: int
    taps: int
    start: int  # its first element
    grad_start: int  # likewise for the data gradient
    grad_stride: int  # there, elements from row to row: filters of one input lie side by side


class PackedBias(NamedTuple):
    """Where a bias lies among packed ones, fp32, in a slot."""

    channels: int
    start: int


@dataclass(frozen=True, eq=False)
class Packing:
    """The layout of all filters and biases of an operator, in the operator's order.

    There is one object for each: launches are looked up by it.
    """

    filters: tuple[PackedFilter, ...]
    biases: tuple[PackedBias, ...]
    filter_elements: int
    bias_elements: int


@functools.lru_cache(maxsize=1024)
def module_packing(dims: InceptionDims) -> Packing:
    """Of an Inception module, as `PackedLayout` says."""
    layout = PackedLayout(dims)
    s_in, cat = layout.slots_in, layout.cat_rows
    r3, r5 = layout.r3, layout.r3 + align_up(dims.ch3x3red)
    c_in, taps5 = dims.in_channels, dims.kernel_5x5**2
    s3, s5, sp = map(align_up, (dims.ch3x3, dims.ch5x5, dims.pool_proj))
    return Packing(
        filters=(
            PackedFilter(dims.ch1x1, c_in, 1, 0, 0, cat),
            PackedFilter(dims.ch3x3red, c_in, 1, r3 * s_in, r3, cat),
            PackedFilter(dims.ch3x3, dims.ch3x3red, 9, layout.w3, layout.w3, s3),
            PackedFilter(dims.ch5x5red, c_in, 1, r5 * s_in, r5, cat),
            PackedFilter(dims.ch5x5, dims.ch5x5red, taps5, layout.w5, layout.w5, s5),
            PackedFilter(dims.pool_proj, c_in, 1, layout.wp, layout.wp, sp),
        ),
        biases=(
            PackedBias(dims.ch1x1, 0),
            PackedBias(dims.ch3x3red, r3),
            PackedBias(dims.ch3x3, layout.b3),
            PackedBias(dims.ch5x5red, r5),
            PackedBias(dims.ch5x5, layout.b5),
            PackedBias(dims.pool_proj, layout.bp),
        ),
        filter_elements=layout.filter_elements,
        bias_elements=layout.bias_elements,
    )


@functools.lru_cache(maxsize=1024)
def row_packing(*shapes: tuple[int, int, int]) -> Packing:
    """Of convolutions [C_OUT, C_IN, taps], one behind the other."""
    filters, biases, at, bias_at = [], [], 0, 0
    for c_out, c_in, taps in shapes:
        filters.append(PackedFilter(c_out, c_in, taps, at, at, align_up(c_out)))
        biases.append(PackedBias(c_out, bias_at))
        at += align_up(c_out) * taps * align_up(c_in)
        bias_at += align_up(c_out)
    return Packing(tuple(filters), tuple(biases), at, bias_at)


@triton.jit
def pack_rows(
    src_ptr,  # [C_OUT, C_IN, K, K] in torch's order, or [C_OUT, K, K, C_IN] with CHANNELS_LAST
    dst_ptr,  # [ROWS, TAPS, SLOT_IN]; with FOR_DGRAD [SLOT_IN, TAPS, ROWS], rows DST_STRIDE apart
    pid,
    C_OUT: tl.constexpr,
    C_IN: tl.constexpr,
    TAPS: tl.constexpr,
    SLOT_IN: tl.constexpr,
    ROWS: tl.constexpr,
    DST_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dst[o, tap, i] = src[o, i, tap]; zero where o or i only pads a slot.

    With FOR_DGRAD dst[i, TAPS - 1 - tap, o]: the data gradient is then a convolution too, and in
    both directions the reduction runs along memory.
    """
    if FOR_DGRAD:
        # read along input channels and taps, written along output channels
        TILES_O: tl.constexpr = (ROWS + BLOCK_O - 1) // BLOCK_O
        co = pid % TILES_O * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
        COLUMNS: tl.constexpr = BLOCK // BLOCK_O
        column = pid // TILES_O * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        if CHANNELS_LAST:
            tap = column // SLOT_IN
            ci = column % SLOT_IN
            src_offs = co * (TAPS * C_IN) + (tap * C_IN + ci)
        else:
            ci = column // TAPS
            tap = column % TAPS
            src_offs = co * (TAPS * C_IN) + column
        dst_offs = (ci * TAPS + (TAPS - 1 - tap)) * DST_STRIDE + co
        mask = (co < ROWS) & (column < TAPS * SLOT_IN)
    else:
        dst_offs = pid * BLOCK + tl.arange(0, BLOCK)
        ci = dst_offs % SLOT_IN
        tap = dst_offs // SLOT_IN % TAPS
        co = dst_offs // (SLOT_IN * TAPS)
        src_offs = (co * TAPS + tap) * C_IN + ci if CHANNELS_LAST else (co * C_IN + ci) * TAPS + tap
        mask = dst_offs < ROWS * TAPS * SLOT_IN
    inside = mask & (co < C_OUT) & (ci < C_IN)
    value = tl.load(src_ptr + src_offs, mask=inside, other=0.0)
    tl.store(dst_ptr + dst_offs, value.to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_bias(src_ptr, dst_ptr, C_OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dst[o] = src[o] in fp32; zero where o only pads a slot."""
    for start in tl.static_range(0, ROWS, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(src_ptr + offs, mask=offs < C_OUT, other=0.0)
        tl.store(dst_ptr + offs, value.to(tl.float32), mask=offs < ROWS)


@triton.jit
def pack_all(
    w_ptr,  # packed filters
    b_ptr,  # packed biases, fp32
    filters,  # as torch stores them
    biases,
    pid,
    FILTERS: tl.constexpr,  # of each: its programs, first packed element, C_OUT ... as above
    BIASES: tl.constexpr,  # of each: its program, first packed element, C_OUT, ROWS
    FOR_DGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Copy, transpose and cast; a program for BLOCK elements of a filter, and for each bias."""
    for i in tl.static_range(len(FILTERS)):
        if (pid >= FILTERS[i][0]) & (pid < FILTERS[i][1]):
            pack_rows(
                filters[i], w_ptr + FILTERS[i][2], pid - FILTERS[i][0],
                FILTERS[i][3], FILTERS[i][4], FILTERS[i][5], FILTERS[i][6], FILTERS[i][7],
                FILTERS[i][8], FILTERS[i][9], FOR_DGRAD, BLOCK, BLOCK_O,
            )  # fmt: skip
    for i in tl.static_range(len(BIASES)):
        if pid == BIASES[i][0]:
            pack_bias(biases[i], b_ptr + BIASES[i][1], BIASES[i][2], BIASES[i][3], BLOCK)


@triton.jit
def _pack_kernel(
    # tensors
    w_ptr,
    b_ptr,
    filters,
    biases,
    # problem
    FILTERS: tl.constexpr,
    BIASES: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """`pack_all`."""
    pack_all(
        w_ptr, b_ptr, filters, biases, tl.program_id(0), FILTERS, BIASES, FOR_DGRAD, BLOCK, BLOCK_O
    )


def launch_pack(
    packings: Sequence[Packing],
    filters: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] | None,
    dtype: torch.dtype,
    block: int = ELEMENTS,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pack all filters (cast to `dtype`) and biases (cast to fp32) of `packings`, in their order.

    With None for the biases the filters are packed for the data gradients, with none in the list
    for a forward without biases. Returns (filters, biases) of each packing as flat tensors.
    """
    sources = [w if is_channels_last_filter(w) else w.contiguous() for w in filters]
    programs, constants = pack_constants(
        tuple(packings), tuple(map(is_channels_last_filter, sources)), bool(biases),
        biases is None, block,
    )  # fmt: skip
    device = filters[0].device
    sizes = [packing.filter_elements for packing in packings]
    bias_sizes = [packing.bias_elements for packing in packings] if biases else []
    w = torch.empty(sum(sizes), dtype=dtype, device=device)
    b = torch.empty(sum(bias_sizes), dtype=torch.float32, device=device)
    contiguous = tuple(bias.contiguous() for bias in biases or ())
    run(_pack_kernel, (programs,), (w, b, tuple(sources), contiguous), constants, num_warps=4)
    if len(packings) == 1:
        return [(w, b)]
    each_b = b.split(bias_sizes) if biases else [b] * len(packings)
    return list(zip(w.split(sizes), each_b, strict=True))


@functools.lru_cache(maxsize=1024)
def pack_constants(
    packings: tuple[Packing, ...],
    channels_last: tuple[bool, ...],
    biased: bool,
    for_dgrad: bool,
    block: int,
) -> tuple[int, dict[str, Any]]:
    """Programs of `pack_all`, and its constants."""
    filters, biases = [], []
    program = at = bias_at = 0
    last = iter(channels_last)
    for packing in packings:
        for c_out, c_in, taps, start, grad_start, stride in packing.filters:
            slot_in, rows = align_up(c_in), align_up(c_out)
            if for_dgrad:
                tiles = cdiv(rows, OUTPUTS) * cdiv(taps * slot_in, block // OUTPUTS)
            else:
                tiles = cdiv(rows * taps * slot_in, block)
            end = program + tiles
            first = at + (grad_start if for_dgrad else start)
            filters.append(
                (program, end, first, c_out, c_in, taps, slot_in, rows, stride, next(last))
            )
            program = end
        at += packing.filter_elements
    for packing in packings if biased else ():
        for channels, start in packing.biases:
            biases.append((program, bias_at + start, channels, align_up(channels)))
            program += 1
        bias_at += packing.bias_elements
    return program, dict(
        FILTERS=tuple(filters), BIASES=tuple(biases), FOR_DGRAD=for_dgrad, BLOCK=block,
        BLOCK_O=OUTPUTS,
    )  # fmt: skip


def is_channels_last_filter(weight: torch.Tensor) -> bool:
    """Whether a filter lies in memory as [C_OUT, K, K, C_IN] and not also as torch's default
    order."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)

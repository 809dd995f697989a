"""Packing of a module's six filters and biases into the layout that all its kernels read, in one
launch."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import PackedLayout


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
):
    """dst[o, tap, i] = src[o, i, tap]; zero where o or i only pads a slot.

    With FOR_DGRAD dst[i, TAPS - 1 - tap, o]: the data gradient is then a convolution too, and in
    both directions the reduction runs along memory.
    """
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    INNER: tl.constexpr = ROWS if FOR_DGRAD else SLOT_IN
    inner = offs % INNER
    tap = (offs // INNER) % TAPS
    outer = offs // (INNER * TAPS)
    if FOR_DGRAD:
        ci = outer
        co = inner
        dst_offs = (ci * TAPS + (TAPS - 1 - tap)) * DST_STRIDE + co
    else:
        ci = inner
        co = outer
        dst_offs = offs
    if CHANNELS_LAST:
        src_offs = (co * TAPS + tap) * C_IN + ci
    else:
        src_offs = (co * C_IN + ci) * TAPS + tap
    inside = (co < C_OUT) & (ci < C_IN)
    value = tl.load(src_ptr + src_offs, mask=inside, other=0.0)
    mask = offs < ROWS * TAPS * SLOT_IN
    tl.store(dst_ptr + dst_offs, value.to(dst_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pack_bias(src_ptr, dst_ptr, C_OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dst[o] = src[o] in fp32; zero where o only pads a slot."""
    for start in tl.static_range(0, ROWS, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        value = tl.load(src_ptr + offs, mask=offs < C_OUT, other=0.0)
        tl.store(dst_ptr + offs, value.to(tl.float32), mask=offs < ROWS)


@triton.jit
def _pack_kernel(
    # tensors
    w1_ptr,  # six filters as torch stores them
    w3r_ptr,
    w3_ptr,
    w5r_ptr,
    w5_ptr,
    wp_ptr,
    b1_ptr,  # six biases
    b3r_ptr,
    b3_ptr,
    b5r_ptr,
    b5_ptr,
    bp_ptr,
    w_ptr,  # packed filters, see PackedLayout
    b_ptr,  # packed biases, fp32
    # problem
    C_IN: tl.constexpr,
    N1: tl.constexpr,
    R3: tl.constexpr,
    N3: tl.constexpr,
    R5: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    K5: tl.constexpr,
    S_IN: tl.constexpr,  # widths rounded up to slots
    S1: tl.constexpr,
    S3R: tl.constexpr,
    S5R: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    SP: tl.constexpr,
    LAST3: tl.constexpr,  # w3 and w5 lie in memory as [C_OUT, K, K, C_IN]
    LAST5: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Copy, transpose and cast all filters; one program per BLOCK elements. For a forward the last
    program packs the biases; FOR_DGRAD needs none."""
    pid = tl.program_id(0)
    # packed elements up to each segment, and programs up to each segment
    W1: tl.constexpr = S1 * S_IN
    W3R: tl.constexpr = W1 + S3R * S_IN
    W5R: tl.constexpr = W3R + S5R * S_IN
    W3: tl.constexpr = W5R + S3 * 9 * S3R
    W5: tl.constexpr = W3 + S5 * K5 * K5 * S5R
    T1: tl.constexpr = (S1 * S_IN + BLOCK - 1) // BLOCK
    T3R: tl.constexpr = T1 + (S3R * S_IN + BLOCK - 1) // BLOCK
    T5R: tl.constexpr = T3R + (S5R * S_IN + BLOCK - 1) // BLOCK
    T3: tl.constexpr = T5R + (S3 * 9 * S3R + BLOCK - 1) // BLOCK
    T5: tl.constexpr = T3 + (S5 * K5 * K5 * S5R + BLOCK - 1) // BLOCK
    TP: tl.constexpr = T5 + (SP * S_IN + BLOCK - 1) // BLOCK
    # the 1x1 filters that read x follow each other by rows, for the data gradient side by side
    CAT: tl.constexpr = S1 + S3R + S5R
    AT_3R: tl.constexpr = S1 if FOR_DGRAD else W1
    AT_5R: tl.constexpr = S1 + S3R if FOR_DGRAD else W3R
    D: tl.constexpr = FOR_DGRAD
    if pid < T1:
        pack_rows(w1_ptr, w_ptr, pid, N1, C_IN, 1, S_IN, S1, CAT, False, D, BLOCK)
    elif pid < T3R:
        pack_rows(w3r_ptr, w_ptr + AT_3R, pid - T1, R3, C_IN, 1, S_IN, S3R, CAT, False, D, BLOCK)
    elif pid < T5R:
        pack_rows(w5r_ptr, w_ptr + AT_5R, pid - T3R, R5, C_IN, 1, S_IN, S5R, CAT, False, D, BLOCK)
    elif pid < T3:
        pack_rows(w3_ptr, w_ptr + W5R, pid - T5R, N3, R3, 9, S3R, S3, S3, LAST3, D, BLOCK)
    elif pid < T5:
        pack_rows(w5_ptr, w_ptr + W3, pid - T3, N5, R5, K5 * K5, S5R, S5, S5, LAST5, D, BLOCK)
    elif pid < TP:
        pack_rows(wp_ptr, w_ptr + W5, pid - T5, NP, C_IN, 1, S_IN, SP, SP, False, D, BLOCK)
    elif not FOR_DGRAD:
        pack_bias(b1_ptr, b_ptr, N1, S1, BLOCK)
        pack_bias(b3r_ptr, b_ptr + S1, R3, S3R, BLOCK)
        pack_bias(b5r_ptr, b_ptr + (S1 + S3R), R5, S5R, BLOCK)
        pack_bias(b3_ptr, b_ptr + (S1 + S3R + S5R), N3, S3, BLOCK)
        pack_bias(b5_ptr, b_ptr + (S1 + S3R + S5R + S3), N5, S5, BLOCK)
        pack_bias(bp_ptr, b_ptr + (S1 + S3R + S5R + S3 + S5), NP, SP, BLOCK)


def launch_pack(
    dims: InceptionDims,
    filters: list[torch.Tensor],
    biases: list[torch.Tensor] | None,
    dtype: torch.dtype,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack six filters (cast to `dtype`) and six biases (cast to fp32).

    With None for the biases the filters are packed for the data gradients, with none in the list
    for a forward without biases. Returns (filters, biases) as flat
    tensors, laid out as `PackedLayout` says.
    """
    sources = [w if is_channels_last_filter(w) else w.contiguous() for w in filters]
    elements, programs, constants = _plan(
        dims,
        is_channels_last_filter(sources[2]),
        is_channels_last_filter(sources[4]),
        biases is None,
        block,
    )
    device = filters[0].device
    packed_w = torch.empty(elements[0], dtype=dtype, device=device)
    packed_b = torch.empty(elements[1] if biases else 0, dtype=torch.float32, device=device)
    bias_args = [b.contiguous() for b in biases] if biases else [packed_b] * 6
    run(
        _pack_kernel,
        (programs + (1 if biases else 0),),
        (*sources, *bias_args, packed_w, packed_b),
        constants,
        num_warps=4,
    )
    return packed_w, packed_b


@functools.lru_cache(maxsize=1024)
def _plan(
    dims: InceptionDims, last3: bool, last5: bool, for_dgrad: bool, block: int
) -> tuple[tuple[int, int], int, dict[str, Any]]:
    """Elements of packed filters and biases, programs for the filters, constants."""
    layout = PackedLayout(dims)
    slots = {
        "S_IN": layout.slots_in,
        "S1": align_up(dims.ch1x1),
        "S3R": align_up(dims.ch3x3red),
        "S5R": align_up(dims.ch5x5red),
        "S3": align_up(dims.ch3x3),
        "S5": align_up(dims.ch5x5),
        "SP": align_up(dims.pool_proj),
    }
    taps5 = dims.kernel_5x5**2
    segments = (
        slots["S1"] * slots["S_IN"],
        slots["S3R"] * slots["S_IN"],
        slots["S5R"] * slots["S_IN"],
        slots["S3"] * 9 * slots["S3R"],
        slots["S5"] * taps5 * slots["S5R"],
        slots["SP"] * slots["S_IN"],
    )
    constants = dict(
        C_IN=dims.in_channels,
        N1=dims.ch1x1,
        R3=dims.ch3x3red,
        N3=dims.ch3x3,
        R5=dims.ch5x5red,
        N5=dims.ch5x5,
        NP=dims.pool_proj,
        K5=dims.kernel_5x5,
        **slots,
        LAST3=last3,
        LAST5=last5,
        FOR_DGRAD=for_dgrad,
        BLOCK=block,
    )
    programs = sum(cdiv(n, block) for n in segments)
    return (layout.filter_elements, layout.bias_elements), programs, constants


def is_channels_last_filter(weight: torch.Tensor) -> bool:
    """Whether a filter lies in memory as [C_OUT, K, K, C_IN] and not also as torch's default
    order."""
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)

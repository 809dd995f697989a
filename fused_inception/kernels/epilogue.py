"""What stands behind a library's convolution: the epilogues of ours, as passes over its raw result.

The library rounds its sums to the type of the maps before bias, ReLU or gate are applied, as
PyTorch's own layers do; ours keep them in fp32 until then. With BatchNorm both round at the same
place.
"""

import torch
import triton
import triton.language as tl

from fused_inception.kernels.dgrad import store_gradient
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import finish_tile, store_moments
from fused_inception.tuning.configs import EpilogueConfig


@triton.jit
def _load_raw(
    raw_ptr,  # [P, C]
    pid_p,
    c0,
    n_pixels,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """[BLOCK_P, BLOCK_C] of the library's result."""
    local_p = tl.arange(0, BLOCK_P)
    offs_c = c0 + tl.arange(0, BLOCK_C)
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    mask = (p0 + local_p < n_pixels)[:, None] & (offs_c < C)[None, :]
    offs = (local_p * C)[:, None] + offs_c[None, :]
    return tl.load(raw_ptr + p0 * C + offs, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n_pixels"])
def _epilogue_kernel(
    # tensors
    raw_ptr,  # [P, RAW_STRIDE]
    b_ptr,  # [C_OUT] fp32
    y_ptr,  # [P, Y_STRIDE] first channel of the slice; None: the raw result stays where it is
    mask_ptr,  # [P, MASK_STRIDE] first byte of the slice
    moments_ptr,  # [tiles of pixels, 3, C_OUT] fp32 ahead of a BatchNorm, else None
    # sizes
    n_pixels,
    # problem
    C_OUT: tl.constexpr,
    RAW_STRIDE: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = relu(raw + b), with SAVE its bits; with moments y = raw, and its moments over the tile.
    One program per tile."""
    pid_p = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_C
    raw_tile = _load_raw(raw_ptr, pid_p, c0, n_pixels, RAW_STRIDE, BLOCK_P, BLOCK_C)
    if y_ptr is None:
        store_moments(raw_tile, moments_ptr, pid_p, c0, n_pixels, C_OUT, BLOCK_P, BLOCK_C)
    else:
        finish_tile(
            raw_tile.to(tl.float32), b_ptr, y_ptr, mask_ptr, moments_ptr, pid_p, c0, n_pixels,
            C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_pixels"])
def _gate_kernel(
    # tensors
    raw_ptr,  # [P, C] gradient behind the ReLU
    x_ptr,  # [P, DX_STRIDE] output of that ReLU, or with a norm the input of its BatchNorm
    dx_ptr,  # [P, DX_STRIDE]
    partial_ptr,  # [tiles of pixels, DX_STRIDE] fp32, with a norm [tiles of pixels, 2, DX_STRIDE]
    norm_ptr,  # [4, NORM_STRIDE] fp32, or None
    # sizes
    n_pixels,
    # problem
    C: tl.constexpr,
    DX_STRIDE: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = raw where the ReLU was open, else 0, with the sums that `store_gradient` leaves. One
    program per tile."""
    pid_p = tl.program_id(0)
    c0 = tl.program_id(1) * BLOCK_C
    raw_tile = _load_raw(raw_ptr, pid_p, c0, n_pixels, C, BLOCK_P, BLOCK_C)
    store_gradient(
        raw_tile, x_ptr, dx_ptr, partial_ptr, pid_p, c0, n_pixels,
        DX_STRIDE, True, C, BLOCK_P, BLOCK_C, norm_ptr, NORM_STRIDE,
    )  # fmt: skip


def launch_epilogue(
    raw: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    mask: torch.Tensor | None,
    config: EpilogueConfig,
    *,
    moments: torch.Tensor | None = None,
) -> None:
    """Fill `y`, [N, C_OUT, H, W], a channel slice of a channels-last tensor, from the first
    channels of `raw`, [N, C_OUT or more, H, W] exactly channels last; with `mask`, the bytes of
    the slice, its ReLU bits too.

    With `moments`, [tiles of `config.block_p` pixels, 3, channels of raw], neither bias nor ReLU is
    applied; without `y` they are all that is written.
    """
    n, c_raw, height, width = raw.shape
    n_pixels = n * height * width
    c_out = c_raw if y is None else y.shape[1]
    run(
        _epilogue_kernel,
        (cdiv(n_pixels, config.block_p), cdiv(c_out, config.block_c)),
        (raw, bias, y, mask, moments, n_pixels),
        dict(
            C_OUT=c_out,
            RAW_STRIDE=c_raw,
            Y_STRIDE=0 if y is None else y.stride(3),
            MASK_STRIDE=0 if mask is None else mask.stride(0),
            SAVE=mask is not None,
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )


def launch_gate(
    raw: torch.Tensor,
    x: torch.Tensor,
    dx: torch.Tensor,
    partial: torch.Tensor,
    config: EpilogueConfig,
    *,
    norm: torch.Tensor | None = None,
) -> None:
    """Fill `dx` from `raw`, [N, C, H, W] exactly channels last, where `x` was not <= 0, and
    `partial`, fp32, with the column sums of dx over each tile of pixels.

    x, dx and partial are the same C channels of tensors of as many channels: x and dx channels
    last, partial [tiles of `config.block_p` pixels, channels]. With `norm`, [4, the same channels],
    `x` is raw, and partial is [tiles, 2, channels] as `dgrad.launch_dgrad` has it.
    """
    n, c, height, width = raw.shape
    n_pixels = n * height * width
    run(
        _gate_kernel,
        (cdiv(n_pixels, config.block_p), cdiv(c, config.block_c)),
        (raw, x, dx, partial, norm, n_pixels),
        dict(
            C=c,
            DX_STRIDE=dx.stride(3),
            NORM_STRIDE=0 if norm is None else norm.stride(0),
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )

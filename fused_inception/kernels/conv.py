"""Launch B: the 3x3 and 5x5 branches as implicit GEMMs that store straight into their slices."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import PackedLayout
from fused_inception.kernels.tiles import finish_tile, tap_validity
from fused_inception.tuning.configs import BranchesConfig, split_width


@triton.jit
def convolve_onto(
    acc,  # [BLOCK_P, BLOCK_CO] fp32
    x_ptr,  # [P, x_stride] at the first pixel of the tile, first channel of the slot
    w_ptr,  # [C_OUT, K * K, C_IN]
    valid,  # [BLOCK_P] bits of the taps inside the map
    co0,
    width,
    x_stride,
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """acc plus the sum over taps and i of x[p + tap, i] * w[o, tap, i]: stride 1, "same"
    padding."""
    offs_ci = tl.arange(0, BLOCK_CI)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    mask_co = offs_co < C_OUT
    x_offs = (tl.arange(0, BLOCK_P) * x_stride)[:, None] + offs_ci[None, :]
    w_offs = offs_co[None, :] * (K * K * C_IN) + offs_ci[:, None]
    # one flat loop over taps and channel blocks: nested loops pipeline badly
    BLOCKS_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    for step in tl.range(0, K * K * BLOCKS_CI, num_stages=NUM_STAGES):
        tap = step // BLOCKS_CI
        ci0 = (step - tap * BLOCKS_CI) * BLOCK_CI
        r = tap // K
        s = tap - r * K
        x_mask = (((valid >> tap) & 1) != 0)[:, None]
        w_mask = mask_co[None, :]
        if C_IN % BLOCK_CI != 0:
            mask_ci = offs_ci < C_IN - ci0
            x_mask = x_mask & mask_ci[None, :]
            w_mask = w_mask & mask_ci[:, None]
        shift = ((r - K // 2) * width + (s - K // 2)) * x_stride + ci0
        x_tile = tl.load(x_ptr + shift + x_offs, mask=x_mask, other=0.0)
        w_tile = tl.load(w_ptr + (tap * C_IN + ci0) + w_offs, mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def convolve(
    x_ptr,
    w_ptr,
    valid,
    co0,
    width,
    x_stride,
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`convolve_onto` zero."""
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    return convolve_onto(
        acc, x_ptr, w_ptr, valid, co0, width, x_stride, K, C_IN, C_OUT, PRECISION,
        BLOCK_P, BLOCK_CO, BLOCK_CI, NUM_STAGES,
    )  # fmt: skip


@triton.jit
def conv_tile(
    # tensors
    x_ptr,  # [P, x_stride] first channel of the input slot
    w_ptr,  # [C_OUT, K * K, C_IN]
    b_ptr,  # [C_OUT] fp32
    y_ptr,  # [P, Y_STRIDE] first channel of the output slice
    mask_ptr,  # [P, MASK_STRIDE] first byte of the slice
    # sizes
    pid_p,
    co0,
    n_pixels,
    height,
    width,
    # strides
    x_stride,
    # problem
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    moments_ptr=None,  # [tiles of pixels, 3, C_OUT] fp32
):
    """y[p, o] = relu(sum over taps and i of x[p + tap, i] * w[o, tap, i] + b[o]), stride 1, "same"
    padding; with moments the sum alone, and its moments over the tile."""
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    acc = convolve(
        x_ptr + p0 * x_stride, w_ptr, tap_validity(offs_p, n_pixels, height, width, K),
        co0, width, x_stride, K, C_IN, C_OUT, PRECISION,
        BLOCK_P, BLOCK_CO, BLOCK_CI, NUM_STAGES,
    )  # fmt: skip
    finish_tile(
        acc, b_ptr, y_ptr, mask_ptr, moments_ptr, pid_p, co0, n_pixels,
        C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "programs3"])
def _branches_kernel(
    # tensors
    r_ptr,  # [P, R_STRIDE] both reduced maps
    # packed filters: [N3, 9, S3R] from element FILTER_3 on, [N5, K5 * K5, S5R] from FILTER_5 on
    w_ptr,
    b_ptr,  # packed biases, fp32: [N3] from BIAS_3 on, [N5] from BIAS_5 on
    y_ptr,  # [P, Y_STRIDE]
    mask_ptr,  # [P, MASK_STRIDE]
    # ahead of a BatchNorm, else None
    moments3_ptr,  # [tiles of pixels, 3, N3] fp32
    moments5_ptr,  # [tiles of pixels, 3, N5] fp32
    # sizes
    n_pixels,
    height,
    width,
    programs3,
    # problem
    N3: tl.constexpr,
    N5: tl.constexpr,
    K5: tl.constexpr,
    S3R: tl.constexpr,
    S5R: tl.constexpr,
    FILTER_3: tl.constexpr,
    FILTER_5: tl.constexpr,
    BIAS_3: tl.constexpr,
    BIAS_5: tl.constexpr,
    OFFSET_3: tl.constexpr,
    OFFSET_5: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    P3: tl.constexpr,
    CO3: tl.constexpr,
    CI3: tl.constexpr,
    TILES_3: tl.constexpr,
    TAIL_3: tl.constexpr,
    P5: tl.constexpr,
    CO5: tl.constexpr,
    CI5: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: of the 3x3 branch (none if programs3 is 0) TILES_3 wide tiles per pixel tile,
    then one tail of width TAIL_3; then (shorter) the tiles of the 5x5 branch."""
    pid = tl.program_id(0)
    TILES_5: tl.constexpr = (N5 + CO5 - 1) // CO5
    R_STRIDE: tl.constexpr = S3R + S5R
    EACH_3: tl.constexpr = TILES_3 + (TAIL_3 > 0)
    wide_end = programs3 // EACH_3 * TILES_3
    if pid < wide_end:
        conv_tile(
            r_ptr, w_ptr + FILTER_3, b_ptr + BIAS_3, y_ptr + OFFSET_3, mask_ptr + SLOT_3 // 8,
            pid // TILES_3, pid % TILES_3 * CO3, n_pixels, height, width, R_STRIDE,
            3, S3R, N3, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            P3, CO3, CI3, NUM_STAGES, moments3_ptr,
        )  # fmt: skip
    elif pid < programs3:
        if TAIL_3 > 0:
            conv_tile(
                r_ptr, w_ptr + FILTER_3, b_ptr + BIAS_3, y_ptr + OFFSET_3, mask_ptr + SLOT_3 // 8,
                pid - wide_end, TILES_3 * CO3, n_pixels, height, width, R_STRIDE,
                3, S3R, N3, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
                P3, TAIL_3, CI3, NUM_STAGES, moments3_ptr,
            )  # fmt: skip
    else:
        pid5 = pid - programs3
        conv_tile(
            r_ptr + S3R, w_ptr + FILTER_5, b_ptr + BIAS_5, y_ptr + OFFSET_5, mask_ptr + SLOT_5 // 8,
            pid5 // TILES_5, pid5 % TILES_5 * CO5, n_pixels, height, width, R_STRIDE,
            K5, S5R, N5, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            P5, CO5, CI5, NUM_STAGES, moments5_ptr,
        )  # fmt: skip


def launch_branches(
    dims: InceptionDims,
    r: torch.Tensor,
    packed_w: torch.Tensor,
    packed_b: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor,
    config: BranchesConfig,
    *,
    save: bool,
    precision: str,
    moments: tuple[torch.Tensor, torch.Tensor] | None = None,
    conv3: bool = True,
    conv5: bool = True,
) -> None:
    """Fill the 3x3 and 5x5 slices of `y` from the reduced maps `r`; with `save` those of `mask`
    too. A branch that is not asked for is not touched.

    With `moments` of both branches, ahead of a BatchNorm, neither bias nor ReLU is applied and `y`
    is a scratch tensor of `dims.slot_channels`, as `pointwise.launch_pointwise` has it.
    """
    n, _, height, width = r.shape
    n_pixels = n * height * width
    c3, c5 = config.conv3, config.conv5
    constants = _constants(dims, y.shape[1], config, save, precision, moments is not None)
    each3 = constants["TILES_3"] + (constants["TAIL_3"] > 0)
    programs3 = cdiv(n_pixels, c3.block_m) * each3 if conv3 else 0
    programs5 = cdiv(n_pixels, c5.block_m) * cdiv(dims.ch5x5, c5.block_n) if conv5 else 0
    run(
        _branches_kernel,
        (programs3 + programs5,),
        (
            r,
            packed_w,
            packed_b,
            y,
            mask,
            *(moments or (None, None)),
            n_pixels,
            height,
            width,
            programs3,
        ),
        constants,
        num_warps=config.num_warps,
    )


@functools.lru_cache(maxsize=1024)
def _constants(
    dims: InceptionDims,
    y_stride: int,
    config: BranchesConfig,
    save: bool,
    precision: str,
    norm: bool,
) -> dict[str, Any]:
    layout = PackedLayout(dims)
    c3, c5 = config.conv3, config.conv5
    n3, n5, starts = dims.ch3x3, dims.ch5x5, dims.offsets
    if norm:
        n3, n5, starts = align_up(n3), align_up(n5), dims.slots
    tiles3, tail3 = split_width(n3, c3.block_n, config.tail_n)
    return dict(
        N3=n3,
        N5=n5,
        K5=dims.kernel_5x5,
        S3R=align_up(dims.ch3x3red),
        S5R=align_up(dims.ch5x5red),
        FILTER_3=layout.w3,
        FILTER_5=layout.w5,
        BIAS_3=layout.b3,
        BIAS_5=layout.b5,
        OFFSET_3=starts[1],
        OFFSET_5=starts[2],
        SLOT_3=dims.slots[1],
        SLOT_5=dims.slots[2],
        Y_STRIDE=y_stride,
        MASK_STRIDE=dims.slot_channels // 8,
        SAVE=save,
        PRECISION=precision,
        P3=c3.block_m,
        CO3=c3.block_n,
        CI3=c3.block_k,
        TILES_3=tiles3,
        TAIL_3=tail3,
        P5=c5.block_m,
        CO5=c5.block_n,
        CI5=c5.block_k,
        NUM_STAGES=config.num_stages,
    )

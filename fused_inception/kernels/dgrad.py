"""Launch L1: gradients of both reduced maps (masked by their ReLU, with bias partials) and of the
pooled map."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.conv import convolve
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import PackedLayout
from fused_inception.kernels.tiles import batch_norm, is_open, load_norm, tap_validity
from fused_inception.tuning.configs import DgradConfig, split_width


@triton.jit
def store_gradient(
    dx_tile,  # [BLOCK_P, BLOCK_CI] rounded gradients
    x_ptr,  # [P, DX_STRIDE] rounded output of the ReLU before this convolution, with GATED
    dx_ptr,  # [P, DX_STRIDE]
    partial_ptr,  # [tiles of pixels, DX_STRIDE] fp32, with GATED
    pid_p,
    ci0,
    n_pixels,
    DX_STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    STORED_IN: tl.constexpr,  # channels that dx has
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    norm_ptr,  # [4, NORM_STRIDE] fp32, of x, or None
    NORM_STRIDE: tl.constexpr,
):
    """Store one tile of dx; with GATED where x was not <= 0, else 0, and its sums over the pixels.

    With a norm the ReLU was that of batch norm(x), and each row of partial sums is two: of dx, and
    of dx times the normalised x.
    """
    local_p = tl.arange(0, BLOCK_P)
    offs_ci = ci0 + tl.arange(0, BLOCK_CI)
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    dx_offs = (local_p * DX_STRIDE)[:, None] + offs_ci[None, :]
    dx_mask = (pid_p * BLOCK_P + local_p < n_pixels)[:, None] & (offs_ci < STORED_IN)[None, :]
    if GATED:
        # closes the padding channels too: there x is 0
        x_tile = tl.load(x_ptr + p0 * DX_STRIDE + dx_offs, mask=dx_mask, other=0.0)
        if norm_ptr is None:
            gate = is_open(x_tile)
        else:
            mask_ci = offs_ci < STORED_IN
            mean = load_norm(norm_ptr, 0, offs_ci, mask_ci, NORM_STRIDE)
            scale = load_norm(norm_ptr, 2, offs_ci, mask_ci, NORM_STRIDE)
            beta = load_norm(norm_ptr, 3, offs_ci, mask_ci, NORM_STRIDE)
            gate = is_open(batch_norm(x_tile, mean, scale, beta))
        dx_tile = tl.where(dx_mask & gate, dx_tile, 0.0)
    tl.store(dx_ptr + p0 * DX_STRIDE + dx_offs, dx_tile, mask=dx_mask)
    if GATED:
        mask_ci = offs_ci < STORED_IN
        sums = tl.sum(dx_tile.to(tl.float32), axis=0)
        if norm_ptr is None:
            tl.store(partial_ptr + pid_p * DX_STRIDE + offs_ci, sums, mask=mask_ci)
        else:
            row_ptr = partial_ptr + pid_p * (2 * DX_STRIDE) + offs_ci
            tl.store(row_ptr, sums, mask=mask_ci)
            inverse = load_norm(norm_ptr, 1, offs_ci, mask_ci, NORM_STRIDE)
            normal = (x_tile.to(tl.float32) - mean[None, :]) * inverse[None, :]
            sums = tl.sum(dx_tile.to(tl.float32) * normal, axis=0)
            tl.store(row_ptr + DX_STRIDE, sums, mask=mask_ci)


@triton.jit
def dgrad_tile(
    # tensors
    dz_ptr,  # [P, DZ_STRIDE] first channel of the branch's slot
    w_ptr,  # [C_IN, K * K, C_OUT] taps backwards
    x_ptr,  # [P, DX_STRIDE] rounded output of the ReLU before this convolution, with GATED
    dx_ptr,  # [P, DX_STRIDE]
    partial_ptr,  # [tiles of pixels, DX_STRIDE] fp32, with GATED
    # sizes
    pid_p,
    ci0,
    n_pixels,
    height,
    width,
    # problem
    K: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    DX_STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    STORED_IN: tl.constexpr,  # channels that dx has
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    norm_ptr=None,  # [4, NORM_STRIDE] fp32, of x
    NORM_STRIDE: tl.constexpr = 0,
):
    """dx[p, i] = sum over taps and o of dz[p - tap, o] * w[o, tap, i], stored by
    `store_gradient`."""
    offs_p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    # with the taps backwards it is a convolution of dz
    acc = convolve(
        dz_ptr + p0 * DZ_STRIDE, w_ptr, tap_validity(offs_p, n_pixels, height, width, K),
        ci0, width, DZ_STRIDE, K, C_OUT, C_IN, PRECISION,
        BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    # rounded before it is masked: 128 x 256 accumulators beside a tile of x would spill
    store_gradient(
        acc.to(dx_ptr.dtype.element_ty), x_ptr, dx_ptr, partial_ptr, pid_p, ci0,
        n_pixels, DX_STRIDE, GATED, STORED_IN, BLOCK_P, BLOCK_CI, norm_ptr, NORM_STRIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "programs3", "programs5"])
def _dgrad_kernel(
    # tensors
    dz_ptr,  # [P, DZ_STRIDE]
    # packed for the data gradients: [S3R, 9, S3] from FILTER_3 on, [S5R, K5 * K5, S5] from
    # FILTER_5, [S_IN, SP] from FILTER_P
    w_ptr,
    r_ptr,  # [P, S3R + S5R]
    dr_ptr,  # [P, S3R + S5R]
    dp_ptr,  # [P, S_IN] gradient of the pooled map
    partial3_ptr,  # [tiles, S3R + S5R] fp32
    partial5_ptr,
    r_norm_ptr,  # [4, NORM_STRIDE] fp32, of the reduced maps where they are raw, else None
    # sizes
    n_pixels,
    height,
    width,
    programs3,
    programs5,
    # problem
    S_IN: tl.constexpr,
    S3R: tl.constexpr,
    S5R: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    SP: tl.constexpr,
    K5: tl.constexpr,
    FILTER_3: tl.constexpr,
    FILTER_5: tl.constexpr,
    FILTER_P: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    P3: tl.constexpr,
    CI3: tl.constexpr,
    CO3: tl.constexpr,
    TILES_3: tl.constexpr,
    TAIL_3: tl.constexpr,
    P5: tl.constexpr,
    CI5: tl.constexpr,
    CO5: tl.constexpr,
    PP: tl.constexpr,
    CIP: tl.constexpr,
    COP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: 3x3 branch (none if programs3 is 0), TILES_3 wide tiles per pixel tile and
    then one tail of width TAIL_3; 5x5 branch (likewise none); projection."""
    pid = tl.program_id(0)
    R_STRIDE: tl.constexpr = S3R + S5R
    EACH_3: tl.constexpr = TILES_3 + (TAIL_3 > 0)
    TILES_5: tl.constexpr = (S5R + CI5 - 1) // CI5
    TILES_P: tl.constexpr = (S_IN + CIP - 1) // CIP
    r5_norm_ptr = r_norm_ptr
    if r_norm_ptr is not None:
        r5_norm_ptr = r_norm_ptr + S3R
    wide_end = programs3 // EACH_3 * TILES_3
    if pid < wide_end:
        dgrad_tile(
            dz_ptr + SLOT_3, w_ptr + FILTER_3, r_ptr, dr_ptr, partial3_ptr,
            pid // TILES_3, pid % TILES_3 * CI3, n_pixels, height, width,
            3, S3R, S3, DZ_STRIDE, R_STRIDE, True, S3R, PRECISION,
            P3, CI3, CO3, NUM_STAGES, r_norm_ptr, NORM_STRIDE,
        )  # fmt: skip
    elif pid < programs3:
        if TAIL_3 > 0:
            dgrad_tile(
                dz_ptr + SLOT_3, w_ptr + FILTER_3, r_ptr, dr_ptr, partial3_ptr,
                pid - wide_end, TILES_3 * CI3, n_pixels, height, width,
                3, S3R, S3, DZ_STRIDE, R_STRIDE, True, S3R, PRECISION,
                P3, TAIL_3, CO3, NUM_STAGES, r_norm_ptr, NORM_STRIDE,
            )  # fmt: skip
    elif pid < programs3 + programs5:
        pid5 = pid - programs3
        dgrad_tile(
            dz_ptr + SLOT_5, w_ptr + FILTER_5, r_ptr + S3R, dr_ptr + S3R, partial5_ptr + S3R,
            pid5 // TILES_5, pid5 % TILES_5 * CI5, n_pixels, height, width,
            K5, S5R, S5, DZ_STRIDE, R_STRIDE, True, S5R, PRECISION,
            P5, CI5, CO5, NUM_STAGES, r5_norm_ptr, NORM_STRIDE,
        )  # fmt: skip
    else:
        pidp = pid - programs3 - programs5
        dgrad_tile(
            dz_ptr + SLOT_P, w_ptr + FILTER_P, dp_ptr, dp_ptr, partial3_ptr,
            pidp // TILES_P, pidp % TILES_P * CIP, n_pixels, height, width,
            1, S_IN, SP, DZ_STRIDE, S_IN, False, S_IN, PRECISION,
            PP, CIP, COP, NUM_STAGES,
        )  # fmt: skip


def launch_dgrad(
    dims: InceptionDims,
    dz: torch.Tensor,
    packed_w: torch.Tensor,
    r: torch.Tensor,
    config: DgradConfig,
    *,
    reduce3: bool,
    reduce5: bool,
    pooled: bool,
    precision: str,
    norm: torch.Tensor | None = None,
    dr: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the reduced maps and of the pooled map from the masked gradient `dz`.

    Returns (dr like r, dp [N, slots of C_IN, H, W], partial3, partial5), the partials being column
    sums of dr over each tile of pixels, [tiles, reduced_channels]. With `norm`, [4, channels of the
    module], `r` is raw, dr is the gradient behind the ReLU of its BatchNorm, and the partials are
    [tiles, 2, reduced_channels], of dr and of dr times the normalised r. What is not asked for is
    not computed: its part of dr is zero, dp is empty. With a `dr` that part is the caller's.
    """
    n, _, height, width = r.shape
    n_pixels = n * height * width
    s_in = align_up(dims.in_channels)
    c3, c5, cp = config.conv3, config.conv5, config.pool
    s3r, s5r = align_up(dims.ch3x3red), align_up(dims.ch5x5red)
    if dr is None:
        # the weight gradient reads both halves together: one that is not computed is zero
        dr = torch.empty_like(r) if reduce3 and reduce5 else torch.zeros_like(r)
    dp = torch.empty_strided(
        (n if pooled else 0, s_in, height, width),
        (height * width * s_in, 1, width * s_in, s_in),
        dtype=dz.dtype,
        device=dz.device,
    )
    tiles3 = cdiv(n_pixels, c3.block_m) if reduce3 else 0
    tiles5 = cdiv(n_pixels, c5.block_m) if reduce5 else 0
    row = (s3r + s5r,) if norm is None else (2, s3r + s5r)
    partial3 = torch.empty((tiles3, *row), dtype=torch.float32, device=dz.device)
    partial5 = torch.empty((tiles5, *row), dtype=torch.float32, device=dz.device)
    constants = _constants(dims, config, precision)
    programs3 = tiles3 * (constants["TILES_3"] + (constants["TAIL_3"] > 0))
    programs5 = tiles5 * cdiv(s5r, c5.block_n)
    programs_p = cdiv(n_pixels, cp.block_m) * cdiv(s_in, cp.block_n) if pooled else 0
    run(
        _dgrad_kernel,
        (programs3 + programs5 + programs_p,),
        (
            dz,
            packed_w,
            r,
            dr,
            dp,
            partial3,
            partial5,
            None if norm is None else norm[:, align_up(dims.ch1x1) :],
            n_pixels,
            height,
            width,
            programs3,
            programs5,
        ),
        constants,
        num_warps=config.num_warps,
    )
    return dr, dp, partial3, partial5


@functools.lru_cache(maxsize=1024)
def _constants(dims: InceptionDims, config: DgradConfig, precision: str) -> dict[str, Any]:
    layout = PackedLayout(dims)
    c3, c5, cp = config.conv3, config.conv5, config.pool
    tiles3, tail3 = split_width(align_up(dims.ch3x3red), c3.block_n, config.tail_n)
    return dict(
        S_IN=layout.slots_in,
        S3R=align_up(dims.ch3x3red),
        S5R=align_up(dims.ch5x5red),
        S3=align_up(dims.ch3x3),
        S5=align_up(dims.ch5x5),
        SP=align_up(dims.pool_proj),
        K5=dims.kernel_5x5,
        FILTER_3=layout.w3,
        FILTER_5=layout.w5,
        FILTER_P=layout.wp,
        SLOT_3=dims.slots[1],
        SLOT_5=dims.slots[2],
        SLOT_P=dims.slots[3],
        DZ_STRIDE=dims.slot_channels,
        NORM_STRIDE=layout.bias_elements,
        PRECISION=precision,
        P3=c3.block_m,
        CI3=c3.block_n,
        CO3=c3.block_k,
        TILES_3=tiles3,
        TAIL_3=tail3,
        P5=c5.block_m,
        CI5=c5.block_n,
        CO5=c5.block_k,
        PP=cp.block_m,
        CIP=cp.block_n,
        COP=cp.block_k,
        NUM_STAGES=config.num_stages,
    )

"""Launch A: the 1x1 convolutions that read x as one GEMM, with or without the pool branch behind
it."""

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import PackedLayout
from fused_inception.kernels.pool_project import pool_project_tile
from fused_inception.kernels.tiles import relu, store_moments, store_slice
from fused_inception.tuning.configs import PointwiseConfig, split_width


@triton.jit
def _pointwise_tile(
    # tensors
    x_ptr,  # [P, C_IN]
    w_ptr,  # [S1 + SR, C_IN] packed 1x1 branch, 3x3 reduce, 5x5 reduce
    b_ptr,  # [S1 + SR] fp32
    y_ptr,  # [P, Y_STRIDE]
    r_ptr,  # [P, SR] reduced maps
    mask_ptr,  # [P, MASK_STRIDE]
    # sizes
    pid_p,
    co0,
    n_pixels,
    c_in,  # C_IN
    # strides
    x_stride,
    # problem
    C_IN: tl.constexpr,
    N1: tl.constexpr,
    R3: tl.constexpr,
    R5: tl.constexpr,
    S1: tl.constexpr,
    S3R: tl.constexpr,
    SR: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    moments_ptr,  # [tiles of pixels, 3, S1 + SR] fp32, or None
):
    """relu(x w^T + b) of one tile: channels below S1 into the 1x1 slice of y, the others into r.

    With moments x w^T alone, and its moments over the tile.
    """
    local_p = tl.arange(0, BLOCK_P)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    offs_ci = tl.arange(0, BLOCK_CI)
    mask_p = pid_p * BLOCK_P + local_p < n_pixels
    mask_co = offs_co < S1 + SR
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    x_tile_ptr = x_ptr + p0 * x_stride
    x_offs = (local_p * x_stride)[:, None] + offs_ci[None, :]
    w_offs = offs_co[None, :] * C_IN + offs_ci[:, None]

    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    # the end is a run-time number: with a known trip count the whole loop is unrolled
    for ci0 in tl.range(0, c_in, BLOCK_CI, num_stages=NUM_STAGES):
        if C_IN % BLOCK_CI == 0:
            x_mask = mask_p[:, None]
            w_mask = mask_co[None, :]
        else:
            mask_ci = offs_ci < C_IN - ci0
            x_mask = mask_p[:, None] & mask_ci[None, :]
            w_mask = mask_co[None, :] & mask_ci[:, None]
        x_tile = tl.load(x_tile_ptr + ci0 + x_offs, mask=x_mask, other=0.0)
        w_tile = tl.load(w_ptr + ci0 + w_offs, mask=w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)

    if moments_ptr is None:
        bias = tl.load(b_ptr + offs_co, mask=mask_co, other=0.0)
        out = relu(acc + bias[None, :]).to(y_ptr.dtype.element_ty)
    else:
        out = acc.to(y_ptr.dtype.element_ty)
        store_moments(out, moments_ptr, pid_p, co0, n_pixels, S1 + SR, BLOCK_P, BLOCK_CO)
    if co0 < S1:
        store_slice(
            out, y_ptr, mask_ptr, p0, co0, n_pixels,
            N1, Y_STRIDE, MASK_STRIDE, SAVE, BLOCK_P, BLOCK_CO,
        )  # fmt: skip
    if co0 + BLOCK_CO > S1:
        offs_r = offs_co - S1
        if (R3 != S3R) | (R3 + R5 != SR):
            # padding channels of the scratch hold zeros whatever x is
            is_channel = (offs_r < R3) | ((offs_r >= S3R) & (offs_r < S3R + R5))
            out = tl.where(is_channel[None, :], out, 0.0).to(y_ptr.dtype.element_ty)
        mask_r = mask_p[:, None] & ((offs_r >= 0) & (offs_r < SR))[None, :]
        tl.store(r_ptr + p0 * SR + ((local_p * SR)[:, None] + offs_r[None, :]), out, mask=mask_r)


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "c_in", "x_stride8"])
def _pointwise_kernel(
    # tensors
    x_ptr,  # [P, C_IN]
    w_ptr,  # packed filters: [S1 + SR, C_IN] first, [NP, C_IN] from element FILTER_P on
    b_ptr,  # packed biases, fp32: likewise, from BIAS_P on
    y_ptr,  # [P, Y_STRIDE]
    r_ptr,  # [P, SR]
    index_ptr,  # [P, C_IN] uint8
    mask_ptr,  # [P, MASK_STRIDE] uint8
    # ahead of a BatchNorm, else None
    moments_ptr,  # [tiles of pixels, 3, S1 + SR] fp32
    pool_moments_ptr,  # [tiles of pixels, 3, NP] fp32
    # sizes
    n_pixels,
    height,
    width,
    c_in,  # C_IN
    # strides
    x_stride8,
    # problem
    C_IN: tl.constexpr,
    N1: tl.constexpr,
    R3: tl.constexpr,
    R5: tl.constexpr,
    NP: tl.constexpr,
    S1: tl.constexpr,
    S3R: tl.constexpr,
    SR: tl.constexpr,
    FILTER_P: tl.constexpr,
    BIAS_P: tl.constexpr,
    OFFSET_P: tl.constexpr,
    SLOT_P: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,  # index and, without moments, bits
    PRECISION: tl.constexpr,
    # tile
    GEMM: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    TILES_CO: tl.constexpr,
    TAIL_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    POOL_P: tl.constexpr,
    POOL_CO: tl.constexpr,
    POOL_CI: tl.constexpr,
):
    """Program ranges: the pool branch, TILES_CO wide tiles per pixel tile, one tail of width
    TAIL_CO.

    The pool's tiles take several times as long as the others, so they begin first.

    The tail lets a width such as 288 = 256 + 32 be covered without padding it to the next wide
    tile.
    """
    BITS: tl.constexpr = SAVE and moments_ptr is None
    x_stride = x_stride8 * 8
    TILES_POOL: tl.constexpr = (NP + POOL_CO - 1) // POOL_CO
    tiles_p = tl.cdiv(n_pixels, BLOCK_P)
    pool_end = tl.cdiv(n_pixels, POOL_P) * TILES_POOL if POOL else 0
    wide_programs = tiles_p * TILES_CO if GEMM else 0
    pid = tl.program_id(0) - pool_end
    if pid < 0:
        if POOL:
            pool_pid = tl.program_id(0)
            pool_project_tile(
                x_ptr, w_ptr + FILTER_P, b_ptr + BIAS_P,
                y_ptr + OFFSET_P, index_ptr, mask_ptr + SLOT_P // 8,
                pool_pid // TILES_POOL, pool_pid % TILES_POOL, n_pixels, height, width, x_stride,
                C_IN, NP, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
                POOL_P, POOL_CO, POOL_CI, pool_moments_ptr,
            )  # fmt: skip
    elif pid < wide_programs:
        if GEMM:
            _pointwise_tile(
                x_ptr, w_ptr, b_ptr, y_ptr, r_ptr, mask_ptr,
                pid // TILES_CO, pid % TILES_CO * BLOCK_CO, n_pixels, c_in, x_stride,
                C_IN, N1, R3, R5, S1, S3R, SR, Y_STRIDE, MASK_STRIDE, BITS, PRECISION,
                BLOCK_P, BLOCK_CO, BLOCK_CI, NUM_STAGES, moments_ptr,
            )  # fmt: skip
    else:
        if TAIL_CO > 0:
            _pointwise_tile(
                x_ptr, w_ptr, b_ptr, y_ptr, r_ptr, mask_ptr,
                pid - wide_programs, TILES_CO * BLOCK_CO, n_pixels, c_in, x_stride,
                C_IN, N1, R3, R5, S1, S3R, SR, Y_STRIDE, MASK_STRIDE, BITS, PRECISION,
                BLOCK_P, TAIL_CO, BLOCK_CI, NUM_STAGES, moments_ptr,
            )  # fmt: skip


def launch_pointwise(
    dims: InceptionDims,
    x: torch.Tensor,
    packed_w: torch.Tensor,
    packed_b: torch.Tensor,
    y: torch.Tensor,
    r: torch.Tensor,
    index: torch.Tensor,
    mask: torch.Tensor,
    config: PointwiseConfig,
    *,
    save: bool,
    precision: str,
    moments: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Fill the 1x1 and pool slices of `y`, and `r`; with `save` also `index` and those slices of
    `mask`.

    With `moments`, ahead of a BatchNorm, neither bias nor ReLU is applied, `y` is a scratch tensor
    of `dims.slot_channels`, `mask` is not written, and `moments` are filled: means and sums of
    squared deviations of each tile of pixels, of the 1x1 GEMM [tiles, 3, slots of all its channels]
    and of the projection.

    x: [N, slots of C_IN, H, W] channels last, pixel stride a multiple of 8; y: [N, C_OUT, H, W] and
    r: [N, reduced_channels, H, W] channels last; index: like x, uint8; mask: [P, slot_channels / 8]
    uint8. `config.pool_in_launch` decides between one launch and two.
    """
    n, c_in, height, width = x.shape
    n_pixels = n * height * width
    gemm, pool = config.gemm, config.pool
    first, second = _constants(dims, c_in, y.shape[1], config, save, precision, moments is not None)
    tiles = first["TILES_CO"] + (first["TAIL_CO"] > 0)
    gemm_programs = cdiv(n_pixels, gemm.block_m) * tiles
    pool_programs = cdiv(n_pixels, pool.block_m) * cdiv(dims.pool_proj, pool.block_n)
    args = (
        x,
        packed_w,
        packed_b,
        y,
        r,
        index,
        mask,
        *(moments or (None, None)),
        n_pixels,
        height,
        width,
        c_in,
        x.stride(3) // 8,
    )
    run(
        _pointwise_kernel,
        (gemm_programs + (pool_programs if second is None else 0),),
        args,
        first,
        num_warps=config.num_warps,
    )
    if second is not None:
        run(_pointwise_kernel, (pool_programs,), args, second, num_warps=config.pool_warps)


@functools.lru_cache(maxsize=1024)
def _constants(
    dims: InceptionDims,
    c_in: int,
    y_stride: int,
    config: PointwiseConfig,
    save: bool,
    precision: str,
    norm: bool,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Of the launch, and of the pool branch's own where it has one."""
    layout = PackedLayout(dims)
    s1, sr = align_up(dims.ch1x1), dims.reduced_channels
    gemm, pool = config.gemm, config.pool
    problem = dict(
        C_IN=c_in,
        N1=s1 if norm else dims.ch1x1,
        R3=dims.ch3x3red,
        R5=dims.ch5x5red,
        NP=align_up(dims.pool_proj) if norm else dims.pool_proj,
        S1=s1,
        S3R=align_up(dims.ch3x3red),
        SR=sr,
        FILTER_P=layout.wp,
        BIAS_P=layout.bp,
        OFFSET_P=dims.slots[3] if norm else dims.offsets[3],
        SLOT_P=dims.slots[3],
        Y_STRIDE=y_stride,
        MASK_STRIDE=dims.slot_channels // 8,
        SAVE=save,
        PRECISION=precision,
        BLOCK_P=gemm.block_m,
        BLOCK_CO=gemm.block_n,
        BLOCK_CI=gemm.block_k,
        NUM_STAGES=config.num_stages,
        POOL_P=pool.block_m,
        POOL_CO=pool.block_n,
        POOL_CI=pool.block_k,
    )
    tiles, tail = split_width(s1 + sr, gemm.block_n, config.tail_n)
    both = config.pool_in_launch
    first = problem | dict(GEMM=True, POOL=both, TILES_CO=tiles, TAIL_CO=tail)
    if both:
        return first, None
    return first, problem | dict(GEMM=False, POOL=True, TILES_CO=0, TAIL_CO=0)

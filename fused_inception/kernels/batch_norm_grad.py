"""The gradient of ReLU behind BatchNorm in training, to the raw results of the convolutions.

With g the gradient where the ReLU was open, h = (z - mean) / deviation, sums over all P pixels:

    dbeta = sum g,  dgamma = sum g h,  dz = scale (g - dbeta / P - h dgamma / P)

One launch leaves partial sums, the next adds them up, in fixed order and once in each program that
needs them, and writes dz. Where pixels are many a launch between them adds up all.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fused_inception.geometry import align_up, even_share, sums_in_stages
from fused_inception.kernels.finish import launch_row_sums
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import branch_constants
from fused_inception.kernels.tiles import batch_norm, channel_of, is_open, load_norms, relu
from fused_inception.tuning.configs import FinishConfig, NormConfig


@triton.jit
def _load_gradient(
    dy_ptr,  # [N, C_OUT, H, W] any strides
    p0,  # int64
    n_pixels,
    height,
    width,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    channel,
    is_channel,
    C_OUT: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """[BLOCK_P, BLOCK_C] of dy in fp32."""
    local_p = tl.arange(0, BLOCK_P)
    mask = (p0 + local_p < n_pixels)[:, None] & is_channel[None, :]
    if DENSE:
        offs = (local_p * C_OUT)[:, None] + channel[None, :]
        tile = tl.load(dy_ptr + p0 * C_OUT + offs, mask=mask, other=0.0)
    else:
        offs_p = p0.to(tl.int32) + local_p
        image = (offs_p // (height * width)).to(tl.int64)
        row = ((offs_p // width) % height).to(tl.int64)
        column = (offs_p % width).to(tl.int64)
        pixel = image * image_stride + row * row_stride + column * column_stride
        offs = pixel[:, None] + (channel.to(tl.int64) * channel_stride)[None, :]
        tile = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _load_raw(z_ptr, p0, n_pixels, slot, SLOTS: tl.constexpr, BLOCK_P: tl.constexpr):
    """[BLOCK_P, BLOCK_C] of raw results."""
    local_p = tl.arange(0, BLOCK_P)
    mask = (p0 + local_p < n_pixels)[:, None] & (slot < SLOTS)[None, :]
    offs = (local_p * SLOTS)[:, None] + slot[None, :]
    return tl.load(z_ptr + p0 * SLOTS + offs, mask=mask, other=0.0)


@triton.jit
def _sum_rows(
    partial_ptr,  # [rows, 2, STRIDE] fp32
    rows,
    offs_c,
    mask_c,
    STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(sum of g, sum of g h) over the rows, in fixed order."""
    offs_row = tl.arange(0, BLOCK_R)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    sum_gh = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row0 in tl.range(0, rows, BLOCK_R, num_stages=1):
        mask = (row0 + offs_row < rows)[:, None] & mask_c[None, :]
        offs = ((row0 + offs_row) * (2 * STRIDE))[:, None] + offs_c[None, :]
        sum_g += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        sum_gh += tl.load(partial_ptr + STRIDE + offs, mask=mask, other=0.0)
    return tl.sum(sum_g, axis=0), tl.sum(sum_gh, axis=0)


@triton.jit
def _store_sums(
    dgamma_ptr,  # [C] or None
    dbeta_ptr,
    sum_g,
    sum_gh,
    offs_c,
    C: tl.constexpr,
):
    """dgamma and dbeta of one BatchNorm."""
    mask = (offs_c >= 0) & (offs_c < C)
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + offs_c, sum_gh.to(dgamma_ptr.dtype.element_ty), mask=mask)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + offs_c, sum_g.to(dbeta_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _raw_gradient(g, z_tile, mean, inverse, scale, sum_g, sum_gh, count):
    """scale (g - mean of g - h * mean of g h), fp32."""
    h = (z_tile.to(tl.float32) - mean[None, :]) * inverse[None, :]
    return scale[None, :] * (g - (sum_g / count)[None, :] - h * (sum_gh / count)[None, :])


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "chunk",
        "dy_image_stride", "dy_channel_stride", "dy_row_stride", "dy_column_stride",
    ]
)  # fmt: skip
def _norm_sums_kernel(
    # tensors
    dy_ptr,  # [N, C_OUT, H, W] any strides
    z_ptr,  # [P, SLOTS] raw results
    norm_ptr,  # [4, NORM_STRIDE] fp32
    partial_ptr,  # [chunks, 2, SLOTS] fp32
    # sizes
    n_pixels,
    height,
    width,
    chunk,  # pixels of one program, a multiple of BLOCK_P
    # strides, in elements
    dy_image_stride,
    dy_channel_stride,
    dy_row_stride,
    dy_column_stride,
    # problem
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    SLOTS: tl.constexpr,
    GAP: tl.constexpr,  # channels in norm between the first branch and the next
    NORM_STRIDE: tl.constexpr,
    DENSE: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial[chunk] = sums over its pixels of g and of g h; one program per (chunk, block of
    slots)."""
    C_OUT: tl.constexpr = N1 + N3 + N5 + NP
    slot = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel, is_channel = channel_of(slot, N1, N3, N5, NP, SLOT_3, SLOT_5, SLOT_P, SLOTS)
    in_norm = slot + tl.where(slot >= SLOT_3, GAP, 0)
    mean, inverse, scale, beta = load_norms(norm_ptr, in_norm, is_channel, NORM_STRIDE)
    sum_g = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_gh = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(0, chunk, BLOCK_P):
        p0 = (tl.program_id(0) * chunk + start).to(tl.int64)
        dy_tile = _load_gradient(
            dy_ptr, p0, n_pixels, height, width,
            dy_image_stride, dy_channel_stride, dy_row_stride, dy_column_stride,
            channel, is_channel, C_OUT, DENSE, BLOCK_P,
        )  # fmt: skip
        z_tile = _load_raw(z_ptr, p0, n_pixels, slot, SLOTS, BLOCK_P)
        g = tl.where(is_open(batch_norm(z_tile, mean, scale, beta)), dy_tile, 0.0)
        sum_g += g
        sum_gh += g * ((z_tile.to(tl.float32) - mean[None, :]) * inverse[None, :])
    row_ptr = partial_ptr + tl.program_id(0) * (2 * SLOTS) + slot
    tl.store(row_ptr, tl.sum(sum_g, axis=0), mask=slot < SLOTS)
    tl.store(row_ptr + SLOTS, tl.sum(sum_gh, axis=0), mask=slot < SLOTS)


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "chunk", "rows",
        "dy_image_stride", "dy_channel_stride", "dy_row_stride", "dy_column_stride",
    ]
)  # fmt: skip
def _norm_grad_kernel(
    # tensors
    dy_ptr,  # [N, C_OUT, H, W] any strides
    z_ptr,  # [P, SLOTS] raw results
    norm_ptr,  # [4, NORM_STRIDE] fp32
    partial_ptr,  # [rows, 2, SLOTS] fp32
    dz_ptr,  # [P, SLOTS]
    dgamma1_ptr,  # [C] each, or None
    dgamma3_ptr,
    dgamma5_ptr,
    dgammap_ptr,
    dbeta1_ptr,
    dbeta3_ptr,
    dbeta5_ptr,
    dbetap_ptr,
    # sizes
    n_pixels,
    height,
    width,
    chunk,
    rows,
    # strides, in elements
    dy_image_stride,
    dy_channel_stride,
    dy_row_stride,
    dy_column_stride,
    # problem
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    SLOTS: tl.constexpr,
    GAP: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    DENSE: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz of one chunk, 0 in the channels that pad a slot; the first chunk's programs store dgamma
    and dbeta."""
    C_OUT: tl.constexpr = N1 + N3 + N5 + NP
    slot = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel, is_channel = channel_of(slot, N1, N3, N5, NP, SLOT_3, SLOT_5, SLOT_P, SLOTS)
    sum_g, sum_gh = _sum_rows(partial_ptr, rows, slot, slot < SLOTS, SLOTS, BLOCK_P, BLOCK_C)
    if tl.program_id(0) == 0:
        _store_sums(dgamma1_ptr, dbeta1_ptr, sum_g, sum_gh, slot, N1)
        _store_sums(dgamma3_ptr, dbeta3_ptr, sum_g, sum_gh, slot - SLOT_3, N3)
        _store_sums(dgamma5_ptr, dbeta5_ptr, sum_g, sum_gh, slot - SLOT_5, N5)
        _store_sums(dgammap_ptr, dbetap_ptr, sum_g, sum_gh, slot - SLOT_P, NP)
    in_norm = slot + tl.where(slot >= SLOT_3, GAP, 0)
    mean, inverse, scale, beta = load_norms(norm_ptr, in_norm, is_channel, NORM_STRIDE)
    local_p = tl.arange(0, BLOCK_P)
    dz_offs = (local_p * SLOTS)[:, None] + slot[None, :]
    for start in tl.range(0, chunk, BLOCK_P):
        p0 = (tl.program_id(0) * chunk + start).to(tl.int64)
        dy_tile = _load_gradient(
            dy_ptr, p0, n_pixels, height, width,
            dy_image_stride, dy_channel_stride, dy_row_stride, dy_column_stride,
            channel, is_channel, C_OUT, DENSE, BLOCK_P,
        )  # fmt: skip
        z_tile = _load_raw(z_ptr, p0, n_pixels, slot, SLOTS, BLOCK_P)
        g = tl.where(is_open(batch_norm(z_tile, mean, scale, beta)), dy_tile, 0.0)
        dz_tile = _raw_gradient(
            g, z_tile, mean, inverse, scale, sum_g, sum_gh, n_pixels.to(tl.float32)
        )
        dz_tile = tl.where(is_channel[None, :], dz_tile, 0.0).to(dz_ptr.dtype.element_ty)
        mask = (p0 + local_p < n_pixels)[:, None] & (slot < SLOTS)[None, :]
        tl.store(dz_ptr + p0 * SLOTS + dz_offs, dz_tile, mask=mask)


@triton.jit(do_not_specialize=["n_pixels", "chunk", "rows3", "rows5"])
def _reduce_norm_grad_kernel(
    # tensors
    dr_ptr,  # [P, SR] gradients behind the ReLUs of both reduced maps; overwritten
    r_ptr,  # [P, SR] raw reduced maps
    norm_ptr,  # [4, NORM_STRIDE] fp32, their first channel
    partial3_ptr,  # [rows3, 2, SR] fp32, columns of the 3x3 reduce
    partial5_ptr,  # [rows5, 2, SR] fp32, columns of the 5x5 reduce
    a_ptr,  # [P, SR] relu(batch norm(r)), which the filter gradients of 3x3 and 5x5 read
    dgamma3_ptr,  # [R3] or None
    dgamma5_ptr,  # [R5] or None
    dbeta3_ptr,
    dbeta5_ptr,
    # sizes
    n_pixels,
    chunk,
    rows3,
    rows5,
    # problem
    R3: tl.constexpr,
    R5: tl.constexpr,
    S3R: tl.constexpr,
    SR: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dr of one chunk, in place, and the activated maps; the first chunk's programs store dgamma
    and dbeta."""
    first = tl.program_id(1) * BLOCK_C
    slot = first + tl.arange(0, BLOCK_C)
    mask_c = slot < SR
    of3 = slot < S3R
    of5 = mask_c & (slot >= S3R)
    # a block with no channel of a map has nothing to add up
    some3 = tl.where(first < S3R, rows3, 0)
    some5 = tl.where(first + BLOCK_C > S3R, rows5, 0)
    sum_g, sum_gh = _sum_rows(partial3_ptr, some3, slot, of3, SR, BLOCK_P, BLOCK_C)
    sum_g5, sum_gh5 = _sum_rows(partial5_ptr, some5, slot, of5, SR, BLOCK_P, BLOCK_C)
    sum_g += sum_g5
    sum_gh += sum_gh5
    if tl.program_id(0) == 0:
        _store_sums(dgamma3_ptr, dbeta3_ptr, sum_g, sum_gh, slot, R3)
        _store_sums(dgamma5_ptr, dbeta5_ptr, sum_g, sum_gh, slot - S3R, R5)
    mean, inverse, scale, beta = load_norms(norm_ptr, slot, mask_c, NORM_STRIDE)
    local_p = tl.arange(0, BLOCK_P)
    offs = (local_p * SR)[:, None] + slot[None, :]
    for start in tl.range(0, chunk, BLOCK_P):
        p0 = (tl.program_id(0) * chunk + start).to(tl.int64)
        mask = (p0 + local_p < n_pixels)[:, None] & mask_c[None, :]
        r_tile = tl.load(r_ptr + p0 * SR + offs, mask=mask, other=0.0)
        g = tl.load(dr_ptr + p0 * SR + offs, mask=mask, other=0.0).to(tl.float32)
        a_tile = relu(batch_norm(r_tile, mean, scale, beta))
        tl.store(a_ptr + p0 * SR + offs, a_tile, mask=mask)
        # the channels that pad a slot have a scale of 0
        dr_tile = _raw_gradient(
            g, r_tile, mean, inverse, scale, sum_g, sum_gh, n_pixels.to(tl.float32)
        )
        tl.store(dr_ptr + p0 * SR + offs, dr_tile.to(dr_ptr.dtype.element_ty), mask=mask)


def _summed(parts: Sequence[tuple[torch.Tensor, int, int]], config: FinishConfig) -> torch.Tensor:
    """[1, 2, columns] fp32: the sums over the rows of tensors [rows, 2, columns], of each from one
    column to another."""
    partial = parts[0][0]
    columns = partial.shape[2]
    total = torch.empty((1, 2, columns), dtype=torch.float32, device=partial.device)
    sums = [
        (total[0, which, first:last], of.flatten(1), which * columns + first)
        for of, first, last in parts
        for which in (0, 1)
    ]
    launch_row_sums(sums, config)
    return total


def launch_norm_grad(
    widths: tuple[int, ...],
    dy: torch.Tensor,
    z: torch.Tensor,
    norm: torch.Tensor,
    gap: int,
    dgammas: list[torch.Tensor | None],
    dbetas: list[torch.Tensor | None],
    config: NormConfig,
    finish: FinishConfig,
) -> torch.Tensor:
    """dz, like `z`, of up to four branches side by side; two launches, three where tiles are many.

    dy: [N, sum of widths, H, W] of any strides; z, norm, gap: as `batch_norm.launch_normalise` has
    them. Fills dgammas and dbetas, one a branch, where they are not None.
    """
    n, c_out, height, width = dy.shape
    n_pixels = n * height * width
    slots = z.shape[1]
    chunk = even_share(n_pixels, config.pixels, config.block_p)
    chunks = cdiv(n_pixels, chunk)
    grid = (chunks, cdiv(slots, config.block_c))
    partial = torch.empty((chunks, 2, slots), dtype=torch.float32, device=dy.device)
    dz = torch.empty_like(z)
    sizes = (n_pixels, height, width, chunk)
    absent = [None] * (4 - len(widths))
    constants = dict(
        **branch_constants(widths),
        GAP=gap,
        NORM_STRIDE=norm.stride(0),
        DENSE=dy.stride() == (height * width * c_out, 1, width * c_out, c_out),
        BLOCK_P=config.block_p,
        BLOCK_C=config.block_c,
    )
    run(
        _norm_sums_kernel,
        grid,
        (dy, z, norm, partial, *sizes, *dy.stride()),
        constants,
        num_warps=config.num_warps,
    )
    if sums_in_stages(n_pixels):
        partial = _summed([(partial, 0, slots)], finish)
    run(
        _norm_grad_kernel,
        grid,
        (
            *(dy, z, norm, partial, dz),
            *(*dgammas, *absent, *dbetas, *absent),
            *(*sizes, partial.shape[0], *dy.stride()),
        ),
        constants,
        num_warps=config.num_warps,
    )
    return dz


def launch_reduce_norm_grad(
    dr: torch.Tensor,
    r: torch.Tensor,
    norm: torch.Tensor,
    partial3: torch.Tensor,
    partial5: torch.Tensor,
    widths: tuple[int, int],
    dgammas: list[torch.Tensor | None],
    dbetas: list[torch.Tensor | None],
    config: NormConfig,
    finish: FinishConfig,
) -> torch.Tensor:
    """Turn `dr` as launch L1 left it into the gradient of the raw reduced maps `r`, in place.

    Returns relu(batch norm(r)), like `r`. norm: [4, channels] from the 3x3 reduce on; partial3,
    partial5: of launch L1; widths, dgammas, dbetas: of 3x3 and 5x5 reduce.
    """
    n, slots, height, width = r.shape
    n_pixels = n * height * width
    activated = torch.empty_like(r)
    r3, r5 = widths
    slots3 = align_up(r3)
    chunk = even_share(n_pixels, config.pixels, config.block_p)
    if sums_in_stages(n_pixels):
        partial3 = partial5 = _summed([(partial3, 0, slots3), (partial5, slots3, slots)], finish)
    run(
        _reduce_norm_grad_kernel,
        (cdiv(n_pixels, chunk), cdiv(slots, config.block_c)),
        (
            *(dr, r, norm, partial3, partial5, activated, *dgammas, *dbetas),
            *(n_pixels, chunk, partial3.shape[0], partial5.shape[0]),
        ),
        dict(
            R3=r3,
            R5=r5,
            S3R=slots3,
            SR=slots,
            NORM_STRIDE=norm.stride(0),
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )
    return activated

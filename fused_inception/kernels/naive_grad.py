"""The naive module backward, behind launch M: the gradient of x in one launch, the three filter
gradients in another, to be finished by a third."""

import functools

import torch
import triton
import triton.language as tl

from fused_inception.geometry import NaiveDims, align_up
from fused_inception.kernels.conv import convolve_onto
from fused_inception.kernels.finish import BiasSum, FilterSum, Sums, Unfinished
from fused_inception.kernels.input_grad import gather_pool
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.naive import naive_constants
from fused_inception.kernels.tiles import tap_validity
from fused_inception.kernels.wgrad import PartialFilters, group_splits, wgrad_tile
from fused_inception.tuning.configs import InputGradConfig, NaiveWgradConfig


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "dp_stride8"])
def _naive_input_grad_kernel(
    # tensors
    dz_ptr,  # [P, S1 + S3 + S5] masked gradient
    dp_ptr,  # [P, dp_stride] gradient of the pool branch
    index_ptr,  # [P, S_IN] uint8, winning tap of each window
    # packed for the data gradients: [S_IN, S1], then [S_IN, 9, S3], then [S_IN, 25, S5]
    w_ptr,
    dx_ptr,  # [P, C_IN]
    # sizes
    n_pixels,
    height,
    width,
    # strides
    dp_stride8,
    # problem
    C_IN: tl.constexpr,
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx[p, i] = sum of dp over windows that p won + sum over filters, taps and o of
    dz[p - tap, o] * w[o, tap, i]; one program per tile of dx, one accumulator for all."""
    TILES_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    SLOTS: tl.constexpr = S1 + S3 + S5
    pid_p = tl.program_id(0) // TILES_CI
    pid_ci = tl.program_id(0) % TILES_CI
    local_p = tl.arange(0, BLOCK_P)
    offs_p = pid_p * BLOCK_P + local_p
    offs_ci = pid_ci * BLOCK_CI + tl.arange(0, BLOCK_CI)
    p0 = (pid_p * BLOCK_P).to(tl.int64)
    dp_stride = dp_stride8 * 8
    dz_tile_ptr = dz_ptr + p0 * SLOTS

    acc = gather_pool(
        dp_ptr + p0 * dp_stride, index_ptr + p0 * S_IN,
        tap_validity(offs_p, n_pixels, height, width, 3),
        pid_ci, width, dp_stride, S_IN, BLOCK_P, BLOCK_CI,
    )  # fmt: skip
    # with the taps backwards each data gradient is a convolution of dz
    acc = convolve_onto(
        acc, dz_tile_ptr, w_ptr, tap_validity(offs_p, n_pixels, height, width, 1),
        pid_ci * BLOCK_CI, width, SLOTS, 1, S1, S_IN, PRECISION,
        BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    acc = convolve_onto(
        acc, dz_tile_ptr + S1, w_ptr + S1 * S_IN,
        tap_validity(offs_p, n_pixels, height, width, 3),
        pid_ci * BLOCK_CI, width, SLOTS, 3, S3, S_IN, PRECISION,
        BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    acc = convolve_onto(
        acc, dz_tile_ptr + (S1 + S3), w_ptr + (S1 + 9 * S3) * S_IN,
        tap_validity(offs_p, n_pixels, height, width, 5),
        pid_ci * BLOCK_CI, width, SLOTS, 5, S5, S_IN, PRECISION,
        BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip
    dx_mask = (offs_p < n_pixels)[:, None] & (offs_ci < C_IN)[None, :]
    dx_offs = (local_p * C_IN)[:, None] + offs_ci[None, :]
    tl.store(dx_ptr + p0 * C_IN + dx_offs, acc.to(dx_ptr.dtype.element_ty), mask=dx_mask)


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "end5", "end3", "chunk5", "chunk3", "chunk1",
        "start3", "start1", "x_stride8",
    ]
)  # fmt: skip
def _naive_wgrad_kernel(
    # tensors
    x_ptr,  # [P, x_stride]
    dz_ptr,  # [P, S1 + S3 + S5]
    out_ptr,  # partial sums of all groups, fp32
    # sizes
    n_pixels,
    height,
    width,
    end5,  # first program behind each group
    end3,
    chunk5,  # pixels of one split of each group
    chunk3,
    chunk1,
    start3,  # first element of each group in out, in units of 64
    start1,
    # strides
    x_stride8,
    # problem
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    M1: tl.constexpr,
    N1: tl.constexpr,
    P1: tl.constexpr,
    M3: tl.constexpr,
    N3: tl.constexpr,
    P3: tl.constexpr,
    M5: tl.constexpr,
    N5: tl.constexpr,
    P5: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: 5x5, 3x3, 1x1; a group that is not needed has no programs."""
    pid = tl.program_id(0)
    x_stride = x_stride8 * 8
    SLOTS: tl.constexpr = S1 + S3 + S5
    if pid < end5:
        wgrad_tile(
            x_ptr, dz_ptr + (S1 + S3), out_ptr,
            pid, chunk5, n_pixels, height, width, x_stride, SLOTS,
            5, S_IN, S5, False, PRECISION, M5, N5, P5, NUM_STAGES,
        )  # fmt: skip
    elif pid < end3:
        wgrad_tile(
            x_ptr, dz_ptr + S1, out_ptr + start3.to(tl.int64) * 64,
            pid - end5, chunk3, n_pixels, height, width, x_stride, SLOTS,
            3, S_IN, S3, False, PRECISION, M3, N3, P3, NUM_STAGES,
        )  # fmt: skip
    else:
        wgrad_tile(
            x_ptr, dz_ptr, out_ptr + start1.to(tl.int64) * 64,
            pid - end3, chunk1, n_pixels, height, width, x_stride, SLOTS,
            1, S_IN, S1, False, PRECISION, M1, N1, P1, NUM_STAGES,
        )  # fmt: skip


def launch_naive_input_grad(
    dims: NaiveDims,
    dz: torch.Tensor,
    dp: torch.Tensor,
    index: torch.Tensor,
    packed_w: torch.Tensor,
    dx: torch.Tensor,
    config: InputGradConfig,
    *,
    precision: str,
) -> None:
    """Fill `dx`, [N, C_IN, H, W] exactly channels last.

    dz: [N, slot_channels, H, W] of launch M; dp: the gradient of the pool branch, [N, slots of
    C_IN, H, W] as `layout.for_kernels` gives it; index: uint8, [N, slots of C_IN, H, W].
    """
    n, c_in, height, width = dx.shape
    n_pixels = n * height * width
    tile = config.gemm
    run(
        _naive_input_grad_kernel,
        (cdiv(n_pixels, tile.block_m) * cdiv(c_in, tile.block_n),),
        (dz, dp, index, packed_w, dx, n_pixels, height, width, dp.stride(3) // 8),
        dict(
            C_IN=c_in,
            **naive_constants(dims),
            PRECISION=precision,
            BLOCK_P=tile.block_m,
            BLOCK_CI=tile.block_n,
            BLOCK_CO=tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )


def launch_naive_wgrad(
    dims: NaiveDims,
    x: torch.Tensor,
    dz: torch.Tensor,
    config: NaiveWgradConfig,
    *,
    groups: frozenset[str],
    precision: str,
) -> PartialFilters:
    """Partial filter gradients of the groups asked for: of "conv1", "conv3", "conv5".

    Each group is [splits, filter positions (tap, channel), output channels] in fp32, channels
    padded to slots.
    """
    n, s_in, height, width = x.shape
    n_pixels = n * height * width
    slots = naive_constants(dims)
    jobs = {
        "conv5": (config.conv5, 25 * s_in, slots["S5"]),
        "conv3": (config.conv3, 9 * s_in, slots["S3"]),
        "conv1": (config.conv1, s_in, slots["S1"]),
    }
    splits = group_splits(jobs, n_pixels, groups)
    buffer = torch.empty(splits.elements, dtype=torch.float32, device=x.device)
    starts = [start // 64 for start, _ in splits.placed.values()]
    run(
        _naive_wgrad_kernel,
        (splits.ends[-1],),
        (
            x,
            dz,
            buffer,
            n_pixels,
            height,
            width,
            *splits.ends[:-1],
            *splits.chunks,
            *starts[1:],
            x.stride(3) // 8,
        ),
        dict(
            **slots,
            PRECISION=precision,
            M1=config.conv1.tile.block_m,
            N1=config.conv1.tile.block_n,
            P1=config.conv1.tile.block_k,
            M3=config.conv3.tile.block_m,
            N3=config.conv3.tile.block_n,
            P3=config.conv3.tile.block_k,
            M5=config.conv5.tile.block_m,
            N5=config.conv5.tile.block_n,
            P5=config.conv5.tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    return PartialFilters(buffer, splits.placed)


def naive_unfinished(
    dims: NaiveDims,
    partial_filters: PartialFilters,
    partial: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
) -> Unfinished:
    """What launch F makes the three filter and three bias gradients of; those with no elements are
    not needed. partial: [rows, slots] column sums of dz."""
    where = partial_filters.of("conv1", "conv3", "conv5")
    return Unfinished(_sums(dims), filter_grads, *where, bias_grads, [partial] * 3)


@functools.lru_cache(maxsize=1024)
def _sums(dims: NaiveDims) -> Sums:
    return Sums(
        tuple(
            FilterSum(c_out, c_in, k * k, align_up(c_in), align_up(c_out), 0)
            for c_out, c_in, k, _ in dims.filter_shapes
        ),
        tuple(
            BiasSum(c_out, dims.slot_channels, slot)
            for c_out, slot in zip(dims.conv_widths, dims.slots, strict=True)
        ),
    )

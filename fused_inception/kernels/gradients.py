"""Launches L2 and L3 of a module: the gradient of x and partial sums of all six filter gradients,
together or apart."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.finish import BiasSum, FilterSum, Sums, Unfinished
from fused_inception.kernels.input_grad import input_grad_tile
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.wgrad import GroupedSplits, PartialFilters, group_splits, wgrad_tile
from fused_inception.tuning.configs import InputGradConfig, WgradConfig, WgradJob


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "x_stride8",
        "end3", "end1", "end_r", "end5", "end_p",
        "chunk3", "chunk1", "chunk_r", "chunk5", "chunk_p",
        "start1", "start_r", "start5", "start_p",
    ]
)  # fmt: skip
def _gradients_kernel(
    # tensors
    dz_ptr,  # [P, DZ_STRIDE] masked gradient, 1x1 branch first
    dr_ptr,  # [P, S3R + S5R] gradients of both reduced maps
    index_ptr,  # [P, S_IN] uint8, winning tap of each window
    # of the filters, None without
    x_ptr,  # [P, x_stride]
    r_ptr,  # [P, S3R + S5R]
    filters_ptr,  # partial sums of all groups, fp32
    # of the input, None without
    dp_ptr,  # [P, S_IN] gradient of the pooled map
    w_ptr,  # [S_IN, S1 + S3R + S5R] packed for the data gradients
    # of the module whose output x is, else None; C_IN is a multiple of 8 then
    mask_ptr,  # [P, C_IN / 8] uint8, its ReLU bits
    other_ptr,  # [P, C_IN] what others than this module add to the gradient of x, or None
    dx_ptr,  # [P, C_IN]
    sums_ptr,  # [tiles of pixels, C_IN] fp32, with a mask
    # sizes
    n_pixels,
    height,
    width,
    end3,  # first program behind each group
    end1,
    end_r,
    end5,
    end_p,
    chunk3,  # pixels of one split of each group
    chunk1,
    chunk_r,
    chunk5,
    chunk_p,
    start1,  # first element of each group in filters, in units of 64
    start_r,
    start5,
    start_p,
    # strides
    x_stride8,
    # problem
    INPUT: tl.constexpr,
    FILTERS: tl.constexpr,
    C_IN: tl.constexpr,
    S_IN: tl.constexpr,
    S1: tl.constexpr,
    S3R: tl.constexpr,
    S3: tl.constexpr,
    S5R: tl.constexpr,
    S5: tl.constexpr,
    SP: tl.constexpr,
    K5: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    DZ_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile, of the input
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    INPUT_STAGES: tl.constexpr,
    # tiles of the groups of filters
    M3: tl.constexpr,
    N3: tl.constexpr,
    P3: tl.constexpr,
    M1: tl.constexpr,
    N1: tl.constexpr,
    P1: tl.constexpr,
    MR: tl.constexpr,
    NR: tl.constexpr,
    PR: tl.constexpr,
    M5: tl.constexpr,
    N5: tl.constexpr,
    P5: tl.constexpr,
    MP: tl.constexpr,
    NP: tl.constexpr,
    PP: tl.constexpr,
    FILTER_STAGES: tl.constexpr,
):
    """Program ranges: projection, 3x3, 1x1 branch, both reduces, 5x5, tiles of dx; a group that is
    not needed has no programs.

    The projection's maxima take longer than the products of the others, so it begins first.
    """
    pid = tl.program_id(0)
    SR: tl.constexpr = S3R + S5R
    if INPUT:
        if pid >= end_p:
            input_grad_tile(
                dz_ptr, dr_ptr, dp_ptr, index_ptr, w_ptr, mask_ptr, other_ptr, dx_ptr, sums_ptr,
                pid - end_p, n_pixels, height, width, C_IN, S_IN, S1, SR, DZ_STRIDE, PRECISION,
                BLOCK_P, BLOCK_CI, BLOCK_CO, INPUT_STAGES,
            )  # fmt: skip
    if FILTERS:
        if pid < end_p:
            # its results lie behind the others': ends and starts count it last
            pid += end5
            pid -= tl.where(pid >= end_p, end_p, 0)
            x_stride = x_stride8 * 8
            # side by side: of one inside the other Triton 3.8 shares no shared memory
            if pid < end3:
                wgrad_tile(
                    r_ptr, dz_ptr + SLOT_3, filters_ptr,
                    pid, chunk3, n_pixels, height, width, SR, DZ_STRIDE,
                    3, S3R, S3, False, PRECISION, M3, N3, P3, FILTER_STAGES,
                )  # fmt: skip
            if (pid >= end3) & (pid < end1):
                wgrad_tile(
                    x_ptr, dz_ptr, filters_ptr + start1.to(tl.int64) * 64,
                    pid - end3, chunk1, n_pixels, height, width, x_stride, DZ_STRIDE,
                    1, S_IN, S1, False, PRECISION, M1, N1, P1, FILTER_STAGES,
                )  # fmt: skip
            if (pid >= end1) & (pid < end_r):
                wgrad_tile(
                    x_ptr, dr_ptr, filters_ptr + start_r.to(tl.int64) * 64,
                    pid - end1, chunk_r, n_pixels, height, width, x_stride, SR,
                    1, S_IN, SR, False, PRECISION, MR, NR, PR, FILTER_STAGES,
                )  # fmt: skip
            if (pid >= end_r) & (pid < end5):
                wgrad_tile(
                    r_ptr + S3R, dz_ptr + SLOT_5, filters_ptr + start5.to(tl.int64) * 64,
                    pid - end_r, chunk5, n_pixels, height, width, SR, DZ_STRIDE,
                    K5, S5R, S5, False, PRECISION, M5, N5, P5, FILTER_STAGES,
                )  # fmt: skip
            if pid >= end5:
                wgrad_tile(
                    x_ptr, dz_ptr + SLOT_P, filters_ptr + start_p.to(tl.int64) * 64,
                    pid - end5, chunk_p, n_pixels, height, width, x_stride, DZ_STRIDE,
                    1, S_IN, SP, True, PRECISION, MP, NP, PP, FILTER_STAGES,
                )  # fmt: skip


@dataclass(frozen=True)
class InputGradient:
    """What launch L2 reads beside dz, dr and index, fills, and is cut into.

    Attributes:
        dp: gradient of the pooled map, of launch L1.
        w: filters packed for the data gradients.
        dx: to be filled, [N, C_IN, H, W] exactly channels last; with `mask`, the ReLU bits [P, C_IN
            / 8] of the module whose output x is, the gradient behind that ReLU.
        config: tile and depth.
        other: exactly channels last, added to the gradient in front of the mask, or None.
    """

    dp: torch.Tensor
    w: torch.Tensor
    dx: torch.Tensor
    config: InputGradConfig
    mask: torch.Tensor | None = None
    other: torch.Tensor | None = None

    @property
    def pixel_tiles(self) -> int:
        """Tiles of pixels."""
        n, _, height, width = self.dx.shape
        return cdiv(n * height * width, self.config.gemm.block_m)

    @functools.cached_property
    def sums(self) -> torch.Tensor:
        """To be filled with the column sums over each tile of pixels, [tiles, C_IN]; none without a
        mask."""
        tiles = 0 if self.mask is None else self.pixel_tiles
        return self.dx.new_empty((tiles, self.dx.shape[1]), dtype=torch.float32)


@dataclass(frozen=True)
class FilterGradients:
    """What launch L3 reads beside dz and dr, computes, and is cut into.

    Attributes:
        x: input of the module, as `layout.for_kernels` gives it.
        r: both reduced maps behind their ReLU.
        groups: of "conv3", "branch1", "reduces", "conv5", "projection".
        config: tiles and splits of each.
    """

    x: torch.Tensor
    r: torch.Tensor
    groups: frozenset[str]
    config: WgradConfig


def launch_gradients(
    dims: InceptionDims,
    dz: torch.Tensor,
    dr: torch.Tensor,
    index: torch.Tensor,
    of_input: InputGradient | None,
    of_filters: FilterGradients | None,
    *,
    precision: str,
) -> PartialFilters:
    """The gradient of x, partial filter gradients, or in one launch both.

    dz, dr, index: of launches M, L1 and A, [N, channels, H, W] channels last.

    Returns the groups of partial filter gradients: each [splits, filter positions (tap, channel),
    output channels] in fp32, channels padded to slots.
    """
    n, _, height, width = dz.shape
    n_pixels = n * height * width
    splits, sizes, constants, num_warps = _plan(
        dims, n_pixels, None if of_input is None else of_input.config,
        None if of_filters is None else of_filters.config,
        frozenset() if of_filters is None else of_filters.groups, precision,
    )  # fmt: skip
    buffer = torch.empty(splits.elements, dtype=torch.float32, device=dz.device)
    programs, stride8 = sizes[4], 0
    tensors: list[torch.Tensor | None] = [None] * 9
    if of_filters is not None:
        tensors[:3] = of_filters.x, of_filters.r, buffer
        stride8 = of_filters.x.stride(3) // 8
    if of_input is not None:
        of = of_input
        tensors[3:] = of.dp, of.w, of.mask, of.other, of.dx, of.sums
        programs += of.pixel_tiles * cdiv(dims.in_channels, of.config.gemm.block_n)
    run(
        _gradients_kernel,
        (programs,),
        (dz, dr, index, *tensors, n_pixels, height, width, *sizes, stride8),
        constants,
        num_warps=num_warps,
    )
    return PartialFilters(buffer, splits.placed)


@functools.lru_cache(maxsize=1024)
def _plan(
    dims: InceptionDims,
    n_pixels: int,
    input_config: InputGradConfig | None,
    filter_config: WgradConfig | None,
    groups: frozenset[str],
    precision: str,
) -> tuple[GroupedSplits, tuple[int, ...], dict[str, Any], int]:
    """Program ranges of the filters; their sizes as the kernel takes them; constants, warps."""
    s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
    jobs = {} if filter_config is None else _jobs(dims, filter_config)
    splits = group_splits(jobs, n_pixels, groups)
    starts = [start // 64 for start, _ in splits.placed.values()]
    constants = dict(
        INPUT=input_config is not None,
        FILTERS=len(groups) > 0,
        C_IN=dims.in_channels,
        S_IN=align_up(dims.in_channels),
        S1=s1,
        S3R=align_up(dims.ch3x3red),
        S3=s3,
        S5R=align_up(dims.ch5x5red),
        S5=s5,
        SP=sp,
        K5=dims.kernel_5x5,
        SLOT_3=dims.slots[1],
        SLOT_5=dims.slots[2],
        SLOT_P=dims.slots[3],
        DZ_STRIDE=dims.slot_channels,
        PRECISION=precision,
        **dict.fromkeys(("BLOCK_P", "BLOCK_CI", "BLOCK_CO", "INPUT_STAGES", "FILTER_STAGES"), 0),
        **{f"{side}{group}": 0 for group in _LETTERS.values() for side in "MNP"},
    )
    num_warps = 0
    if input_config is not None:
        tile = input_config.gemm
        constants |= dict(
            BLOCK_P=tile.block_m,
            BLOCK_CI=tile.block_n,
            BLOCK_CO=tile.block_k,
            INPUT_STAGES=input_config.num_stages,
        )
        num_warps = input_config.num_warps
    if filter_config is not None and groups:
        for name, (job, _, _) in jobs.items():
            sides = job.tile.block_m, job.tile.block_n, job.tile.block_k
            constants |= {f"{s}{_LETTERS[name]}": n for s, n in zip("MNP", sides, strict=True)}
        constants["FILTER_STAGES"] = filter_config.num_stages
        num_warps = max(num_warps, filter_config.num_warps)
    sizes = (*(splits.ends or [0] * 5), *(splits.chunks or [1] * 5), *(starts[1:] or [0] * 4))
    return splits, sizes, constants, num_warps


# group -> how its tile is called
_LETTERS = {"conv3": "3", "branch1": "1", "reduces": "R", "conv5": "5", "projection": "P"}


def _jobs(dims: InceptionDims, config: WgradConfig) -> dict[str, tuple[WgradJob, int, int]]:
    """Name -> (job, rows, columns), in the order of the program ranges."""
    s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
    s_in, s3r, s5r = map(align_up, (dims.in_channels, dims.ch3x3red, dims.ch5x5red))
    return {
        "conv3": (config.conv3, 9 * s3r, s3),
        "branch1": (config.branch1, s_in, s1),
        "reduces": (config.reduces, s_in, s3r + s5r),
        "conv5": (config.conv5, dims.kernel_5x5**2 * s5r, s5),
        "projection": (config.projection, s_in, sp),
    }


@functools.lru_cache(maxsize=1024)
def partial_bytes(dims: InceptionDims, config: WgradConfig) -> int:
    """Of all partial sums, fp32, for as many pixels as the configuration is for."""
    jobs = _jobs(dims, config).values()
    return 4 * sum(job.splits * rows * columns for job, rows, columns in jobs)


def unfinished(
    dims: InceptionDims,
    partial_filters: PartialFilters,
    partial_m: torch.Tensor,
    partial3: torch.Tensor,
    partial5: torch.Tensor,
    filter_grads: list[torch.Tensor],
    bias_grads: list[torch.Tensor],
) -> Unfinished:
    """What launch F makes the six filter and six bias gradients of; those with no elements are not
    needed.

    partial_m: [rows, slots] column sums of dz; partial3 and partial5: [rows, reduced channels],
    those of dr behind the 3x3 and the 5x5 branch.
    """
    return Unfinished(
        _sums(dims), filter_grads,
        *partial_filters.of("branch1", "reduces", "conv3", "reduces", "conv5", "projection"),
        bias_grads, (partial_m, partial3, partial_m, partial5, partial_m, partial_m),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _sums(dims: InceptionDims) -> Sums:
    c_in, s_in = dims.in_channels, align_up(dims.in_channels)
    r3, r5, reduced = dims.ch3x3red, dims.ch5x5red, dims.reduced_channels
    s3r, s5r = align_up(r3), align_up(r5)
    s1, s3, s5, sp = map(align_up, dims.branch_widths)
    n1, n3, n5, np = dims.branch_widths
    _, slot3, slot5, slot_p = dims.slots
    return Sums(
        filters=(
            FilterSum(n1, c_in, 1, s_in, s1, 0),
            FilterSum(r3, c_in, 1, s_in, reduced, 0),
            FilterSum(n3, r3, 9, s3r, s3, 0),
            FilterSum(r5, c_in, 1, s_in, reduced, s3r),
            FilterSum(n5, r5, dims.kernel_5x5**2, s5r, s5, 0),
            FilterSum(np, c_in, 1, s_in, sp, 0),
        ),
        biases=(
            BiasSum(n1, dims.slot_channels, 0),
            BiasSum(r3, reduced, 0),
            BiasSum(n3, dims.slot_channels, slot3),
            BiasSum(r5, reduced, s3r),
            BiasSum(n5, dims.slot_channels, slot5),
            BiasSum(np, dims.slot_channels, slot_p),
        ),
    )

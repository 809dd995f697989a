"""The script of the module with BatchNorm in training, on the Triton path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception.geometry import align_up, sums_in_stages
from fused_inception.kernels.batch_norm import NormParameters, launch_batch_statistics
from fused_inception.kernels.batch_norm_grad import launch_norm_grad, launch_reduce_norm_grad
from fused_inception.kernels.finish import launch_finish
from fused_inception.kernels.launch import cdiv
from fused_inception.kernels.layout import PackedLayout
from fused_inception.kernels.moments import Moments, merged_moments
from fused_inception.kernels.normalise import Finish, launch_normalise
from fused_inception.kernels.pack import launch_pack, module_packing
from fused_inception.kernels.pointwise import launch_pointwise
from fused_inception.ops import library_triton
from fused_inception.ops.inception_triton import (
    input_and_filter_gradients,
    packed_for_gradients,
)
from fused_inception.ops.layout import dims_of, empty_channels_last, for_kernels
from fused_inception.ops.problem import problem_of
from fused_inception.ops.replay import replayed
from fused_inception.ops.running import Running
from fused_inception.tuning import chosen, dispatch, heuristic
from fused_inception.tuning.chosen import norm_config
from fused_inception.tuning.norm_heuristic import merge_config, statistics_config


@replayed
def forward(
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C_OUT, H, W] exactly channels last, and what `saved_like` describes.

    Five launches beside the packing: the 1x1 convolutions and the pool branch, their statistics, a
    pass that normalises the reduced maps, the 3x3 and 5x5, a pass that takes their statistics and
    normalises into the concatenation. Running statistics are updated on the way. Where tiles are
    many, two more merge them in groups.
    """
    dims = dims_of(filters)
    layout = PackedLayout(dims)
    n, _, height, width = x.shape
    ops, target, pixels = problem_of(x)
    n_pixels = n * height * width
    ((w, b),) = launch_pack([module_packing(dims)], filters, [], x.dtype)
    r, z, index, norm = saved = saved_like(x, filters)
    a_config = chosen.pointwise_config(dims, pixels, ops, target, True, norm=True)
    b_config = chosen.branches_config(dims, pixels, ops, target, norm=True)

    def moments(pixels_of_tile: int, channels: int) -> Moments:
        shape = (cdiv(n_pixels, pixels_of_tile), 3, align_up(channels))
        return Moments(torch.empty(shape, dtype=torch.float32, device=x.device), pixels_of_tile)

    layers = norm_parameters(filters, gammas, betas, running)
    first = moments(a_config.gemm.block_m, layout.cat_rows)
    pool = moments(a_config.pool.block_m, dims.pool_proj)
    many = sums_in_stages(n_pixels)
    launch_pointwise(
        dims, for_kernels(x), w, b, z, r, index, z, a_config,
        save=True, precision=ops.precision, moments=(first.partial, pool.partial),
    )  # fmt: skip
    if many:
        first, pool = merged_moments(first, pool, n_pixels, merge_config())
    launch_batch_statistics(
        norm, (first, [layers[0], layers[1], layers[3]]), (pool, layers[5], layout.bp),
        n_pixels, statistics_config(), momentum=running.momentum or 0.0, eps=eps, skip=running.skip,
    )  # fmt: skip
    # in a pass of its own: normalised on load, the 3x3 would issue twice as many instructions
    activated = torch.empty_like(r)
    launch_normalise(
        (dims.reduced_channels,), r, norm[:, layout.r3 :], 0, activated,
        norm_config(dims.reduced_channels, pixels, target),
    )  # fmt: skip
    three = moments(b_config.conv3.block_m, dims.ch3x3)
    five = moments(b_config.conv5.block_m, dims.ch5x5)
    library_triton.branches(
        dispatch.module_plan(dims, pixels, ops, target, norm=True),
        dims, activated, w, b, z, z, b_config,
        save=False, precision=ops.precision, moments=(three.partial, five.partial),
    )  # fmt: skip
    if many:
        three, five = merged_moments(three, five, n_pixels, merge_config())
    y = empty_channels_last(n, dims.out_channels, height, width, dtype=x.dtype, device=x.device)
    launch_normalise(
        dims.branch_widths, z, norm, dims.reduced_channels, y,
        norm_config(dims.slot_channels, pixels, target),
        Finish((three, five), (layers[2], layers[4]), running.momentum or 0.0, eps, running.skip),
    )  # fmt: skip
    return y, saved


def norm_parameters(
    filters: list[Tensor], gammas: list[Tensor], betas: list[Tensor], running: Running
) -> list[NormParameters]:
    """What the kernels are told of the BatchNorm behind each filter."""
    return [
        NormParameters(
            f.shape[0],
            gammas[i].contiguous() if gammas else None,
            betas[i].contiguous() if betas else None,
            *running.of(i),
        )
        for i, f in enumerate(filters)
    ]


def saved_like(x: Tensor, filters: list[Tensor]) -> list[Tensor]:
    """Empty tensors of the shapes and strides that `forward` saves beside x and the filters.

    Raw results of both reduces and of the four branches, channels padded to slots; the winning tap
    of each pooling window, 1 byte; mean, inverse deviation, scale and beta of all channels, fp32.
    """
    dims = dims_of(filters)
    n, c_in, height, width = x.shape

    def scratch(channels: int, dtype: torch.dtype) -> Tensor:
        return empty_channels_last(n, channels, height, width, dtype=dtype, device=x.device)

    channels = PackedLayout(dims).bias_elements
    return [
        scratch(dims.reduced_channels, x.dtype),
        scratch(dims.slot_channels, x.dtype),
        scratch(align_up(c_in), torch.uint8),
        x.new_empty((4, channels), dtype=torch.float32),
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    gammas: list[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, six filters, six gammas and six betas; 0 elements where `needs` says no.

    dy: [N, C_OUT, H, W] in the dtype of x, any strides. Seven launches beside the packing, six
    where maps are small, nine where tiles are many.
    """
    dims = dims_of(filters)
    layout = PackedLayout(dims)
    r, z, index, norm = saved
    ops, target, pixels = problem_of(x)
    need_x, need_w, need_gamma, need_beta = needs[0], needs[1:7], needs[7:13], needs[13:]
    trained = [any(of) for of in zip(need_w, need_gamma, need_beta, strict=True)]
    reduce3, reduce5 = need_x or trained[1], need_x or trained[3]
    like = gammas or [norm[0, : f.shape[0]] for f in filters]
    dgammas, dbetas = (
        [torch.empty_like(p) if need else None for p, need in zip(like, of, strict=True)]
        for of in (need_gamma, need_beta)
    )
    branches, reduces = (0, 2, 4, 5), (1, 3)

    dz = launch_norm_grad(
        dims.branch_widths, dy, z, norm, dims.reduced_channels,
        [dgammas[i] for i in branches], [dbetas[i] for i in branches],
        norm_config(dims.slot_channels, pixels, target), heuristic.finish_config(),
    )  # fmt: skip
    gradient = library_triton.MaskedGradient(
        dispatch.module_plan(dims, pixels, ops, target, norm=True), dims, dz
    )
    dr, dp, activated, w = r, index, r, None
    partial3 = partial5 = norm.new_empty((0, 2, dims.reduced_channels))
    if reduce3 or reduce5:
        (w,) = packed_for_gradients([dims], [filters], x.dtype)
        dr, dp, partial3, partial5 = library_triton.dgrad(
            dims, gradient, w, r,
            chosen.dgrad_config(dims, pixels, ops, target, norm=True),
            reduce3=reduce3, reduce5=reduce5, pooled=need_x, precision=ops.precision, norm=norm,
        )  # fmt: skip
    elif need_w[2] or need_w[4]:
        dr = torch.zeros_like(r)
    if dr is not r:
        activated = launch_reduce_norm_grad(
            dr, r, norm[:, layout.r3 :], partial3, partial5, (dims.ch3x3red, dims.ch5x5red),
            [dgammas[i] for i in reduces], [dbetas[i] for i in reduces],
            norm_config(dims.reduced_channels, pixels, target), heuristic.finish_config(),
        )  # fmt: skip
    # behind a BatchNorm there is no bias
    none = norm[:0]
    found = input_and_filter_gradients(
        dims, x, index, activated, gradient, dr, (dp, w) if need_x else None, (none, none, none),
        filters, need_w, [x.new_empty(0)] * len(filters),
    )  # fmt: skip
    launch_finish(found.unfinished, heuristic.finish_config())
    empty = norm.new_empty(0)
    vectors = [empty if g is None else g for g in (*dgammas, *dbetas)]
    return [found.dx, *found.parameters, *vectors]

"""The script of the module on the Triton path: which launches run, in which order, on which scratch
tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.finish import launch_finish
from fused_inception.kernels.input_grad import launch_input_grad
from fused_inception.kernels.pack import launch_pack
from fused_inception.kernels.pointwise import launch_pointwise
from fused_inception.kernels.relu_mask import launch_relu_mask
from fused_inception.kernels.wgrad import launch_wgrad
from fused_inception.ops import filter_cache, library_triton
from fused_inception.ops.layout import (
    empty_channels_last,
    empty_filter_grads,
    for_kernels,
)
from fused_inception.ops.problem import dims_of, problem_of
from fused_inception.tuning import chosen, dispatch, heuristic


def forward(
    x: torch.Tensor, filters: list[torch.Tensor], biases: list[torch.Tensor], save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y [N, C_OUT, H, W] exactly channels last, and with `save` what `backward` needs beside x and
    the filters.

    x: [N, C_IN, H, W], read in place where `layout.why_not_in_place` has no objection, else copied
    once. Filters and biases in any floating dtype.

    Saved: r, both reduced maps; the winning tap of each pooling window, 1 byte; the ReLU mask of y,
    1 bit.
    """
    dims = dims_of(filters)
    n, _, height, width = x.shape
    ops, target, pixels = problem_of(x)
    w, b = filter_cache.packed(
        filters, biases, x.dtype, lambda: launch_pack(dims, filters, biases, x.dtype), save=save
    )
    y = empty_channels_last(n, dims.out_channels, height, width, dtype=x.dtype, device=x.device)
    if save:
        r, index, mask = saved_like(x, dims)
    else:
        r, index = _reduced_like(x, dims), x.new_empty(0, dtype=torch.uint8)
        mask = index
    launch_pointwise(
        dims, for_kernels(x), w, b, y, r, index, mask,
        chosen.pointwise_config(dims, pixels, ops, target, save),
        save=save, precision=ops.precision,
    )  # fmt: skip
    library_triton.branches(
        dispatch.module_plan(dims, pixels, ops, target), dims, r, w, b, y, mask,
        chosen.branches_config(dims, pixels, ops, target),
        save=save, precision=ops.precision,
    )  # fmt: skip
    return y, [r, index, mask] if save else []


def saved_like(x: torch.Tensor, dims: InceptionDims) -> list[torch.Tensor]:
    """Empty tensors of the shapes and strides that `forward` saves."""
    n, c_in, height, width = x.shape
    index = empty_channels_last(
        n, align_up(c_in), height, width, dtype=torch.uint8, device=x.device
    )
    mask = x.new_empty((n * height * width, dims.slot_channels // 8), dtype=torch.uint8)
    return [_reduced_like(x, dims), index, mask]


def _reduced_like(x: torch.Tensor, dims: InceptionDims) -> torch.Tensor:
    n, _, height, width = x.shape
    channels = dims.reduced_channels
    return empty_channels_last(n, channels, height, width, dtype=x.dtype, device=x.device)


@dataclass(frozen=True)
class Masked:
    """The gradient behind the ReLU of a module: dz, [N, slots, H, W] channels last, 0 where the
    output was not above 0, and its column sums over some chunks of pixels each."""

    dz: torch.Tensor
    sums: torch.Tensor


@dataclass(frozen=True)
class ReluBelow:
    """The ReLU of the module whose output x is: its mask, and what others than this module add to
    the gradient in front of it, exactly channels last."""

    mask: torch.Tensor
    other: torch.Tensor | None = None


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    saved: list[torch.Tensor],
    filters: list[torch.Tensor],
    biases_dtype: list[torch.dtype],
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of x, six filters, six biases; 0 elements where `needs` says no.

    dy: [N, C_OUT, H, W] in the dtype of x, any strides. dx comes exactly channels last; a filter's
    gradient in the strides of the filter where those are contiguous or channels last.
    """
    _, _, mask = saved
    masked = mask_gradient(dims_of(filters), dy, mask)
    dx, _, gradients = backward_of_masked(masked, x, saved, filters, biases_dtype, needs)
    return [dx, *gradients]


def mask_gradient(dims: InceptionDims, dy: torch.Tensor, mask: torch.Tensor) -> Masked:
    """Launch M, for a `dy` of any strides."""
    _, target, pixels = problem_of(dy)
    config = chosen.mask_config(dims.slot_channels, pixels, target)
    return Masked(*launch_relu_mask(dims.branch_widths, dy, mask, config))


def backward_of_masked(
    masked: Masked,
    x: torch.Tensor,
    saved: list[torch.Tensor],
    filters: list[torch.Tensor],
    biases_dtype: list[torch.dtype],
    needs: list[bool],
    below: ReluBelow | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """All launches of `backward` but M.

    Returns dx, with a ReLU `below` the gradient behind that; its column sums over some chunks of
    pixels each, which there are only then; the gradients of the parameters.
    """
    dims = dims_of(filters)
    r, index, _ = saved
    dz, partial_m = masked.dz, masked.sums
    ops, target, pixels = problem_of(x)
    need_x, need_w, need_b = needs[0], needs[1:7], needs[7:]
    reduce3 = need_x or need_w[1] or need_b[1]
    reduce5 = need_x or need_w[3] or need_b[3]

    gradient = library_triton.MaskedGradient(
        dispatch.module_plan(dims, pixels, ops, target), dims, dz
    )
    dr, dp, partial3, partial5 = r, index, partial_m, partial_m
    w = None
    if reduce3 or reduce5:
        w, _ = launch_pack(dims, filters, None, x.dtype)
        dr, dp, partial3, partial5 = library_triton.dgrad(
            dims, gradient, w, r,
            chosen.dgrad_config(dims, pixels, ops, target),
            reduce3=reduce3, reduce5=reduce5, pooled=need_x, precision=ops.precision,
        )  # fmt: skip
    dx, sums = x.new_empty(0), x.new_empty(0)
    if need_x:
        assert w is not None  # for the type checker: need_x implies both reduces
        dx, sums = input_gradient(dims, x, dz, dr, dp, index, w, below)
    bias_grads = [
        x.new_empty(f.shape[0] if need else 0, dtype=dtype)
        for f, need, dtype in zip(filters, need_b, biases_dtype, strict=True)
    ]
    filter_grads = filter_gradients(
        dims, x, index, r, gradient, dr, (partial_m, partial3, partial5), filters, need_w,
        bias_grads,
    )  # fmt: skip
    return dx, sums, [*filter_grads, *bias_grads]


def input_gradient(
    dims: InceptionDims,
    x: torch.Tensor,
    dz: torch.Tensor,
    dr: torch.Tensor,
    dp: torch.Tensor,
    index: torch.Tensor,
    w: torch.Tensor,
    below: ReluBelow | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch L2: the gradient of x, exactly channels last, and its column sums as
    `backward_of_masked` returns them."""
    ops, target, pixels = problem_of(x)
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    sums = launch_input_grad(
        dims, dz, dr, dp, index, w, dx,
        chosen.input_grad_config(dims, pixels, ops, target), precision=ops.precision,
        mask=None if below is None else below.mask, other=None if below is None else below.other,
    )  # fmt: skip
    return dx, sums


def filter_gradients(
    dims: InceptionDims,
    x: torch.Tensor,
    index: torch.Tensor,
    r: torch.Tensor,
    gradient: library_triton.MaskedGradient,
    dr: torch.Tensor,
    column_sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    filters: list[torch.Tensor],
    needs: Sequence[bool],
    bias_grads: list[torch.Tensor],
) -> list[torch.Tensor]:
    """Launches L3 and F: gradients of six filters, 0 elements where `needs` says no; `bias_grads`
    are filled from the partial sums of dz, dR3 and dR5 where they have elements.

    r: both reduced maps as the 3x3 and 5x5 read them, behind their ReLU.
    """
    grads = empty_filter_grads(filters, needs)
    if any(needs) or any(b.numel() for b in bias_grads):
        ops, target, pixels = problem_of(x)
        need1, need3r, _, need5r, _, need_pool = needs
        ours = library_triton.filter_gradients(gradient, r, grads)
        groups = {
            "branch1": need1,
            "reduces": need3r or need5r,
            "conv3": ours[2].numel() > 0,
            "conv5": ours[4].numel() > 0,
            "projection": need_pool,
        }
        partial_filters = launch_wgrad(
            dims, for_kernels(x), index, r, gradient.dz, dr,
            chosen.wgrad_config(dims, pixels, ops, target),
            groups=frozenset(name for name, need in groups.items() if need),
            precision=ops.precision,
        )  # fmt: skip
        launch_finish(
            dims, partial_filters, *column_sums, ours, bias_grads, heuristic.finish_config()
        )
    return grads

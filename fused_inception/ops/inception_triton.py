"""The script of the module on the Triton path: which launches run, in which order, on which scratch
tensors."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.finish import Unfinished, launch_finish
from fused_inception.kernels.gradients import (
    FilterGradients,
    InputGradient,
    launch_gradients,
    unfinished,
)
from fused_inception.kernels.pack import launch_pack, module_packing
from fused_inception.kernels.pointwise import launch_pointwise
from fused_inception.kernels.relu_mask import launch_relu_mask
from fused_inception.ops import filter_cache, library_triton
from fused_inception.ops.layout import (
    empty_channels_last,
    empty_filter_grads,
    for_kernels,
)
from fused_inception.ops.problem import dims_of, problem_of
from fused_inception.ops.replay import replayed
from fused_inception.tuning import chosen, dispatch, heuristic

Packed = tuple[torch.Tensor, torch.Tensor]


def packed_modules(
    dims: Sequence[InceptionDims],
    filters: list[list[torch.Tensor]],
    biases: list[list[torch.Tensor]],
    dtype: torch.dtype,
    *,
    save: bool,
) -> list[Packed]:
    """Filters and biases of some modules, packed for their forwards in one launch, or from the
    cache where that is safe."""
    flat = [*chain(*filters)], [*chain(*biases)]

    def pack() -> list[Packed]:
        return launch_pack([*map(module_packing, dims)], *flat, dtype)

    return filter_cache.kept([*flat[0], *flat[1]], (dtype,), pack, save=save)


def packed_for_gradients(
    dims: Sequence[InceptionDims], filters: list[list[torch.Tensor]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Filters of some modules, packed for their data gradients in one launch."""
    packed = launch_pack([*map(module_packing, dims)], [*chain(*filters)], None, dtype)
    return [w for w, _ in packed]


def forward(
    x: torch.Tensor, filters: list[torch.Tensor], biases: list[torch.Tensor], save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """`forward_of_packed`, with filters and biases in any floating dtype."""
    dims = dims_of(filters)
    (packed,) = packed_modules([dims], [filters], [biases], x.dtype, save=save)
    return forward_of_packed(x, dims, packed, save)


@replayed
def forward_of_packed(
    x: torch.Tensor, dims: InceptionDims, packed: Packed, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y [N, C_OUT, H, W] exactly channels last, and with `save` what `backward` needs beside x and
    the filters.

    x: [N, C_IN, H, W], read in place where `layout.why_not_in_place` has no objection, else copied
    once. packed: filters and biases, of `packed_modules`.

    Saved: r, both reduced maps; the winning tap of each pooling window, 1 byte; the ReLU mask of y,
    1 bit.
    """
    n, _, height, width = x.shape
    ops, target, pixels = problem_of(x)
    w, b = packed
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


class Gradients(NamedTuple):
    """What `backward_of_masked` finds.

    Attributes:
        dx: the gradient of x; where x is behind a ReLU `below`, the one in front of that.
        sums: its column sums over some chunks of pixels each, which there are only then.
        parameters: six filters, six biases.
        unfinished: what launch F has to do until `parameters` are filled.
    """

    dx: torch.Tensor
    sums: torch.Tensor
    parameters: list[torch.Tensor]
    unfinished: list[Unfinished]


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
    dims = dims_of(filters)
    masked = mask_gradient(dims, dy, mask)
    w = packed_for_gradients([dims], [filters], x.dtype)[0] if reads_packed(needs) else None
    found = backward_of_masked(dims, masked, x, saved, filters, w, biases_dtype, needs)
    launch_finish(found.unfinished, heuristic.finish_config())
    return [found.dx, *found.parameters]


def reads_packed(needs: Sequence[bool]) -> bool:
    """Whether `backward_of_masked` multiplies by filters: for x or for one of the reductions."""
    return any(_reduces(needs))


def _reduces(needs: Sequence[bool]) -> tuple[bool, bool]:
    """Whether the gradients of the 3x3's and of the 5x5's reduced map are needed."""
    need_x, need_w, need_b = needs[0], needs[1:7], needs[7:]
    return need_x or need_w[1] or need_b[1], need_x or need_w[3] or need_b[3]


def mask_gradient(dims: InceptionDims, dy: torch.Tensor, mask: torch.Tensor) -> Masked:
    """Launch M, for a `dy` of any strides."""
    _, target, pixels = problem_of(dy)
    config = chosen.mask_config(dims.slot_channels, pixels, target)
    return Masked(*launch_relu_mask(dims.branch_widths, dy, mask, config))


def backward_of_masked(
    dims: InceptionDims,
    masked: Masked,
    x: torch.Tensor,
    saved: list[torch.Tensor],
    filters: list[torch.Tensor],
    w: torch.Tensor | None,
    biases_dtype: list[torch.dtype],
    needs: list[bool],
    below: ReluBelow | None = None,
) -> Gradients:
    """The launches of `backward` between M and F. w: of `packed_for_gradients`, where
    `reads_packed`."""
    r, index, _ = saved
    dz, partial_m = masked.dz, masked.sums
    ops, target, pixels = problem_of(x)
    need_x, need_w, need_b = needs[0], needs[1:7], needs[7:]
    reduce3, reduce5 = _reduces(needs)

    gradient = library_triton.MaskedGradient(
        dispatch.module_plan(dims, pixels, ops, target), dims, dz
    )
    dr, dp, partial3, partial5 = r, index, partial_m, partial_m
    if w is not None:
        dr, dp, partial3, partial5 = library_triton.dgrad(
            dims, gradient, w, r,
            chosen.dgrad_config(dims, pixels, ops, target),
            reduce3=reduce3, reduce5=reduce5, pooled=need_x, precision=ops.precision,
        )  # fmt: skip
    bias_grads = [
        x.new_empty(f.shape[0] if need else 0, dtype=dtype)
        for f, need, dtype in zip(filters, need_b, biases_dtype, strict=True)
    ]
    found = input_and_filter_gradients(
        dims, x, index, r, gradient, dr, (dp, w) if need_x else None,
        (partial_m, partial3, partial5), filters, need_w, bias_grads, below,
    )  # fmt: skip
    return found._replace(parameters=[*found.parameters, *bias_grads])


def input_and_filter_gradients(
    dims: InceptionDims,
    x: torch.Tensor,
    index: torch.Tensor,
    r: torch.Tensor,
    gradient: library_triton.MaskedGradient,
    dr: torch.Tensor,
    of_input: tuple[torch.Tensor, torch.Tensor | None] | None,
    column_sums: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    filters: list[torch.Tensor],
    needs: Sequence[bool],
    bias_grads: list[torch.Tensor],
    below: ReluBelow | None = None,
) -> Gradients:
    """Launches L2 and L3, together where maps are small: the gradient of x, exactly channels last,
    and those of six filters, 0 elements where `needs` says no; what launch F has to do until they
    are filled, and `bias_grads` where these have elements.

    r: both reduced maps as the 3x3 and 5x5 read them, behind their ReLU. of_input: gradient of the
    pooled map and packed filters; None where the gradient of x is not needed.
    """
    ops, target, pixels = problem_of(x)
    dz = gradient.dz
    dx, first, second = x.new_empty(0), None, None
    if of_input is not None:
        dp, w = of_input
        assert w is not None  # for the type checker: the gradient of x reads it
        dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
        first = InputGradient(
            dp, w, dx, chosen.input_grad_config(dims, pixels, ops, target),
            None if below is None else below.mask, None if below is None else below.other,
        )  # fmt: skip
    grads = ours = empty_filter_grads(filters, needs)
    if any(needs) or any(b.numel() for b in bias_grads):
        need1, need3r, _, need5r, _, need_pool = needs
        ours = library_triton.filter_gradients(gradient, r, grads)
        groups = {
            "branch1": need1,
            "reduces": need3r or need5r,
            "conv3": ours[2].numel() > 0,
            "conv5": ours[4].numel() > 0,
            "projection": need_pool,
        }
        second = FilterGradients(
            for_kernels(x), r, frozenset(name for name, need in groups.items() if need),
            chosen.wgrad_config(dims, pixels, ops, target),
        )  # fmt: skip
    launch = functools.partial(launch_gradients, dims, dz, dr, index, precision=ops.precision)
    sums = dx if first is None else first.sums
    if first is not None and (second is None or not heuristic.launches_together(pixels, target)):
        launch(first, None)
        first = None
    if second is None:
        return Gradients(dx, sums, grads, [])
    part = unfinished(dims, launch(first, second), *column_sums, ours, bias_grads)
    return Gradients(dx, sums, grads, [part])

"""A run of Inception modules with biases, the max pools behind them, and at its end the global
average pool with dropout, as one operator: what is saved, fakes, gradients.

Inside it the gradient of a module's output is masked where it is made, so no module needs a pass of
its own for that. It exists on the Triton path alone; through ATen it would be the operators that it
stands for, and `functional.inception_trunk` calls those.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import ALIGN, why_no_pool_kernel
from fused_inception.ops.layout import (
    as_saved,
    dims_of,
    empty_channels_last,
    gradients_like,
    settle_all,
)
from fused_inception.ops.registration import (
    needed_gradients,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed
from fused_inception.ops.stages import CONVS, Trunk, of_modules


def why_not(filters: Sequence[Tensor], trunk: Trunk) -> str | None:
    """Why there is no operator for such modules, six filters each; None where there is."""
    for module in of_modules(filters):
        widths = [module[i].shape[0] for i in (0, 2, 4, 5)]
        if any(width % ALIGN != 0 for width in widths):
            return f"widths of branches must be multiples of {ALIGN}, got {widths}"
    for window in trunk.pools.values():
        reason = why_no_pool_kernel(window.kernel)
        if reason is not None:
            return reason
    last = len(filters) // CONVS - 1
    if (trunk.pools.keys() | {last}) & set(trunk.taps):
        return "the last module is tapped, or one that has a pool behind it"
    if trunk.mean and last in trunk.pools:
        return "the global pool is behind another pool"
    return None


@replayed
def _forward(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    kept: Tensor | None,
    scale: float,
    integers: list[int],
    save_from: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from fused_inception.ops import trunk_triton

    trunk = Trunk.of(integers)
    return trunk_triton.forward(x, filters, biases, kept, scale, trunk, save_from)


def _forward_fake(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    kept: Tensor | None,
    scale: float,
    integers: list[int],
    save_from: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from fused_inception.ops import inception_triton

    trunk, modules = Trunk.of(integers), of_modules(filters)
    tapped, saved = [], []
    n, _, h, w = x.shape

    def like(channels: int, h: int, w: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return empty_channels_last(n, channels, h, w, dtype=dtype, device=x.device)

    y = x
    for i, module in enumerate(modules):
        dims = dims_of(module)
        channels = dims.out_channels
        saves, next_saves = i >= save_from, save_from <= i + 1 < len(modules)
        if saves:
            saved += inception_triton.saved_like(y, dims)
        y = like(channels, h, w)
        if i in trunk.pools:
            h, w = trunk.pools[i].out(h), trunk.pools[i].out(w)
            y = like(channels, h, w)
            if saves:
                saved.append(like(channels, h, w, torch.uint8))
        if i in trunk.taps:
            tapped.append(y)
        elif next_saves:
            saved.append(y)
    return like(y.shape[1], 1, 1) if trunk.mean else y, tapped, saved


@replayed
def _backward(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    x: Tensor,
    tapped: list[Tensor],
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    kept: Tensor | None,
    scale: float,
    integers: list[int],
    save_from: int,
    needs: list[bool],
) -> list[Tensor]:
    from fused_inception.ops import trunk_triton

    memory = trunk_triton.Memory(
        x, filters, tapped, as_saved(saved), kept, scale, Trunk.of(integers), save_from
    )
    gradients = trunk_triton.backward(dy, d_taps, memory, [b.dtype for b in biases], needs)
    return settle_all(gradients, x, (*filters, *biases), needs)


def _backward_fake(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    x: Tensor,
    tapped: list[Tensor],
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    *options: Any,
) -> list[Tensor]:
    return gradients_like(x, (*filters, *biases), options[-1])


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], list[Tensor]]
) -> None:
    x, filters, biases, kept, ctx.scale, ctx.integers, ctx.save_from = inputs
    _, tapped, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    # x is of use to the first module alone, a tapped output to the one behind it
    useful = [at >= ctx.save_from - 1 for at in Trunk.of(ctx.integers).taps]
    tapped = [y for y, use in zip(tapped, useful, strict=True) if use]
    groups = [[x] * (ctx.save_from == 0), tapped, saved, filters, biases, [kept]]
    ctx.counts = [len(group) for group in groups]
    ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _differentiate(
    ctx: Any, dy: Tensor | None, d_taps: list[Tensor | None], d_saved: Any
) -> tuple[Any, ...]:
    needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
    convs = len(needs_filters)
    # the last module that a gradient reaches; those behind it get none
    taps = Trunk.of(ctx.integers).taps
    reached = [at for at, grad in zip(taps, d_taps, strict=True) if grad is not None]
    last = convs // CONVS - 1 if dy is not None else max(reached, default=-1)
    ends = CONVS * (last + 1)
    needs = [needs_x and last >= 0]
    for of_kind in (needs_filters, needs_biases):
        needs += [need and i < ends for i, need in enumerate(of_kind)]
    options = None, None, None, None
    if not any(needs):
        return None, [None] * convs, [None] * convs, *options
    if last < ctx.save_from:
        raise RuntimeError("the operator was told to keep nothing for this gradient")
    flat = iter(ctx.saved_tensors)
    kept_x, tapped, saved, filters, biases, (kept,) = (
        [next(flat) for _ in range(n)] for n in ctx.counts
    )
    # without x any map does: no gradient is like it
    x = kept_x[0] if kept_x else saved[0]
    dx, *rest = needed_gradients(
        inception_trunk_backward,
        dy, [*d_taps], x, tapped, saved, filters, biases, kept, ctx.scale, ctx.integers,
        ctx.save_from, needs=needs,
    )  # fmt: skip
    return dx, rest[:convs], rest[convs:], *options


_OPTIONS = "Tensor? kept, float scale, int[] integers, int save_from"

inception_trunk, inception_trunk_backward = register_with_backward(
    "inception_trunk",
    f"(Tensor x, Tensor[] filters, Tensor[] biases, {_OPTIONS}) -> (Tensor, Tensor[], Tensor[])",
    "(Tensor? dy, Tensor?[] d_taps, Tensor x, Tensor[] tapped, Tensor[] saved, Tensor[] filters,"
    f" Tensor[] biases, {_OPTIONS}, bool[] needs) -> Tensor[]",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    cast_first=True,
)
register_autograd(inception_trunk, _differentiate, _setup_context)

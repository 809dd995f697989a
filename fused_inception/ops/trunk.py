"""A run of Inception modules with biases, max pools between them and the global average pool behind
them as one operator: what is saved, fakes, gradients.

Inside it the gradient of a module's output is masked where it is made, so no module needs a pass of
its own for that. It exists on the Triton path alone; through ATen it would be the operators that it
stands for, and `functional.inception_trunk` calls those.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import ALIGN, Window
from fused_inception.ops.layout import (
    dims_of,
    empty_channels_last,
    gradients_like,
    settle_all,
)
from fused_inception.ops.pooling import MAX_KERNEL
from fused_inception.ops.registration import (
    refuse_double_backward,
    register,
    register_autocast,
    register_autograd,
)

CONVS = 6  # of a module


@dataclass(frozen=True)
class Trunk:
    """What stands between the modules; schemas have it as integers.

    Attributes:
        pools: the max pool behind a module, by the module's number.
        taps: numbers of the modules whose output the operator returns too.
    """

    pools: dict[int, Window]
    taps: tuple[int, ...]

    @property
    def integers(self) -> list[int]:
        """The pools."""
        return [
            n
            for at, w in self.pools.items()
            for n in (at, w.kernel, w.stride, w.padding, w.ceil_mode)
        ]

    @staticmethod
    def of(integers: Sequence[int], taps: Sequence[int]) -> "Trunk":
        """The inverse."""
        pools = {}
        for i in range(0, len(integers), 5):
            at, kernel, stride, padding, ceil = integers[i : i + 5]
            pools[at] = Window(kernel, stride, padding, bool(ceil))
        return Trunk(pools, tuple(taps))


def why_not(filters: Sequence[Tensor], trunk: Trunk) -> str | None:
    """Why there is no operator for such modules, six filters each; None where there is."""
    for module in of_modules(filters):
        widths = [module[i].shape[0] for i in (0, 2, 4, 5)]
        if any(width % ALIGN != 0 for width in widths):
            return f"widths of branches must be multiples of {ALIGN}, got {widths}"
    kernels = [window.kernel for window in trunk.pools.values()]
    if kernels and max(kernels) > MAX_KERNEL:
        return f"windows are of at most {MAX_KERNEL}, got {kernels}"
    if trunk.pools.keys() & set(trunk.taps):
        return "a module is tapped that has a pool behind it"
    last = len(filters) // CONVS - 1
    if last in trunk.taps or last in trunk.pools:
        return "something stands between the last module and the global pool"
    return None


def of_modules(flat: Sequence[Any]) -> list[list[Any]]:
    """Filters, biases or what belongs to them, six for each module."""
    return [list(flat[i : i + CONVS]) for i in range(0, len(flat), CONVS)]


def _forward(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    pools: list[int],
    taps: list[int],
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from fused_inception.ops import trunk_triton

    return trunk_triton.forward(x, filters, biases, Trunk.of(pools, taps), save)


def _forward_fake(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    pools: list[int],
    taps: list[int],
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    from fused_inception.ops import trunk_triton

    trunk = Trunk.of(pools, taps)
    tapped, saved = [], []
    n, _, h, w = x.shape

    def like(channels: int, h: int, w: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return empty_channels_last(n, channels, h, w, dtype=dtype, device=x.device)

    y = x
    for i, module in enumerate(of_modules(filters)):
        dims = dims_of(module)
        channels = dims.out_channels
        if save:
            saved += trunk_triton.saved_like(y, dims)
        y = like(channels, h, w)
        if i in trunk.taps:
            tapped.append(y)
        elif save and i not in trunk.pools and len(filters) > CONVS * (i + 1):
            saved.append(y)
        if i in trunk.pools:
            h, w = trunk.pools[i].out(h), trunk.pools[i].out(w)
            y = like(channels, h, w)
            if save:
                saved += [like(channels, h, w, torch.uint8), y]
    return like(y.shape[1], 1, 1), tapped, saved


def _backward(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    x: Tensor,
    tapped: list[Tensor],
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    pools: list[int],
    taps: list[int],
    needs: list[bool],
) -> list[Tensor]:
    from fused_inception.ops import trunk_triton

    gradients = trunk_triton.backward(
        dy, d_taps, x, tapped, saved, filters, biases, Trunk.of(pools, taps), needs
    )
    return settle_all(gradients, x, (*filters, *biases), needs)


def _backward_fake(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    x: Tensor,
    tapped: list[Tensor],
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    pools: list[int],
    taps: list[int],
    needs: list[bool],
) -> list[Tensor]:
    return gradients_like(x, (*filters, *biases), needs)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor], list[Tensor]]
) -> None:
    x, filters, biases, ctx.pools, ctx.taps, ctx.saves = inputs
    _, tapped, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    if ctx.saves:
        groups = [[x], tapped, saved, filters, biases]
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _differentiate(
    ctx: Any, dy: Tensor | None, d_taps: list[Tensor | None], d_saved: Any
) -> tuple[Any, ...]:
    convs = len(ctx.needs_input_grad[1])
    # the last module that a gradient reaches; those behind it get none
    reached = [at for at, grad in zip(ctx.taps, d_taps, strict=True) if grad is not None]
    last = convs // CONVS - 1 if dy is not None else max(reached, default=-1)
    # torch wants the structure of the inputs, where an empty list is one of tensors
    options: list[Any] = [None if given else [] for given in (ctx.pools, ctx.taps)]
    if last < 0:
        return None, [None] * convs, [None] * convs, *options, None
    if not ctx.saves:
        raise RuntimeError("the operator ran with save=False and kept nothing for its backward")
    flat = iter(ctx.saved_tensors)
    (x,), tapped, saved, filters, biases = ([next(flat) for _ in range(n)] for n in ctx.counts)
    needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
    ends = CONVS * (last + 1)
    needs = [needs_x]
    for of_kind in (needs_filters, needs_biases):
        needs += [need and i < ends for i, need in enumerate(of_kind)]
    gradients = inception_trunk_backward(
        dy, d_taps, x, tapped, saved, filters, biases, ctx.pools, ctx.taps, needs
    )
    dx, *rest = [
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    ]
    return dx, rest[:convs], rest[convs:], *options, None


inception_trunk = register(
    "inception_trunk",
    "(Tensor x, Tensor[] filters, Tensor[] biases, int[] pools, int[] taps, bool save)"
    " -> (Tensor, Tensor[], Tensor[])",
    implementation=_forward,
    fake=_forward_fake,
)
inception_trunk_backward = register(
    "inception_trunk_backward",
    "(Tensor? dy, Tensor?[] d_taps, Tensor x, Tensor[] tapped, Tensor[] saved, Tensor[] filters,"
    " Tensor[] biases, int[] pools, int[] taps, bool[] needs) -> Tensor[]",
    implementation=_backward,
    fake=_backward_fake,
)
register_autograd(inception_trunk, _differentiate, _setup_context)
refuse_double_backward(inception_trunk_backward, "fused_inception.reference.inception_trunk")
register_autocast(inception_trunk, cast_first=True)
register_autocast(inception_trunk_backward, cast_first=False)

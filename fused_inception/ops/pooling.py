"""Max pooling, local response normalisation and both in one, as operators: what is saved, fakes,
gradients.

All four are alike: `name(x, options, save, impl) -> (y, saved)` and its backward. Under autocast
they keep the dtype of x, as torch's pooling does; torch's normalisation would return fp32 there,
here the sums are fp32 and the result is as narrow as x, which the next convolution casts to anyway.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import Window
from fused_inception.ops import pooling_aten
from fused_inception.ops.layout import as_saved, empty_channels_last
from fused_inception.ops.registration import (
    call_below_autograd,
    refuse_unsaved,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed

NORM = "int size, float alpha, float beta, float k"
WINDOW = "int kernel, int stride, int padding, bool ceil_mode"


@dataclass(frozen=True)
class _Family:
    """One operator and its backward."""

    name: str
    has_norm: bool
    has_window: bool
    keeps_x: bool  # backward reads x; otherwise its shape is enough

    @property
    def options_schema(self) -> str:
        return ", ".join([NORM] * self.has_norm + [WINDOW] * self.has_window)

    def options(self, flat: Sequence[Any]) -> list[Any]:
        """The options as implementations take them: the norm's four numbers, the window."""
        options: list[Any] = [tuple(flat[:4])] if self.has_norm else []
        if self.has_window:
            options.append(Window(*flat[-4:]))
        return options

    def implementation(self, impl: str, suffix: str) -> Any:
        """The function of this family in the module of `impl`."""
        if impl == "triton":
            from fused_inception.ops import pooling_triton

            return getattr(pooling_triton, self.name + suffix)
        return getattr(pooling_aten, self.name + suffix)

    def forward(self, x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        *flat, save, impl = arguments
        return self.implementation(impl, "")(x, *self.options(flat), save)

    def forward_fake(self, x: Tensor, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
        *flat, save, impl = arguments
        n, c, h, w = x.shape
        if self.has_window:
            window = self.options(flat)[-1]
            h, w = window.out(h), window.out(w)
        y = empty_channels_last(n, c, h, w, dtype=x.dtype, device=x.device)
        return y, self.implementation(impl, "_saved_like")(y) if save else []

    def backward(
        self, dy: Tensor, x: Tensor, saved: list[Tensor], x_shape: Sequence[int], *arguments: Any
    ) -> Tensor:
        *flat, impl = arguments
        of = [x] if self.keeps_x else [tuple(x_shape)]
        return self.implementation(impl, "_backward")(
            dy, *of, *as_saved(saved), *self.options(flat)
        )

    def backward_fake(
        self, dy: Tensor, x: Tensor, saved: list[Tensor], x_shape: Sequence[int], *arguments: Any
    ) -> Tensor:
        n, c, h, w = x_shape
        return empty_channels_last(n, c, h, w, dtype=dy.dtype, device=dy.device)

    def setup_context(
        self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]
    ) -> None:
        x, *ctx.options, ctx.saves, ctx.impl = inputs
        _, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*saved)
        ctx.shape = x.shape
        if ctx.saves:
            ctx.save_for_backward(*[x] * self.keeps_x, *saved)


def _define(family: _Family) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    options = family.options_schema
    op, backward_op = register_with_backward(
        family.name,
        f"(Tensor x, {options}, bool save, str impl) -> (Tensor, Tensor[])",
        f"(Tensor dy, Tensor x, Tensor[] saved, SymInt[] x_shape, {options}, str impl) -> Tensor",
        forward=replayed(family.forward),
        forward_fake=family.forward_fake,
        backward=replayed(family.backward),
        backward_fake=family.backward_fake,
        cast_first=False,
    )

    def differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Tensor | None, ...]:
        nothing = [None] * (len(ctx.options) + 2)
        if dy is None:
            return None, *nothing
        refuse_unsaved(ctx.saves)
        saved = list(ctx.saved_tensors)
        x = saved.pop(0) if family.keeps_x else dy.new_empty(0)
        dx = call_below_autograd(backward_op, dy, x, saved, ctx.shape, *ctx.options, ctx.impl)
        return dx, *nothing

    register_autograd(op, differentiate, family.setup_context)
    return op, backward_op


max_pool2d, max_pool2d_backward = _define(_Family("max_pool2d", False, True, keeps_x=False))
local_response_norm, local_response_norm_backward = _define(
    _Family("local_response_norm", True, False, keeps_x=True)
)
lrn_max_pool2d, lrn_max_pool2d_backward = _define(
    _Family("lrn_max_pool2d", True, True, keeps_x=True)
)
max_pool2d_lrn, max_pool2d_lrn_backward = _define(
    _Family("max_pool2d_lrn", True, True, keeps_x=False)
)

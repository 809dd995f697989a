"""A whole Inception module as one operator: what its forms have in common.

`name(x, filters, biases, save, impl) -> (y, saved)` and its backward; what is saved, fakes,
gradients. Each form brings the widths that its filters define and two scripts, one with PyTorch's
own operators and one of Triton launches, with the functions `forward`, `saved_like` and `backward`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception.ops.layout import empty_channels_last, gradients_like, settle_all
from fused_inception.ops.registration import (
    refuse_double_backward,
    register,
    register_autocast,
    register_autograd,
)


@dataclass(frozen=True)
class ModuleForm:
    """One form of the module."""

    name: str
    dims_of: Callable[[Sequence[Tensor]], Any]  # with `out_channels`
    aten: Any  # the script of ATen
    triton: Callable[[], Any]  # loads the script of the Triton path, when it first runs

    def forward(
        self, x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool, impl: str
    ) -> tuple[Tensor, list[Tensor]]:
        script = self.triton() if impl == "triton" else self.aten
        return script.forward(x, filters, biases, save)

    def forward_fake(
        self, x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool, impl: str
    ) -> tuple[Tensor, list[Tensor]]:
        dims = self.dims_of(filters)
        n, _, h, w = x.shape
        y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
        if not save:
            return y, []
        script = self.triton() if impl == "triton" else self.aten
        return y, script.saved_like(x, dims)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        saved: list[Tensor],
        filters: list[Tensor],
        biases: list[Tensor],
        needs: list[bool],
        impl: str,
    ) -> list[Tensor]:
        gradients: Sequence[Tensor | None]
        if impl == "triton":
            dtypes = [b.dtype for b in biases]
            gradients = self.triton().backward(dy, x, saved, filters, dtypes, needs)
        else:
            gradients = self.aten.backward(dy, x, y, saved, filters, needs)
        return settle_all(gradients, x, (*filters, *biases), needs)

    def backward_fake(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor,
        saved: list[Tensor],
        filters: list[Tensor],
        biases: list[Tensor],
        needs: list[bool],
        impl: str,
    ) -> list[Tensor]:
        return gradients_like(x, (*filters, *biases), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, filters, biases, save, impl = inputs
    y, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.impl = impl
    ctx.saves = save
    ctx.convolutions = len(filters)
    if save:
        # the Triton path has the bits of y that backward asks for among its saved tensors
        kept = [y] if impl == "torch" else []
        groups = [[x], kept, saved, filters, biases]
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def define(form: ModuleForm) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Register the operator of `form` and its backward."""
    op = register(
        form.name,
        "(Tensor x, Tensor[] filters, Tensor[] biases, bool save, str impl) -> (Tensor, Tensor[])",
        implementation=form.forward,
        fake=form.forward_fake,
    )
    backward_op = register(
        f"{form.name}_backward",
        "(Tensor dy, Tensor x, Tensor y, Tensor[] saved, Tensor[] filters, Tensor[] biases,"
        " bool[] needs, str impl) -> Tensor[]",
        implementation=form.backward,
        fake=form.backward_fake,
    )

    def differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
        count = ctx.convolutions
        if dy is None:
            return None, [None] * count, [None] * count, None, None
        if not ctx.saves:
            raise RuntimeError("the operator ran with save=False and kept nothing for its backward")
        flat = iter(ctx.saved_tensors)
        (x,), kept, saved, filters, biases = ([next(flat) for _ in range(n)] for n in ctx.counts)
        y = kept[0] if kept else x.new_empty(0)
        needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
        needs = [needs_x, *needs_filters, *needs_biases]
        gradients = backward_op(dy, x, y, saved, filters, biases, needs, ctx.impl)
        dx, *rest = [
            gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
        ]
        return dx, rest[:count], rest[count:], None, None

    register_autograd(op, differentiate, _setup_context)
    refuse_double_backward(backward_op, f"fused_inception.reference.{form.name}")
    register_autocast(op, cast_first=True)
    register_autocast(backward_op, cast_first=False)
    return op, backward_op

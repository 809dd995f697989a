"""The Inception module with bias and ReLU, and the naive one, as one operator each.

`name(x, filters, biases, save) -> (y, saved)` and its backward; what is saved, fakes, gradients.
Each form brings the widths that its filters define and a script of launches with the functions
`forward`, `saved_like` and `backward`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception.ops.layout import (
    as_saved,
    dims_of,
    empty_channels_last,
    gradients_like,
    naive_dims_of,
    settle_all,
)
from fused_inception.ops.registration import (
    needed_gradients,
    refuse_unsaved,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed


@dataclass(frozen=True)
class _Form:
    """One form of the module."""

    name: str
    dims_of: Callable[[Sequence[Tensor]], Any]  # with `out_channels`
    script: Callable[[], Any]  # loads the script, when it first runs

    def forward(
        self, x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        return self.script().forward(x, filters, biases, save)

    def forward_fake(
        self, x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        dims = self.dims_of(filters)
        n, _, h, w = x.shape
        y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
        return y, self.script().saved_like(x, dims) if save else []

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: list[Tensor],
        filters: list[Tensor],
        biases: list[Tensor],
        needs: list[bool],
    ) -> list[Tensor]:
        dtypes = [b.dtype for b in biases]
        gradients = self.script().backward(dy, x, as_saved(saved), filters, dtypes, needs)
        return settle_all(gradients, x, (*filters, *biases), needs)

    def backward_fake(
        self,
        dy: Tensor,
        x: Tensor,
        saved: list[Tensor],
        filters: list[Tensor],
        biases: list[Tensor],
        needs: list[bool],
    ) -> list[Tensor]:
        return gradients_like(x, (*filters, *biases), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, filters, biases, save = inputs
    _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.saves = save
    ctx.convolutions = len(filters)
    if save:
        # the bits of y that backward asks for are among the saved tensors
        groups = [[x], saved, filters, biases]
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _define(form: _Form) -> tuple[torch._ops.OpOverload, torch._ops.OpOverload]:
    """Register the operator of `form` and its backward."""
    op, backward_op = register_with_backward(
        form.name,
        "(Tensor x, Tensor[] filters, Tensor[] biases, bool save) -> (Tensor, Tensor[])",
        "(Tensor dy, Tensor x, Tensor[] saved, Tensor[] filters, Tensor[] biases, bool[] needs)"
        " -> Tensor[]",
        forward=replayed(form.forward),
        forward_fake=form.forward_fake,
        backward=replayed(form.backward),
        backward_fake=form.backward_fake,
        cast_first=True,
    )

    def differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
        count = ctx.convolutions
        if dy is None:
            return None, [None] * count, [None] * count, None
        refuse_unsaved(ctx.saves)
        flat = iter(ctx.saved_tensors)
        (x,), saved, filters, biases = ([next(flat) for _ in range(n)] for n in ctx.counts)
        needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
        needs = [needs_x, *needs_filters, *needs_biases]
        dx, *rest = needed_gradients(backward_op, dy, x, saved, filters, biases, needs=needs)
        return dx, rest[:count], rest[count:], None

    register_autograd(op, differentiate, _setup_context)
    return op, backward_op


def _script() -> Any:
    from fused_inception.ops import inception_triton

    return inception_triton


def _naive_script() -> Any:
    from fused_inception.ops import inception_naive_triton

    return inception_naive_triton


inception, inception_backward = _define(_Form("inception", dims_of, _script))
inception_naive, inception_naive_backward = _define(
    _Form("inception_naive", naive_dims_of, _naive_script)
)

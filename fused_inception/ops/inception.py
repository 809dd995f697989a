"""The Inception module, bias and ReLU, as one operator: what is saved, fakes, gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_inception.ops import inception_aten
from fused_inception.ops.layout import dims_of, empty_channels_last, settle
from fused_inception.ops.registration import (
    refuse_double_backward,
    register,
    register_autocast,
    register_autograd,
)


def _forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool, impl: str
) -> tuple[Tensor, list[Tensor]]:
    if impl == "triton":
        from fused_inception.ops import inception_triton

        return inception_triton.forward(x, filters, biases, save)
    return inception_aten.forward(x, filters, biases, save)


def _forward_fake(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool, impl: str
) -> tuple[Tensor, list[Tensor]]:
    dims = dims_of(filters)
    n, _, h, w = x.shape
    y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
    if not save:
        return y, []
    if impl == "triton":
        from fused_inception.ops import inception_triton

        return y, inception_triton.saved_like(x, dims)
    return y, inception_aten.saved_like(x, dims)


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    parameters = (*filters, *biases)
    gradients: Sequence[Tensor | None]
    if impl == "triton":
        from fused_inception.ops import inception_triton

        dtypes = [b.dtype for b in biases]
        gradients = inception_triton.backward(dy, x, saved, filters, dtypes, needs)
    else:
        gradients = inception_aten.backward(dy, x, y, saved, filters, needs)
    settled = []
    for gradient, tensor, need in zip(gradients, (x, *parameters), needs, strict=True):
        if not need or gradient is None:
            settled.append(tensor.new_empty(0))
        else:
            settled.append(gradient if tensor is x else settle(gradient, tensor))
    return settled


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    parameters = (*filters, *biases)
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    like = [dx, *(torch.empty_like(p) for p in parameters)]
    return [
        gradient if need else tensor.new_empty(0)
        for gradient, tensor, need in zip(like, (x, *parameters), needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, filters, biases, save, impl = inputs
    y, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.impl = impl
    ctx.saves = save
    if save:
        # the Triton path has the bits of y that backward asks for among its saved tensors
        kept = [y] if impl == "torch" else []
        groups = [[x], kept, saved, filters, biases]
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*(tensor for group in groups for tensor in group))


def _differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
    if dy is None:
        return None, [None] * 6, [None] * 6, None, None
    if not ctx.saves:
        raise RuntimeError("the operator ran with save=False and kept nothing for its backward")
    flat = iter(ctx.saved_tensors)
    (x,), kept, saved, filters, biases = ([next(flat) for _ in range(n)] for n in ctx.counts)
    y = kept[0] if kept else x.new_empty(0)
    needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
    needs = [needs_x, *needs_filters, *needs_biases]
    gradients = inception_backward(dy, x, y, saved, filters, biases, needs, ctx.impl)
    dx, *rest = [
        gradient if need else None for gradient, need in zip(gradients, needs, strict=True)
    ]
    return dx, rest[:6], rest[6:], None, None


inception = register(
    "inception",
    "(Tensor x, Tensor[] filters, Tensor[] biases, bool save, str impl) -> (Tensor, Tensor[])",
    implementation=_forward,
    fake=_forward_fake,
)
inception_backward = register(
    "inception_backward",
    "(Tensor dy, Tensor x, Tensor y, Tensor[] saved, Tensor[] filters, Tensor[] biases,"
    " bool[] needs, str impl) -> Tensor[]",
    implementation=_backward,
    fake=_backward_fake,
)
register_autograd(inception, _differentiate, _setup_context)
refuse_double_backward(inception_backward, "fused_inception.reference.inception")
register_autocast(inception, cast_first=True)
register_autocast(inception_backward, cast_first=False)

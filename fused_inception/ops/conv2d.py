"""One convolution with bias and ReLU as an operator."""

from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import align_up, conv_out, why_no_conv_kernel
from fused_inception.ops.layout import channels_last, empty_channels_last, settle
from fused_inception.ops.registration import (
    refuse_double_backward,
    register,
    register_autocast,
    register_autograd,
)

aten = torch.ops.aten


def why_not(weight: Tensor, stride: int, padding: int) -> str | None:
    """Why no kernel here computes this convolution; None where one does."""
    _, c_in, kernel, _ = weight.shape
    return why_no_conv_kernel(c_in, kernel, stride, padding)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, save: bool, impl: str
) -> tuple[Tensor, list[Tensor]]:
    if impl == "triton":
        from fused_inception.ops import conv2d_triton

        return conv2d_triton.forward(x, weight, bias, stride, padding, save)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = aten.convolution(x, weight, bias, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1)
    return channels_last(y.relu_()), []


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, save: bool, impl: str
) -> tuple[Tensor, list[Tensor]]:
    n, _, height, width = x.shape
    c_out, _, k, _ = weight.shape
    height, width = (conv_out(side, k, stride, padding) for side in (height, width))
    y = empty_channels_last(n, c_out, height, width, dtype=x.dtype, device=x.device)
    if impl == "torch" or not save:
        return y, []
    return y, [x.new_empty((n * height * width, align_up(c_out) // 8), dtype=torch.uint8)]


def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    if impl == "triton":
        from fused_inception.ops import conv2d_triton

        gradients = conv2d_triton.backward(dy, x, saved, weight, bias, stride, padding, needs)
    else:
        dz = aten.threshold_backward(dy, y, 0)
        gradients = aten.convolution_backward(
            dz, x, weight.to(x.dtype), [weight.shape[0]],
            [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, needs,
        )  # fmt: skip
    dx, dw, db = gradients
    empty = x.new_empty(0)
    return [
        channels_last(dx) if needs[0] else empty,
        settle(dw, weight) if needs[1] else empty,
        settle(db, bias) if needs[2] else empty,
    ]


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
    impl: str,
) -> list[Tensor]:
    empty = x.new_empty(0)
    return [
        empty_channels_last(*x.shape, dtype=x.dtype, device=x.device) if needs[0] else empty,
        torch.empty_like(weight) if needs[1] else empty,
        torch.empty_like(bias) if needs[2] else empty,
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.saves, ctx.impl = inputs
    y, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    if ctx.saves:
        # the Triton path has the bits of y that backward asks for in its mask
        ctx.save_for_backward(x, weight, bias, *(saved if saved else [y]))


def _differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 7
    if not ctx.saves:
        raise RuntimeError("the operator ran with save=False and kept nothing for its backward")
    x, weight, bias, kept = ctx.saved_tensors
    y, saved = (x.new_empty(0), [kept]) if ctx.impl == "triton" else (kept, [])
    needs = list(ctx.needs_input_grad[:3])
    gradients = conv2d_relu_backward(
        dy, x, y, saved, weight, bias, ctx.stride, ctx.padding, needs, ctx.impl
    )
    settled = [g if need else None for g, need in zip(gradients, needs, strict=True)]
    return (*settled, None, None, None, None)


conv2d_relu = register(
    "conv2d_relu",
    "(Tensor x, Tensor weight, Tensor bias, int stride, int padding, bool save, str impl)"
    " -> (Tensor, Tensor[])",
    implementation=_forward,
    fake=_forward_fake,
)
conv2d_relu_backward = register(
    "conv2d_relu_backward",
    "(Tensor dy, Tensor x, Tensor y, Tensor[] saved, Tensor weight, Tensor bias, int stride,"
    " int padding, bool[] needs, str impl) -> Tensor[]",
    implementation=_backward,
    fake=_backward_fake,
)
register_autograd(conv2d_relu, _differentiate, _setup_context)
refuse_double_backward(conv2d_relu_backward, "fused_inception.reference.conv2d_relu")
register_autocast(conv2d_relu, cast_first=True)
register_autocast(conv2d_relu_backward, cast_first=False)

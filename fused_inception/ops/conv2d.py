"""One convolution with bias and ReLU as an operator."""

from typing import Any

from torch import Tensor

from fused_inception.geometry import why_no_conv_kernel
from fused_inception.ops.layout import empty_channels_last, gradients_like, settle_all
from fused_inception.ops.registration import (
    needed_gradients,
    refuse_unsaved,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed


def why_not(weight: Tensor, stride: int, padding: int) -> str | None:
    """Why no kernel here computes this convolution; None where one does."""
    _, c_in, kernel, _ = weight.shape
    return why_no_conv_kernel(c_in, kernel, stride, padding)


@replayed
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, save: bool
) -> tuple[Tensor, list[Tensor]]:
    from fused_inception.ops import conv2d_triton

    return conv2d_triton.forward(x, weight, bias, stride, padding, save)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, save: bool
) -> tuple[Tensor, list[Tensor]]:
    from fused_inception.ops import conv2d_triton

    shape = conv2d_triton.map_shape(x, weight, stride, padding)
    y = empty_channels_last(*shape, dtype=x.dtype, device=x.device)
    return y, conv2d_triton.saved_like(x, weight, stride, padding) if save else []


@replayed
def _backward(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
) -> list[Tensor]:
    from fused_inception.ops import conv2d_triton

    gradients = conv2d_triton.backward(dy, x, saved, weight, bias, stride, padding, needs)
    return settle_all(gradients, x, (weight, bias), needs)


def _backward_fake(
    dy: Tensor, x: Tensor, saved: list[Tensor], weight: Tensor, bias: Tensor, *options: Any
) -> list[Tensor]:
    return gradients_like(x, (weight, bias), options[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, weight, bias, ctx.stride, ctx.padding, ctx.saves = inputs
    _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    if ctx.saves:
        # the bits of y that backward asks for are in the mask
        ctx.save_for_backward(x, weight, bias, *saved)


def _differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 6
    refuse_unsaved(ctx.saves)
    x, weight, bias, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    geometry = ctx.stride, ctx.padding
    gradients = needed_gradients(
        conv2d_relu_backward, dy, x, saved, weight, bias, *geometry, needs=needs
    )
    return (*gradients, None, None, None)


conv2d_relu, conv2d_relu_backward = register_with_backward(
    "conv2d_relu",
    "(Tensor x, Tensor weight, Tensor bias, int stride, int padding, bool save)"
    " -> (Tensor, Tensor[])",
    "(Tensor dy, Tensor x, Tensor[] saved, Tensor weight, Tensor bias, int stride, int padding,"
    " bool[] needs) -> Tensor[]",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    cast_first=True,
)
register_autograd(conv2d_relu, _differentiate, _setup_context)

"""Average pool, 1x1 convolution, bias and ReLU as one operator, for auxiliary classifiers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_inception.geometry import AvgWindow, align_up
from fused_inception.ops.layout import empty_channels_last, gradients_like, settle_all
from fused_inception.ops.registration import (
    needed_gradients,
    refuse_unsaved,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed

WINDOW = "int kernel, int stride, bool ceil_mode, int grid"


@replayed
def _forward(x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> tuple[Tensor, list[Tensor]]:
    from fused_inception.ops import avg_pool_project_triton

    *numbers, save = options
    return avg_pool_project_triton.forward(x, weight, bias, AvgWindow(*numbers), save)


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor, *options: Any
) -> tuple[Tensor, list[Tensor]]:
    *numbers, save = options
    window = AvgWindow(*numbers)
    n, c, height, width = x.shape
    sides = window.out(height), window.out(width)
    y = x.new_empty((n, weight.shape[0] * sides[0] * sides[1]))
    pooled = empty_channels_last(n, align_up(c), *sides, dtype=x.dtype, device=x.device)
    return y, [pooled] if save else []


@replayed
def _backward(
    dy: Tensor,
    y: Tensor,
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_shape: Sequence[int],
    *options: Any,
) -> list[Tensor]:
    from fused_inception.ops import avg_pool_project_triton

    *numbers, needs = options
    gradients = avg_pool_project_triton.backward(
        dy, y, pooled, weight, bias, tuple(x_shape), AvgWindow(*numbers), needs
    )
    return settle_all(gradients, dy, (weight, bias), needs)


def _backward_fake(
    dy: Tensor,
    y: Tensor,
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_shape: Sequence[int],
    *options: Any,
) -> list[Tensor]:
    return gradients_like(dy.new_empty(x_shape), (weight, bias), options[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, weight, bias, *ctx.window, ctx.saves = inputs
    y, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.shape = x.shape
    if ctx.saves:
        ctx.save_for_backward(weight, bias, y, *saved)


def _differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
    options = (None,) * 5
    if dy is None:
        return (None, None, None, *options)
    refuse_unsaved(ctx.saves)
    weight, bias, y, pooled = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    saved = y, pooled, weight, bias, ctx.shape
    gradients = needed_gradients(
        avg_pool2d_conv1x1_relu_backward, dy, *saved, *ctx.window, needs=needs
    )
    return (*gradients, *options)


avg_pool2d_conv1x1_relu, avg_pool2d_conv1x1_relu_backward = register_with_backward(
    "avg_pool2d_conv1x1_relu",
    f"(Tensor x, Tensor weight, Tensor bias, {WINDOW}, bool save) -> (Tensor, Tensor[])",
    "(Tensor dy, Tensor y, Tensor pooled, Tensor weight, Tensor bias, SymInt[] x_shape,"
    f" {WINDOW}, bool[] needs) -> Tensor[]",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    cast_first=True,
)
register_autograd(avg_pool2d_conv1x1_relu, _differentiate, _setup_context)

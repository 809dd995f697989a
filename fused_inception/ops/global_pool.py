"""Global average pooling, with dropout behind it or without, as an operator.

The caller draws what dropout keeps: the operator itself gives the same for the same arguments.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_inception.ops.layout import empty_channels_last
from fused_inception.ops.registration import (
    call_below_autograd,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed


@replayed
def _forward(x: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    from fused_inception.ops import global_pool_triton

    return global_pool_triton.forward(x, kept, scale)


def _forward_fake(x: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    n, c, _, _ = x.shape
    return empty_channels_last(n, c, 1, 1, dtype=x.dtype, device=x.device)


@replayed
def _backward(dy: Tensor, kept: Tensor | None, scale: float, x_shape: Sequence[int]) -> Tensor:
    from fused_inception.ops import global_pool_triton

    return global_pool_triton.backward(dy, kept, scale, tuple(x_shape))


def _backward_fake(dy: Tensor, kept: Tensor | None, scale: float, x_shape: Sequence[int]) -> Tensor:
    n, c, h, w = x_shape
    return empty_channels_last(n, c, h, w, dtype=dy.dtype, device=dy.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    x, kept, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.shape = x.shape
    ctx.save_for_backward(kept)


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None, None]:
    if dy is None:
        return None, None, None
    (kept,) = ctx.saved_tensors
    dx = call_below_autograd(global_avg_pool2d_backward, dy, kept, ctx.scale, ctx.shape)
    return dx, None, None


global_avg_pool2d, global_avg_pool2d_backward = register_with_backward(
    "global_avg_pool2d",
    "(Tensor x, Tensor? kept, float scale) -> Tensor",
    "(Tensor dy, Tensor? kept, float scale, SymInt[] x_shape) -> Tensor",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    cast_first=False,
)
register_autograd(global_avg_pool2d, _differentiate, _setup_context)

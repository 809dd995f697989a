"""Global average pooling as an operator."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fused_inception.ops.layout import channels_last, empty_channels_last
from fused_inception.ops.registration import (
    refuse_double_backward,
    register,
    register_autocast,
    register_autograd,
)


def _forward(x: Tensor, impl: str) -> Tensor:
    if impl == "triton":
        from fused_inception.ops import global_pool_triton

        return global_pool_triton.forward(x)
    # 16-bit means are accumulated in fp32
    return channels_last(x.mean((2, 3), keepdim=True))


def _forward_fake(x: Tensor, impl: str) -> Tensor:
    n, c, _, _ = x.shape
    return empty_channels_last(n, c, 1, 1, dtype=x.dtype, device=x.device)


def _backward(dy: Tensor, x_shape: Sequence[int], impl: str) -> Tensor:
    if impl == "triton":
        from fused_inception.ops import global_pool_triton

        return global_pool_triton.backward(dy, tuple(x_shape))
    n, c, h, w = x_shape
    dx = empty_channels_last(n, c, h, w, dtype=dy.dtype, device=dy.device)
    return dx.copy_(dy / (h * w))


def _backward_fake(dy: Tensor, x_shape: Sequence[int], impl: str) -> Tensor:
    n, c, h, w = x_shape
    return empty_channels_last(n, c, h, w, dtype=dy.dtype, device=dy.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.impl = x.shape, impl


def _differentiate(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
    if dy is None:
        return None, None
    return global_avg_pool2d_backward(dy, ctx.shape, ctx.impl), None


global_avg_pool2d = register(
    "global_avg_pool2d",
    "(Tensor x, str impl) -> Tensor",
    implementation=_forward,
    fake=_forward_fake,
)
global_avg_pool2d_backward = register(
    "global_avg_pool2d_backward",
    "(Tensor dy, SymInt[] x_shape, str impl) -> Tensor",
    implementation=_backward,
    fake=_backward_fake,
)
register_autograd(global_avg_pool2d, _differentiate, _setup_context)
refuse_double_backward(global_avg_pool2d_backward, "fused_inception.reference.global_avg_pool2d")
register_autocast(global_avg_pool2d, cast_first=False)
register_autocast(global_avg_pool2d_backward, cast_first=False)

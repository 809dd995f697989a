"""A yardstick for TF32: PyTorch's own operators on operands that are cut to TF32.

A library chooses for itself where it computes in TF32, and is no yardstick for who always does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# of fp32's 23 bits behind the point tensor cores read the first 10
DROPPED = 13


def cut(x: Tensor) -> Tensor:
    """`x` as a tensor core reads it."""
    assert x.dtype == torch.float32
    return (x.contiguous().view(torch.int32) & -(1 << DROPPED)).view(torch.float32).view_as(x)


class _Convolution(torch.autograd.Function):
    """A convolution whose three products, of forward and backward, are of cut operands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
    ) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.options = options
        ctx.has_bias = bias is not None
        return F.conv2d(cut(x), cut(weight), bias, **options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = map(cut, ctx.saved_tensors)
        dx = torch.nn.grad.conv2d_input(x.shape, weight, cut(dy), **ctx.options)
        dw = torch.nn.grad.conv2d_weight(x, weight.shape, cut(dy), **ctx.options)
        return dx, dw, dy.sum((0, 2, 3)) if ctx.has_bias else None, None


class Products(TorchFunctionMode):
    """Inside, `F.conv2d` multiplies as TF32 does, whichever of IEEE and TF32 PyTorch takes for the
    products of cut operands."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.conv2d:
            names = ("stride", "padding", "dilation", "groups")
            x, weight, bias, *rest = args
            options = {**dict(zip(names, rest, strict=False)), **(kwargs or {})}
            return _Convolution.apply(x, weight, options.pop("bias", bias), options)
        return func(*args, **(kwargs or {}))

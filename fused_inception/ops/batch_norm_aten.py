"""BatchNorm in training with PyTorch's own operator, and its gradient."""

import torch
from torch import Tensor

from fused_inception.ops.layout import channels_last
from fused_inception.ops.running import Running

aten = torch.ops.aten


def statistics_dtype(x: Tensor) -> torch.dtype:
    """fp32 for 16-bit maps, else their own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def forward(
    z: Tensor, gamma: Tensor | None, beta: Tensor | None, running: Running, layer: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """batch norm(z), the mean and the inverse deviation; the running statistics are updated."""
    dtype = statistics_dtype(z)
    mean, var, counter = running.of(layer)
    momentum = running.momentum
    if counter is not None:
        momentum = 1.0 / counter.item()
    weight, bias = parameters(gamma, beta, z)
    if mean is None or var is None:
        y, mean, inverse = aten.native_batch_norm.default(
            z, weight, bias, None, None, True, 0.0, eps
        )
        return channels_last(y), mean, inverse
    # PyTorch mixes fp32 parameters with 16-bit maps, and nothing else
    copy = running.skip
    new = mean.to(dtype, copy=copy), var.to(dtype, copy=copy)
    y, batch_mean, inverse = aten.native_batch_norm.default(
        z, weight, bias, *new, True, momentum or 0.0, eps
    )
    _update((mean, var), new, running.skip)
    return channels_last(y), batch_mean, inverse


def parameters(gamma: Tensor | None, beta: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and beta in the dtype of the statistics, 1 and 0 where there are none."""
    dtype, channels = statistics_dtype(z), z.shape[1]
    return (
        z.new_ones(channels, dtype=dtype) if gamma is None else gamma.to(dtype),
        z.new_zeros(channels, dtype=dtype) if beta is None else beta.to(dtype),
    )


def _update(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], skip: bool) -> None:
    mean, var = new
    finite = torch.isfinite(mean) & torch.isfinite(var) if skip else None
    for target, value in zip(old, (mean, var), strict=True):
        if finite is not None:
            target.copy_(torch.where(finite, value.to(target.dtype), target))
        elif value is not target:
            target.copy_(value)


def backward(
    g: Tensor,
    z: Tensor,
    gamma: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    eps: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of z, gamma and beta where `needs` asks for them."""
    scale, _ = parameters(gamma, None, z)
    return aten.native_batch_norm_backward.default(
        g, z, scale, None, None, mean, inverse, True, eps, list(needs)
    )

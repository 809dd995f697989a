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
    weight, bias = _or_constant(gamma, z, 1.0), _or_constant(beta, z, 0.0)
    if mean is None or var is None:
        y, mean, inverse = aten.native_batch_norm.default(
            z, weight, bias, None, None, True, 0.0, eps
        )
        return channels_last(y), mean, inverse
    # PyTorch mixes fp32 parameters with 16-bit maps, and nothing else
    new = mean, var
    if running.skip or mean.dtype != dtype or var.dtype != dtype:
        new = mean.to(dtype, copy=running.skip), var.to(dtype, copy=running.skip)
    y, batch_mean, inverse = aten.native_batch_norm.default(
        z, weight, bias, *new, True, momentum or 0.0, eps
    )
    _update((mean, var), new, running.skip)
    return channels_last(y), batch_mean, inverse


def _or_constant(vector: Tensor | None, z: Tensor, value: float) -> Tensor:
    """gamma or beta in the dtype of the statistics, `value` where there is none."""
    dtype = statistics_dtype(z)
    if vector is None:
        return z.new_full((z.shape[1],), value, dtype=dtype)
    # a call of `to` costs some microseconds, also where there is nothing to do
    return vector if vector.dtype == dtype else vector.to(dtype)


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
    scale = _or_constant(gamma, z, 1.0)
    return aten.native_batch_norm_backward.default(
        g, z, scale, None, None, mean, inverse, True, eps, list(needs)
    )

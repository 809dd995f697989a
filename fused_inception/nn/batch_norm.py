"""What a fused operator is told of `nn.BatchNorm2d` layers, read from them at every call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.nn.tensors import tensor_of

OPTIONS = ("training", "eps", "momentum", "track_running_stats")
TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def mixture_of(norms: list[Any]) -> str | None:
    """Why BatchNorm layers cannot run as one operator: they differ, or in training write to the
    same statistics; None where they can."""
    tensors = [*map(_tensors, norms)]
    present = [tuple([t is not None for t in of]) for of in tensors]
    if len(norms) > 1:
        options = [*map(_options, norms)]
        if any(of.count(of[0]) != len(norms) for of in (options, present)):
            for names, of in ((OPTIONS, options), (TENSORS, present)):
                for name, *values in zip(names, *of, strict=True):
                    if any(value != values[0] for value in values):
                        return f"BatchNorm layers differ in {name}"
        if present[0][2] and norms[0].training and len({id(of[2]) for of in tensors}) < len(norms):
            return "BatchNorm layers share their running statistics"
    weight, bias, mean, variance, _ = present[0]
    if weight != bias:
        return "BatchNorm has one of weight and bias"
    if mean != variance:
        return "BatchNorm has one of running_mean and running_var"
    return None


def arguments_of(norms: list[Any]) -> tuple[tuple[Sequence[Tensor | None], ...], dict[str, Any]]:
    """Running means, running variances, gammas and betas, as functions with BatchNorm take them,
    and the keyword arguments that go with them; the batch's statistics count in eval, too, where
    there are no others."""
    first = norms[0]
    gammas, betas, means, variances, counters = zip(*map(_tensors, norms), strict=True)
    nothing = (None,) * len(norms)
    options = {
        "training": first.training or means[0] is None,
        "momentum": first.momentum,
        "eps": first.eps,
        "batches_tracked": counters if first.training and first.track_running_stats else nothing,
    }
    if first.training and not first.track_running_stats:
        means = variances = nothing
    return (means, variances, gammas, betas), options


def running_of(module: nn.Module) -> list[tuple[Any, Tensor, Tensor]]:
    """The BatchNorm layers inside that a pass will update, with copies of their running statistics,
    for `keep_finite`."""
    return [
        (norm, norm.running_mean.clone(), norm.running_var.clone())
        for norm in module.modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.training
        and norm.track_running_stats
        and norm.running_mean is not None
        and norm.running_var is not None
    ]


@torch.no_grad()
def keep_finite(before: list[tuple[Any, Tensor, Tensor]]) -> None:
    """What `skip_nonfinite` asks of layers that have run one by one: channels whose running
    statistics the pass has made NaN or infinite get the old ones back."""
    for norm, mean, variance in before:
        finite = norm.running_mean.isfinite() & norm.running_var.isfinite()
        for new, old in ((norm.running_mean, mean), (norm.running_var, variance)):
            # .data: the pass has saved these for its backward, which does not read them in
            # training, but would refuse to run if it saw that they were written to
            new.data.copy_(torch.where(finite, new, old))


def _options(norm: Any) -> tuple[Any, ...]:
    return norm.training, norm.eps, norm.momentum, norm.track_running_stats


def _tensors(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    """In the order of TENSORS."""
    own, buffers = norm._parameters, norm._buffers
    try:
        return (
            *(own["weight"], own["bias"]),
            *(buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]),
        )
    except KeyError:  # wrappers keep them elsewhere
        return tuple([tensor_of(norm, name) for name in TENSORS])

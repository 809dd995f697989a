"""What a fused operator is told of `nn.BatchNorm2d` layers, read from them at every call."""

from typing import Any

from torch import Tensor, nn


def mixture_of(norms: list[Any]) -> str | None:
    """Why BatchNorm layers cannot run as one operator: they differ; None where they do not."""
    first = norms[0]
    for name in ("training", "eps", "momentum", "track_running_stats"):
        if any(getattr(norm, name) != getattr(first, name) for norm in norms):
            return f"BatchNorm layers differ in {name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        if len({_tensor(norm, name) is None for norm in norms}) > 1:
            return f"BatchNorm layers differ in {name}"
    for one, other in (("weight", "bias"), ("running_mean", "running_var")):
        if (_tensor(first, one) is None) != (_tensor(first, other) is None):
            return f"BatchNorm has one of {one} and {other}"
    return None


def vectors_of(norms: list[Any]) -> tuple[list[Tensor | None], ...]:
    """Running means, running variances, gammas and betas, as functions with BatchNorm take them."""
    first = norms[0]
    tracked = not first.training or first.track_running_stats
    running = (
        [_tensor(norm, name) if tracked else None for norm in norms]
        for name in ("running_mean", "running_var")
    )
    return (*running, *([_tensor(norm, name) for norm in norms] for name in ("weight", "bias")))


def options_of(norms: list[Any]) -> dict[str, Any]:
    """The keyword arguments that go with them; the batch's statistics count in eval, too, where
    there are no others."""
    first = norms[0]
    training = first.training or _tensor(first, "running_mean") is None
    counted = first.training and first.track_running_stats
    return {
        "training": training,
        "momentum": first.momentum,
        "eps": first.eps,
        "batches_tracked": [
            _tensor(norm, "num_batches_tracked") if counted else None for norm in norms
        ],
    }


def _tensor(norm: nn.BatchNorm2d, name: str) -> Tensor | None:
    # not getattr: attributes that are parameters or buffers take ten times as long to find
    tensors = norm._parameters if name in norm._parameters else norm._buffers
    return tensors.get(name)

"""A model in CUDA graphs: small batches are bound by launches, and a replay is one."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fused_inception.adapters.fuse import check_module
from fused_inception.ops import filter_cache

# as many as PyTorch's own capture of a training step runs ahead
WARM_UPS = 3


def graphed(model: nn.Module, x: Tensor) -> Callable[[Tensor], Any]:
    """`model` for inputs like `x`, with all that it launches replayed as CUDA graphs.

    In training mode it is `torch.cuda.make_graphed_callables(model, (x,))`: one graph for forward
    and one for backward inside one autograd node. `model` itself changes its forward, and is
    returned; loss and optimiser stay outside, gradients of parameters arrive, and accumulate, as
    ever. In eval mode it is a function of its own that runs one graph without gradients, and
    `model` stays as it is.

    A replay reads the parameters and buffers of its own time, so optimiser steps and
    `load_state_dict` are seen: filters are packed, and BatchNorm is folded, in every replay.
    Running statistics advance in every replay of a training graph, and dropout draws anew. What
    replays cannot see are tensors put in the place of those captured (`model.to(...)`, `fuse_`):
    capture again. Buffers and random numbers are as before when this returns. Autocast is captured
    as it is in force here; casts are part of the graphs, not of autocast's cache, which is emptied
    when autocast ends.

    Args:
        model: on one CUDA device, in the mode to capture.
        x: an input of the shape, dtype and device to come; only its metadata must fit later ones.

    Returns:
        The callable. Its results are overwritten by no later call in eval mode; in training mode by
        the next call, as PyTorch has it, and so is the gradient of the input, and what
        `torch.autograd.grad` returns. An input that does not fit raises ValueError in eval mode.

    Raises:
        ValueError: no CUDA tensors, or a hook on `model` in training mode.
        TypeError: `model` is no module.
        RuntimeError: PyTorch could not capture: something in `model` waits for the GPU.
    """
    _check(model, x)
    if not model.training:
        return _GraphedInference(model, x)
    if model._forward_hooks or model._forward_pre_hooks or model._backward_hooks:
        raise ValueError(
            f"a training graph needs a {type(model).__name__} without hooks of its own (those on "
            "its children are captured with it); got a model with hooks"
        )
    with _capturing_on(x.device), _as_before(model, x.device), _without_cached_casts():
        torch.cuda.make_graphed_callables(model, (x,))
    _between_replays(model)
    return model


class _GraphedInference:
    """One forward without gradients."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        # parameters must outlive the graph
        self._model = model
        self._x = torch.empty_like(x).copy_(x.detach())
        self._graph = torch.cuda.CUDAGraph()
        with (
            _capturing_on(x.device),
            torch.no_grad(),
            _as_before(model, x.device),
            _without_cached_casts(),
        ):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    model(self._x)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._y = model(self._x)

    def __call__(self, x: Tensor) -> Any:
        captured = self._x
        if (x.shape, x.dtype, x.device) != (captured.shape, captured.dtype, captured.device):
            raise ValueError(
                f"captured for {tuple(captured.shape)} {captured.dtype} on {captured.device}, got "
                f"{tuple(x.shape)} {x.dtype} on {x.device}"
            )
        with torch.no_grad():
            captured.copy_(x)
            self._graph.replay()
            return pytree.tree_map_only(Tensor, Tensor.clone, self._y)


def _between_replays(model: nn.Module) -> None:
    """Have `model` do before each training replay what a replay cannot see."""
    replay, parameters = model.forward, list(model.parameters())
    own: list[Callable[[], Tensor | None]] = [lambda: None for _ in parameters]

    def forward(*inputs: Tensor) -> Any:
        if not model.training:  # no replay
            return replay(*inputs)
        # a gradient that autograd has taken over is the graph's own, which the replay overwrites
        for i, parameter in enumerate(parameters):
            if parameter.grad is not None and parameter.grad is not own[i]():
                parameter.grad = parameter.grad.clone()
                own[i] = weakref.ref(parameter.grad)
        # running statistics advance without a version
        filter_cache.clear()
        return replay(*inputs)

    model.forward = forward


def _check(model: nn.Module, x: Tensor) -> None:
    """A graph is of one module on one GPU."""
    check_module(model)
    if not isinstance(x, Tensor) or not x.is_cuda:
        came = f"a tensor on {x.device}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"a CUDA graph needs an input on a CUDA device, got {came}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != x.device:
            raise ValueError(
                f"a CUDA graph needs all of the model on {x.device}, where the input is; "
                f"{name} is on {tensor.device}"
            )


@contextmanager
def _capturing_on(device: torch.device) -> Iterator[None]:
    """Inside, `device` is the current one, and captures run on a stream of its own: PyTorch makes
    one stream for all, on the device that was captured first."""
    with torch.cuda.device(device):
        before = torch.cuda.graph.default_capture_stream
        torch.cuda.graph.default_capture_stream = torch.cuda.Stream()
        try:
            yield
        finally:
            torch.cuda.graph.default_capture_stream = before


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Inside, autocast casts parameters at each use: a cast that it keeps would be freed with the
    cache under the graph, and not be made anew from other parameters."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """What warming up changes is put back: running statistics, random numbers."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device]):
        yield
    with torch.no_grad():
        for buffer, before in kept:
            buffer.copy_(before)

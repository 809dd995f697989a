"""One door through which every kernel is launched: device guard, current stream, the record of
launches."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from fused_inception import launches
from fused_inception.kernels import relaunch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own makes and unpacks constants of its language at each call."""
    return -(-a // b)


# is told what was launched, None where Triton itself has to, over which grid, on what
Watcher = Callable[[relaunch.Known | None, tuple[int, ...], tuple[Any, ...]], None]
_only_described = ContextVar("_only_described", default=False)
_watcher: ContextVar[Watcher | None] = ContextVar("_watcher", default=None)


@contextlib.contextmanager
def only_described() -> Iterator[None]:
    """Inside the block, launches on tensors without data are recorded and nothing is compiled; no
    GPU is needed."""
    token = _only_described.set(True)
    try:
        yield
    finally:
        _only_described.reset(token)


@contextlib.contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Inside the block, in this thread, `by` is told of each launch behind it."""
    token = _watcher.set(by)
    try:
        yield
    finally:
        _watcher.reset(token)


def is_watched() -> bool:
    """Whether anybody has to be told of each launch."""
    return launches.is_recording() or _watcher.get() is not None


def run(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    *,
    num_warps: int,
) -> None:
    """Launch `kernel` over `grid` on the device of the first tensor of `args`, on its current
    stream. A tuple of tensors or of integers is one argument.

    `args` are the run-time arguments in the order of the signature, `constants` the `tl.constexpr`
    ones by name. An empty grid launches nothing; tensors without data, of the device "meta", have
    the kernel compiled and no more.
    """
    if 0 in grid:
        return
    if launches.is_recording():
        name = getattr(kernel, "fn", kernel).__name__
        launches.record(name, grid, {**constants, "num_warps": num_warps})
    device = relaunch.device_of(args)
    if device.type == "meta":
        if _only_described.get():
            return
        kernel.warmup(*args, grid=grid, **constants, num_warps=num_warps)
        return
    if is_current(device):
        relaunch.launch(kernel, grid, args, constants, num_warps)
    else:
        with torch.cuda.device(device):
            relaunch.launch(kernel, grid, args, constants, num_warps)
    watcher = _watcher.get()
    if watcher is not None:
        watcher(relaunch.find(kernel, args, constants, num_warps), grid, args)


def is_current(device: torch.device) -> bool:
    """Whether launches go to `device` as things are."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()

"""Replays of scripts: on a GPU as they are, else on CPU tensors, through the interpreter or the
emulator, whichever runs kernels in this process."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fused_inception.kernels import relaunch
from fused_inception.ops import replay
from tests.conftest import EMULATED, INTERPRETED


class _Again:
    """A launch that has run, for other memory."""

    def __init__(
        self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int
    ) -> None:
        self.kernel, self.constants, self.num_warps = kernel, constants, num_warps
        self.dtypes = _dtypes(args)

    def launch(self, grid: tuple[int, ...], stream: int, args: Sequence[Any]) -> None:
        tensors = tuple(map(_tensor_at, args, self.dtypes))
        relaunch.launch(self.kernel, grid, tensors, self.constants, self.num_warps)


def _dtypes(args: Sequence[Any]) -> list[Any]:
    return [_dtypes(a) if type(a) is tuple else getattr(a, "dtype", None) for a in args]


def _tensor_at(arg: Any, dtype: Any) -> Any:
    """What stands where kernels get an address: all from there to the end of the memory."""
    if isinstance(dtype, list):
        return tuple(map(_tensor_at, arg, dtype))
    if dtype is None:
        return arg
    memory, offset = arg
    storage = memory.untyped_storage()
    size = dtype.itemsize
    start = memory.storage_offset() * memory.element_size() + offset
    assert start % size == 0
    whole = torch.empty(0, dtype=dtype)
    return whole.set_(storage, start // size, ((storage.nbytes() - start) // size,), (1,))


def _with_memory(arguments: Sequence[Any], memory: Sequence[Any]) -> list[Any]:
    return [
        (memory[a.slot], a.offset)
        if type(a) is replay.Address
        else tuple(_with_memory(a, memory))
        if type(a) is tuple
        else a
        for a in arguments
    ]


@contextlib.contextmanager
def replaying() -> Iterator[list[replay.Recording]]:
    """Inside the block scripts are replayed; yields the replays, as they run."""
    ran: list[replay.Recording] = []
    replayed = replay.Recording.replay

    def counted(recording: replay.Recording, tensors: Sequence[torch.Tensor]) -> Any:
        ran.append(recording)
        return replayed(recording, tensors)

    launch = relaunch.launch

    def unseen(*arguments: Any) -> None:
        # the interpreter computes with tensors, too
        with _disable_current_modes():
            launch(*arguments)

    on_cpu = (
        mock.patch.object(relaunch, "launch", unseen),
        mock.patch.object(relaunch, "settings", return_value=()),
        mock.patch.object(relaunch, "stream_on", return_value=0),
        mock.patch.object(relaunch, "find", _Again),
        mock.patch.object(replay, "addresses", _with_memory),
    )
    has_gpu = not (INTERPRETED or EMULATED)
    with contextlib.ExitStack() as stack:
        for patch in () if has_gpu else on_cpu:
            stack.enter_context(patch)
        devices = frozenset({"cuda" if has_gpu else "cpu"})
        stack.enter_context(mock.patch.object(replay, "DEVICES", devices))
        stack.enter_context(mock.patch.object(replay.Recording, "replay", counted))
        stack.enter_context(mock.patch.object(replay, "_known", {}))
        stack.enter_context(mock.patch.object(replay, "_never", set()))
        yield ran

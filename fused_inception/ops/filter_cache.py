"""Packed filters of modules that are not being trained, kept until a parameter changes."""

import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Packed = tuple[torch.Tensor, torch.Tensor]
_T = TypeVar("_T")
_Entry = tuple[tuple[object, ...], list["weakref.ref[torch.Tensor]"], Any]

_entries: dict[int, _Entry] = {}
_lock = threading.Lock()


def packed(
    filters: list[torch.Tensor],
    biases: list[torch.Tensor],
    dtype: torch.dtype,
    pack: Callable[[], Packed],
    *,
    save: bool,
) -> Packed:
    """The packed filters and biases, from the cache where that is safe, else from `pack()`."""
    return kept([*filters, *biases], (dtype,), pack, save=save)


def kept(
    tensors: list[torch.Tensor],
    options: tuple[object, ...],
    make: Callable[[], _T],
    *,
    save: bool,
) -> _T:
    """What `make()` makes of `tensors` and `options`, from the cache where that is safe.

    Not safe, so made anew: in grad mode and when a backward will follow (an optimiser step may
    come at any time), under CUDA-graph capture (a replay must see the parameters of its own time),
    for inference tensors (they carry no version). Writes through `.data` do not raise a version:
    call `clear()` after them. A tensor comes first in one kind of thing alone.
    """
    capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if save or torch.is_grad_enabled() or capturing or any(t.is_inference() for t in tensors):
        return make()
    # _version: the public name of the counter that autograd checks saved tensors against does not
    # exist
    key = (*options, *((t.data_ptr(), t._version, t.dtype, t.device, t.stride()) for t in tensors))
    owner = id(tensors[0])
    with _lock:
        entry = _entries.get(owner)
    if entry is not None and entry[0] == key and _same(entry[1], tensors):
        return entry[2]
    result = make()
    # the entry dies with the first tensor, so that a reused address is never mistaken for it
    first = weakref.ref(tensors[0], lambda _: _entries.pop(owner, None))
    with _lock:
        _entries[owner] = (key, [first, *map(weakref.ref, tensors[1:])], result)
    return result


def _same(refs: list["weakref.ref[torch.Tensor]"], tensors: list[torch.Tensor]) -> bool:
    return all(ref() is t for ref, t in zip(refs, tensors, strict=True))


def clear() -> None:
    """Forget all packed filters: needed only after writes that bypass version counters
    (`.data`)."""
    with _lock:
        _entries.clear()

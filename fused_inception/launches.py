"""The record of Triton launches: kernels write to it, `explain` and tests read it. A leaf."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_lock = threading.Lock()
# replaced, never changed in place: `record` may iterate while another thread enters or leaves
_recorders: tuple[list["Launch"], ...] = ()


@dataclass(frozen=True)
class Launch:
    """One launch of one of our Triton kernels."""

    kernel: str
    grid: tuple[int, ...]
    config: dict[str, Any]


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect our Triton launches, in order, from all threads; backward runs in threads of its own.

    Yields a list that grows with every launch until the block is left. Blocks nest: an outer one
    also sees what an inner one sees. The replay of a CUDA graph launches nothing from the host and
    so records nothing; the ATen path has no Triton launches at all.
    """
    launches: list[Launch] = []
    global _recorders
    with _lock:
        _recorders = (*_recorders, launches)
    try:
        yield launches
    finally:
        with _lock:
            # by identity: two empty lists are equal
            _recorders = tuple(r for r in _recorders if r is not launches)


def is_recording() -> bool:
    """Whether a `record_launches` block is open: where none is, nothing need be put together for
    `record`."""
    return bool(_recorders)


def record(kernel: str, grid: tuple[int, ...], config: Mapping[str, Any]) -> None:
    """Tell every open `record_launches` block of a launch."""
    launch = Launch(kernel, tuple(grid), dict(config))
    for launches in _recorders:
        launches.append(launch)

"""How long several pieces of work take, measured in turn in one process."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

ROUND_SECONDS = 0.02  # a round is about this long: its one synchronisation is below 0.1 % of it
MOST_CALLS = 1000
MOST_GRAPHS = 8  # forwards that a round of backwards keeps
WARM_UP = 3


@dataclass(frozen=True)
class Work:
    """What is timed: `run` with what `prepare` returned before the clock started.

    `allocates`: a call takes its memory from PyTorch's allocator, so that its peak can be read; the
    replay of a CUDA graph does not.
    """

    prepare: Callable[[], Any] | None
    run: Callable[[Any], Any]
    allocates: bool = True


def now(device: torch.device) -> float:
    """Seconds, once all work on the device has ended."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def cudnn_search(on: bool = True) -> Iterator[None]:
    """Inside, cuDNN tries its algorithms, for everybody: what the library can do is what it does
    after that; or it takes its first guess."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def timed(piece: Work, calls: int, device: torch.device) -> float:
    """Seconds of a call: wall clock over `calls` of them and one synchronisation."""
    states = [piece.prepare() if piece.prepare else None for _ in range(calls)]
    start = now(device)
    while states:
        # a graph is freed when its backward has run, as in training
        piece.run(states.pop())
    return (now(device) - start) / calls


def peak_bytes(piece: Work, device: torch.device) -> int | None:
    """Most device memory that one call needs beyond what was allocated; None where it cannot be
    read, as on a CPU."""
    if device.type != "cuda" or not piece.allocates:
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed(piece, 1, device)
    return torch.cuda.max_memory_allocated(device) - before


def calls_per_round(piece: Work, device: torch.device) -> int:
    """As many as fill ROUND_SECONDS, as far as memory allows."""
    seconds = min(timed(piece, 1, device) for _ in range(WARM_UP))
    calls = min(MOST_CALLS, math.ceil(ROUND_SECONDS / seconds))
    if piece.prepare:
        calls = min(calls, MOST_GRAPHS)
        if peak := peak_bytes(piece, device):
            free, _ = torch.cuda.mem_get_info(device)
            calls = min(calls, max(1, free // (2 * peak)))
    return calls


def in_turn(
    pieces: Mapping[str, Work],
    calls: Mapping[str, int],
    device: torch.device,
    seconds: float,
    min_rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a call, round by round.

    In every round each piece has its turn, the last first in every other one, until each has run
    for `seconds` and `min_rounds`: what disturbs the machine disturbs all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    spent = dict.fromkeys(pieces, 0.0)
    order = list(pieces)
    while pieces and (min(spent.values()) < seconds or len(samples[order[0]]) < min_rounds):
        for name in order:
            sample = timed(pieces[name], calls[name], device)
            samples[name].append(sample)
            spent[name] += sample * calls[name]
        order.reverse()
    return samples


@dataclass(frozen=True)
class Spread:
    """Median of some samples, and what a fifth of them stays below and above."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        """At least two samples."""
        p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), p20, p80)

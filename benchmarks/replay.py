"""Samples that were measured in turn, given to pytest-benchmark as if it had taken them."""

from collections.abc import Sequence

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fused_inception.tools.timing import Work, timed


class ReplayedClock:
    """Time as pytest-benchmark is shown it.

    pytest-benchmark times one test after another, but providers are to be measured in turn: the
    first test of a group measures all of them, and each test replays its own samples.
    """

    seconds = 0.0

    def advance(self, seconds: float) -> None:
        """As if something had just taken so long."""
        self.seconds += seconds


CLOCK = ReplayedClock()


def replayed_seconds() -> float:
    """The timer that pytest-benchmark reads; its name stands in the results."""
    return CLOCK.seconds


def replay(
    benchmark: BenchmarkFixture, samples: Sequence[float], piece: Work, device: torch.device
) -> None:
    """Let the clock show `samples`, one a round; `piece` is what they are samples of."""
    left = iter(samples)

    def turn() -> None:
        sample = next(left, None)
        if sample is None:
            # --benchmark-cprofile calls it once more
            sample = timed(piece, 1, device)
        CLOCK.advance(sample)

    benchmark.pedantic(turn, rounds=len(samples))

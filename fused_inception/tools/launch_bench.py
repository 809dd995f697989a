"""Times of launches under a configuration that is tried, in calls of our operators."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_inception.backend import backend
from fused_inception.ops import measured
from fused_inception.ops.ahead import Call
from fused_inception.tuning import dispatch, table
from fused_inception.tuning.chosen import Problem
from fused_inception.tuning.targets import Target

SAMPLE_SECONDS = 0.005
SAMPLES = 7
# of the norm of the result: two orders of summation differ by far less, wrong tiles by far more
TOLERANCE = 0.05

Arguments = tuple[Any, ...]
Timer = Callable[[Callable[[], object]], float]


def graph_seconds(work: Callable[[], object]) -> float:
    """Seconds of one `work` on the current CUDA device, from replays of a CUDA graph: the median of
    SAMPLES."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(replays: int) -> float:
        first.record()
        for _ in range(replays):
            graph.replay()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / replays

    seconds(2)
    replays = max(1, math.ceil(SAMPLE_SECONDS / max(1e-6, seconds(3))))
    return statistics.median(seconds(replays) for _ in range(SAMPLES))


class LaunchBench:
    """`search.Bench` for one problem, in the calls that look it up.

    Args:
        timer: seconds of some work; `graph_seconds` on a GPU.
        workers: processes that compile.
    """

    def __init__(
        self,
        problem: Problem,
        calls: Sequence[tuple[Call, Arguments]],
        timer: Timer,
        workers: int,
    ) -> None:
        self.problem = problem
        self.calls = calls
        self.timer = timer
        self.workers = workers
        self._expected: list[Tensor] | None = None
        self.error: str | None = None  # of the first configuration that failed

    def usable(self, configs: list[Any]) -> list[Any]:
        """Those whose kernels compile and do not spill."""
        from fused_inception.ops.ahead_triton import compile_kernels, kernels_of

        needs = {}
        for config in configs:
            with self._trying(config):
                needs[config] = kernels_of([call for call, _ in self.calls], self.problem.target)
        specs = list(dict.fromkeys(spec for needed in needs.values() for spec in needed))
        compile_kernels(specs, self.workers)
        # one that failed is not on the disk
        bad = {spec for spec in specs if not spec.on_disk() or not spec.fits()}
        return [config for config, needed in needs.items() if bad.isdisjoint(needed)]

    def seconds(self, config: Any) -> float:
        """The time of the calls; infinite where one fails or computes something else.

        Raises:
            RuntimeError: the device no longer answers.
        """
        with self._trying(config):
            try:
                if not self._agrees():
                    return math.inf
                return sum(self.timer(work(call, args)) for call, args in self.calls)
            except Exception as error:
                self.error = self.error or f"{type(error).__name__}: {error}"
                # whatever a candidate fails of, it is out of the search, unless the device is too
                first = next(arg for arg in self.calls[0][1] if isinstance(arg, Tensor))
                torch.zeros(1, device=first.device).item()
                return math.inf

    def _trying(self, config: Any) -> Any:
        problem = self.problem
        fields = dataclasses.asdict(config)
        return table.trying(problem.family, problem.key, problem.target, fields)

    def _agrees(self) -> bool:
        """Whether the results are those of the first configuration, the heuristic's."""
        got = [y for call, args in self.calls for y in call.results(args)]
        if self._expected is None:
            if not all(y.isfinite().all() for y in got):
                raise ArithmeticError("results are not finite")
            self._expected = got
        return all(
            (a.double() - b.double()).norm() <= TOLERANCE * b.double().norm()
            for a, b in zip(got, self._expected, strict=True)
        )


def work(call: Call, args: Arguments) -> Callable[[], object]:
    """The call, to be timed."""
    return lambda: call.results(args)


def library_speed_ups(
    key: table.Key, target: Target, calls: Sequence[tuple[Call, Arguments]], timer: Timer
) -> dict[str, float]:
    """Time of ours / time of the library's way, of each part of the problem that these calls have:
    whole calls, with that part alone computed by the library."""
    kind = str(key[0])
    parts = dispatch.CONV_PARTS if kind.startswith("conv2d") else dispatch.MODULE_PARTS
    found = {}
    for backward in (False, True):
        chosen = [pair for pair in calls if pair[0].backward == backward]
        if not chosen:
            continue

        def seconds(of: Sequence[str], pairs: Sequence[Any] = tuple(chosen)) -> float:
            with dispatch.forced(of):
                return sum(timer(work(call, args)) for call, args in pairs)

        ours = seconds(())
        for part in parts:
            if part.endswith("forward") != backward:
                found[part] = ours / seconds((part,))
    return found


def plain_speed_up(call: measured.Call, timer: Timer) -> float:
    """Time of the kernels / time of plain PyTorch, of a whole function; with its backward in
    training."""

    def seconds(name: str) -> float:
        with backend(name):
            return timer(call.run)

    return seconds("triton") / seconds("torch")

"""What is to be reached on an H200 in bf16, and whether it has been."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from benchmarks.measured import Measured, Race
from benchmarks.providers import PROVIDERS

# torch.compile in its modes, in CUDA graphs and not; its searches among them
COMPILED = tuple(name for name, p in PROVIDERS.items() if p.compiled)
SEARCHED = tuple(name for name in COMPILED if name.startswith("max-autotune"))
EAGER = ("eager", "eager-graph")
OURS = ("fused", "fused-graph")


@dataclass(frozen=True)
class Figure:
    """A measured number, and what it was measured of where there was a choice."""

    value: float
    of: str = ""


@dataclass(frozen=True)
class Target:
    """One line: `measure` gives a figure, or None where it was not measured.

    `most`: the number is to be at most, not at least, what is wanted.
    """

    text: str
    wanted: float
    aim: float
    unit: str
    measure: Callable[[Measured], Figure | None]
    most: bool = False

    def line(self, measured: Measured) -> str:
        """Measured, target, met or not."""
        figure = self.measure(measured)
        limit = f"{'at most' if self.most else 'at least'} {self._show(self.wanted)}"
        if figure is None:
            return f"{self.text}: not measured ({limit})"
        value = figure.value
        shown = self._show(value)
        verdict = "met"
        if not self.met(value):
            verdict = "NOT met"
            shown = f"{told_from(self.wanted, value)}{self.unit}"
        if self.met(value) and (value <= self.aim if self.most else value >= self.aim):
            verdict = f"met, and the aim of {self._show(self.aim)} too"
        of = f"; {figure.of}" if figure.of else ""
        return f"{self.text}: {shown} ({limit}): {verdict}{of}"

    def met(self, value: float) -> bool:
        """The number is as wanted."""
        return value <= self.wanted if self.most else value >= self.wanted

    def _show(self, value: float) -> str:
        return f"{value:.3g}{self.unit}"


def told_from(limit: float, value: float, digits: int = 3, kind: str = "g") -> str:
    """`value`, which is another number than `limit`, in `digits` or as many as show that."""
    while float(shown := f"{value:.{digits}{kind}}") == limit:
        digits += 1
    return shown


def _network(
    direction: str, batches: tuple[int, ...], names: tuple[str, ...]
) -> Callable[[Measured], Figure | None]:
    """Over the fastest of `names`, at the worst of the batches: on both sides the better of a CUDA
    graph and none, among those that took turns."""

    def speedup(race: Race) -> Figure | None:
        ours, other = race.fastest(OURS), race.fastest(names)
        if ours is None or other is None:
            return None
        of = f"{ours.provider} against {other.provider} at N={ours.batch}"
        return Figure(other.median_s / ours.median_s, of)

    def measure(measured: Measured) -> Figure | None:
        worst = []
        for batch in batches:
            wanted = ("network", "paper", batch, direction, "bf16")
            some = [race for race in measured.races if race.problem.problem == wanted]
            figures = [figure for race in some if (figure := speedup(race)) is not None]
            if not figures:
                return None
            worst += figures
        return min(worst, key=lambda figure: figure.value)

    return measure


def _least(values: Iterable[float]) -> Figure | None:
    value = min(values, default=None)
    return None if value is None else Figure(value)


def _conv_rate(case: str) -> Callable[[Measured], Figure | None]:
    def measure(measured: Measured) -> Figure | None:
        found = measured.select("kernels", case, direction="forward", batches=[256], dtype="bf16")
        return _least(c.ours.flops / c.ours.median_s / 1e12 for c in found if not c.graph)

    return measure


def _memory(names: tuple[str, ...]) -> Callable[[Measured], Figure | None]:
    def measure(measured: Measured) -> Figure | None:
        shares = [
            c.ours.peak_bytes / row.peak_bytes
            for c in measured.select(
                "network", "paper", direction="step", batches=[256], dtype="bf16"
            )
            for name, row in c.others.items()
            if name in names and row.peak_bytes and c.ours.peak_bytes is not None
        ]
        return Figure(max(shares)) if shares else None

    return measure


def module_speedups(measured: Measured) -> dict[tuple[str, int, str, str, bool], float]:
    """Of each module, batch, direction, dtype, in a graph or not: over the best of all others."""
    found: dict[tuple[str, int, str, str, bool], float] = {}
    for contest in measured.select("modules"):
        row = contest.ours
        key = row.case, row.batch, row.direction, row.dtype, contest.graph
        speedups = [contest.speedup(name) for name in contest.others]
        if speedups:
            found[key] = min([*speedups, found.get(key, float("inf"))])
    return found


def _slowest_module(measured: Measured) -> Figure | None:
    return _least(v for key, v in module_speedups(measured).items() if key[3] == "bf16")


TARGETS = (
    Target("training step, N=256, over torch.compile max-autotune", 2.0, 2.5, "x",
           _network("step", (256,), SEARCHED)),
    Target("training step, N=256, over eager channels last", 3.0, 4.0, "x",
           _network("step", (256,), EAGER)),
    Target("training step, N=32, over torch.compile", 2.1, 2.5, "x",
           _network("step", (32,), COMPILED)),
    Target("training step, N=1 and 8, over torch.compile", 3.0, 4.9, "x",
           _network("step", (1, 8), COMPILED)),
    Target("inference, N=1, over torch.compile", 3.0, 3.7, "x",
           _network("forward", (1,), COMPILED)),
    Target("inference, N=32 and 256, over torch.compile", 1.3, 1.5, "x",
           _network("forward", (32, 256), COMPILED)),
    Target("3x3 implicit GEMM, N=256", 400.0, 560.0, " TFLOP/s", _conv_rate("conv2d_relu_3x3")),
    Target("5x5 implicit GEMM, N=256", 400.0, 560.0, " TFLOP/s", _conv_rate("conv2d_relu_5x5")),
    Target("peak memory of a training step, N=256, of eager's", 0.25, 0.25, "",
           _memory(EAGER), most=True),
    Target("peak memory of a training step, N=256, of torch.compile's", 0.5, 0.5, "",
           _memory(COMPILED), most=True),
    Target("every module, direction and batch measured, over the best other", 1.0, 1.0, "x",
           _slowest_module),
)  # fmt: skip

"""The report's pictures, from measured rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import Measured
from benchmarks.problems import DIRECTIONS
from benchmarks.targets import module_speedups

DPI = 110


def draw(measured: Measured, folder: Path) -> list[str]:
    """Write what there are results for; the names of the files."""
    pictures = {
        "speedup.png": _speedups(measured),
        "roofline.png": _roofline(measured),
        "memory.png": _memory(measured),
    }
    for name, figure in pictures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=DPI)
    return [name for name, figure in pictures.items() if figure is not None]


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def _speedups(measured: Measured) -> Any:
    """Modules along, a line a batch, a panel a direction and norm."""
    speedups = module_speedups(measured)
    if not speedups:
        return None
    dtypes = sorted({key[3] for key in speedups})
    rows = [(dtype, norm) for dtype in dtypes for norm in (False, True)]
    rows = [r for r in rows if any((r[0], r[1]) == (k[3], k[0].endswith("-bn")) for k in speedups)]
    # backward has no graphs: a colour means the same in panels that lack a line
    series = sorted({(batch, graph) for _, batch, _, _, graph in speedups})
    figure = _figure(12, 1.4 + 2.6 * len(rows), f"Speed-up over the best other, {measured.device}")
    lines: dict[str, Any] = {}
    panels = figure.subplots(len(rows), len(DIRECTIONS), squeeze=False, sharey="row")
    for (dtype, norm), line in zip(rows, panels, strict=True):
        for direction, axes in zip(DIRECTIONS, line, strict=True):
            some = {
                (case.removesuffix("-bn"), batch, graph): value
                for (case, batch, way, of, graph), value in speedups.items()
                if (way, of, case.endswith("-bn")) == (direction, dtype, norm)
            }
            cases = sorted({case for case, _, _ in some})
            for i, (batch, graph) in enumerate(series):
                points = [(c, some[c, batch, graph]) for c in cases if (c, batch, graph) in some]
                name = f"N = {batch}{', graphs' if graph else ''}"
                drawn = axes.plot(
                    [cases.index(c) for c, _ in points],
                    [value for _, value in points],
                    marker="o", markersize=3.5, linestyle="--" if graph else "-",
                    color=f"C{i}", label=name,
                )  # fmt: skip
                lines.setdefault(name, *drawn)
            axes.axhline(1.0, color="black", linewidth=0.8)
            axes.set_xticks(range(len(cases)), cases)
            axes.set_title(f"{direction}, {'BatchNorm' if norm else 'bias'}, {dtype}", fontsize=10)
            axes.grid(alpha=0.3)
        # the panels of a line share it
        most = max(v for k, v in speedups.items() if (k[3], k[0].endswith("-bn")) == (dtype, norm))
        line[0].set(ylabel="times as fast", ylim=(0, 1.1 * max(1.0, most)))
    figure.legend(handles=lines.values(), loc="outside lower center", ncols=len(lines), fontsize=8)
    return figure


def _roofline(measured: Measured) -> Any:
    """FLOP/s over FLOPs by byte of what is read and written at least, of modules and operators."""
    points: dict[str, list[tuple[float, float]]] = {}
    for contest in measured.contests:
        row = contest.ours
        if row.group == "network" or not row.flops:
            continue
        for name in ("fused", "eager"):
            name += "-graph" * contest.graph
            if name in contest.rows:
                rate = row.flops / contest.rows[name].median_s
                points.setdefault(name, []).append((row.flops / row.bytes, rate))
    if not points:
        return None
    figure = _figure(7.5, 5, f"Modules, stem and operators, {measured.device}")
    axes = figure.subplots()
    for name, places in points.items():
        ours = name.startswith("fused")
        marker = ("^" if ours else "v") if name.endswith("-graph") else ("o" if ours else "x")
        axes.scatter(*zip(*places, strict=True), s=16, alpha=0.7, marker=marker, label=name,
                     color="C0" if ours else "C1")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP by byte of inputs and outputs",
             ylabel="FLOP/s")  # fmt: skip
    _roofs(axes, measured, [x for places in points.values() for x, _ in places])
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _roofs(axes: Any, measured: Measured, intensities: Sequence[float]) -> None:
    """The measured ceilings; none where they were not measured."""
    copy, gemm = measured.ceiling("copy"), measured.ceiling("bf16 GEMM, library")
    if copy is None or gemm is None:
        return
    knee = gemm / copy
    ends = sorted((min(*intensities, knee / 2), knee, max(*intensities, 2 * knee)))
    axes.plot(ends, [min(copy * x, gemm) for x in ends], color="black", linewidth=1,
              label="measured copy and bf16 GEMM")  # fmt: skip


def _memory(measured: Measured) -> Any:
    """Peak of a network's training step, a group of bars a batch."""
    peaks: dict[tuple[str, str], dict[int, dict[str, int]]] = {}
    for contest in measured.select("network", direction="step"):
        for name, row in contest.rows.items():
            if row.peak_bytes is not None:
                network = peaks.setdefault((row.case, row.dtype), {})
                network.setdefault(row.batch, {})[name] = row.peak_bytes
    if not peaks:
        return None
    figure = _figure(10, 0.6 + 3.2 * len(peaks), f"Peak memory of a step, {measured.device}")
    panels = figure.subplots(len(peaks), 1, squeeze=False)[:, 0]
    for axes, ((case, dtype), batches) in zip(panels, sorted(peaks.items()), strict=True):
        names = list(dict.fromkeys(name for found in batches.values() for name in found))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = [batches[b].get(name) for b in sorted(batches)]
            places = [(j, peak) for j, peak in enumerate(found) if peak is not None]
            axes.bar(
                [j + (i - (len(names) - 1) / 2) * width for j, _ in places],
                [peak / 1e9 for _, peak in places], width, label=name, color=f"C{i}",
            )  # fmt: skip
        axes.set_xticks(range(len(batches)), [f"N = {b}" for b in sorted(batches)])
        axes.set(title=f"{case}, {dtype}", ylabel="GB")
        axes.grid(alpha=0.3, axis="y")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure

"""What `bench` draws: images per second and memory of the model, speed-up and rates of blocks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_inception.tools.bench_rows import BlockResult, Result
from fused_inception.tools.checkpoint import write_atomically

DPI = 120


def draw_models(path: Path, title: str, results: Sequence[Result]) -> None:
    """Images per second, and where it was read the peak of memory: a group of bars a batch, a panel
    a mode."""
    modes = list(dict.fromkeys(r.mode for r in results))
    names = list(dict.fromkeys(r.provider for r in results))
    batches = sorted({r.batch for r in results})
    kinds = ["images/s"] + ["peak memory, MB"] * any(r.peak_bytes is not None for r in results)
    figure = _figure(5 * len(modes), 3.8 * len(kinds), title)
    panels = figure.subplots(len(kinds), len(modes), squeeze=False)
    width = 0.8 / len(names)
    for kind, line in zip(kinds, panels, strict=True):
        for axes, mode in zip(line, modes, strict=True):
            for i, name in enumerate(names):
                bars = [
                    (batches.index(r.batch) + (i - (len(names) - 1) / 2) * width, value)
                    for r in results
                    if (r.mode, r.provider) == (mode, name)
                    and (value := _value(r, kind)) is not None
                ]
                axes.bar([p for p, _ in bars], [v for _, v in bars], width, label=name)
            axes.set_xticks(range(len(batches)), [f"N = {batch}" for batch in batches])
            axes.set(title=mode, ylabel=kind)
            axes.grid(alpha=0.3, axis="y")
            axes.set_axisbelow(True)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=8)
    _save(figure, path)


def draw_speed_ups(path: Path, title: str, results: Sequence[BlockResult]) -> None:
    """How many times as fast as plain PyTorch a fused block is: a line a batch, a panel a mode."""
    blocks = list(dict.fromkeys(r.block for r in results))
    batches = sorted({r.batch for r in results})
    modes = list(dict.fromkeys(r.mode for r in results))
    figure = _figure(max(6.0, 1.5 + 0.45 * len(blocks)), 1.4 + 2.5 * len(modes), title)
    panels = figure.subplots(len(modes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, mode in zip(panels, modes, strict=True):
        for batch in batches:
            some = [r for r in results if (r.mode, r.batch) == (mode, batch)]
            axes.plot(
                [blocks.index(r.block) for r in some], [r.times_as_fast for r in some],
                marker="o", markersize=4, label=f"N = {batch}",
            )  # fmt: skip
        axes.axhline(1.0, color="black", linewidth=0.8)
        most = max(1.0, *(r.times_as_fast for r in results if r.mode == mode))
        axes.set(title=mode, ylabel="times as fast as eager", ylim=(0, 1.1 * most))
        axes.grid(alpha=0.3)
    panels[-1].set_xticks(range(len(blocks)), blocks, rotation=60, ha="right", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(batches), fontsize=8)
    _save(figure, path)


def draw_rates(path: Path, title: str, results: Sequence[BlockResult]) -> None:
    """FLOP/s over FLOPs by byte of each fused block, and of the plain one at the same place."""
    figure = _figure(7.5, 5, title)
    axes = figure.subplots()
    counted = [r for r in results if r.flops and r.bytes]
    for who, marker in (("fused", "o"), ("eager", "x")):
        for i, mode in enumerate(dict.fromkeys(r.mode for r in results)):
            some = [r for r in counted if r.mode == mode]
            seconds = [getattr(r, f"{who}_milliseconds") / 1e3 for r in some]
            axes.scatter(
                [r.flops / r.bytes for r in some if r.flops and r.bytes],
                [r.flops / s for r, s in zip(some, seconds, strict=True) if r.flops],
                s=18, alpha=0.7, marker=marker, color=f"C{i}", label=f"{who}, {mode}",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", ylabel="FLOP/s")
    axes.set_xlabel("FLOP by byte that the fused block's launches read and write")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    _save(figure, path)


def _value(result: Result, kind: str) -> float | None:
    if kind == "images/s":
        return result.images_per_second
    return None if result.peak_bytes is None else result.peak_bytes / 1e6


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))

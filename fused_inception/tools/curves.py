"""Training curves as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_inception.tools.checkpoint import write_atomically


def draw_curves(history: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Write a PNG of loss and accuracy over the epochs of `history`, training and test part."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    # names of folders are no formulas, and need not be text
    figure.suptitle(title.encode(errors="backslashreplace").decode(), parse_math=False)
    panels = figure.subplots(1, 2)
    for axes, name, factor, label in zip(
        panels, ("loss", "accuracy"), (1, 100), ("cross entropy", "accuracy, %"), strict=True
    ):
        for part, colour in (("train", "tab:blue"), ("test", "tab:orange")):
            values = [factor * row[f"{part}_{name}"] for row in history]
            axes.plot(epochs, values, marker="o", markersize=3, color=colour, label=part)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

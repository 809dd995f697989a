"""What pictures must not do: cover their data, or give a colour two meanings."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.measured import Measured
from benchmarks.problems import DIRECTIONS
from benchmarks.providers import contenders
from fused_inception.tools.bench_pictures import draw_speed_ups
from fused_inception.tools.bench_rows import BlockResult
from fused_inception.tools.curves import draw_curves
from tests.test_report import result_file, rows_of


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **options: Any) -> None:
        save(figure, *args, **options)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def legend_beside_axes(figure: Figure) -> bool:
    (legend,) = figure.legends
    box = legend.get_window_extent()
    return not any(axes.get_legend() or axes.bbox.overlaps(box) for axes in figure.axes)


def test_pictures_of_the_report(drawn: list[Figure], tmp_path: Path) -> None:
    """Backward has no graphs, and so fewer lines than the panels beside it."""
    gpu = torch.device("cuda")
    rows = {
        f"{case} {batch} {direction}": {
            "rows": rows_of(
                "modules", case, batch, direction, contenders("modules", batch, direction, gpu)
            )
        }
        for case in ("3a", "3a-bn", "4b")
        for batch in (1, 8, 32)
        for direction in DIRECTIONS
    }
    result_file(tmp_path, "modules", rows)
    assert plots.draw(Measured.read(tmp_path), tmp_path) == ["speedup.png", "roofline.png"]
    speedups, roofline = drawn
    colours: dict[str, set[Any]] = {}
    lines = [line for axes in speedups.axes for line in axes.lines if len(line.get_xdata()) > 0]
    for line in [*lines, *speedups.legends[0].get_lines()]:
        colours.setdefault(str(line.get_label()), set()).add(line.get_color())
    named = {name: found for name, found in colours.items() if name.startswith("N = ")}
    assert len(named) == 5
    assert all(len(found) == 1 for found in named.values()), named
    assert len(set.union(*named.values())) == len(named)
    assert legend_beside_axes(speedups)
    assert legend_beside_axes(roofline)


def test_speed_ups_of_blocks_lie_within_their_panels(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [
        BlockResult(1, mode, block, "Inception", 1.0, fast, None, None)
        for mode, scale in (("forward", 1.0), ("step", 0.1))
        for block, fast in (("3a", 3.0 * scale), ("3b", 2.0 * scale))
    ]
    draw_speed_ups(tmp_path / "x.png", "", rows)
    (figure,) = drawn
    assert [axes.get_ylim() for axes in figure.axes] == [pytest.approx((0, y)) for y in (3.3, 1.1)]
    assert legend_beside_axes(figure)


@pytest.mark.parametrize("epochs", [1, 2])
def test_epochs_are_whole_numbers(epochs: int, drawn: list[Figure], tmp_path: Path) -> None:
    values = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5)
    draw_curves([{"epoch": n, **values} for n in range(1, epochs + 1)], "", tmp_path / "x.png")
    (figure,) = drawn
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks == [*range(1, epochs + 1)]
    assert legend_beside_axes(figure)


@pytest.mark.parametrize("title", [r"$\no$ formula", "a byte that is no UTF-8: \udcff"])
def test_any_name_of_a_folder_is_a_title(title: str, drawn: list[Figure], tmp_path: Path) -> None:
    values = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5)
    draw_curves([{"epoch": 1, **values}], title, tmp_path / "x.png")
    assert drawn[0].get_suptitle() == title.replace("\udcff", r"\udcff")

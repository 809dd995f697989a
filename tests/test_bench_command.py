"""The bench command: table, files, and what it refuses."""

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fused_inception as fi
from fused_inception.__main__ import main
from fused_inception.tools import bench, errors
from fused_inception.tools.timing import Spread, now

HERE = f"{__name__}:"
FAST = ["--image-size", "16", "--seconds", "1e-9", "--device", "cpu"]


def fused_net() -> nn.Module:
    return nn.Sequential(
        fi.ConvBlock(3, 8, kernel_size=3, padding=1), fi.Inception(8, 8, 8, 8, 8, 8, 8)
    )


def plain_net() -> nn.Module:
    return fi.reference.Inception(3, 8, 8, 8, 8, 8, 8, norm="batch")


def not_fusable() -> nn.Module:
    return nn.Conv2d(3, 8, 3)


def run(*arguments: str) -> int:
    return main(["bench", *FAST, *arguments])


@pytest.mark.parametrize("model", ["fused_net", "plain_net"])
def test_table_and_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("--model", HERE + model, "--batch-size", "1,2", "--out", str(out)) == 0
    printed = capsys.readouterr()
    lines = [line.split() for line in printed.out.splitlines()]
    rows = [line for line in lines if line[0] in bench.MODES]
    want = [
        (mode, name, batch) for batch in "12" for mode in bench.MODES for name in ("fused", "eager")
    ]
    assert [tuple(row[:3]) for row in rows] == want
    assert f"torch {torch.__version__}" in printed.out
    assert "batch 2, step" in printed.err
    content = json.loads((out / "bench.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["options"]["batch_size"] == [1, 2]
    with open(out / "bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(content["results"]) == len(want)
    for found, line in zip(content["results"], table, strict=True):
        assert float(line["milliseconds"]) == found["milliseconds"] > 0
        assert found["p20"] <= found["milliseconds"] <= found["p80"]
        expected = found["batch"] / found["milliseconds"] * 1e3
        assert found["images_per_second"] == pytest.approx(expected)
        assert found["peak_bytes"] is None
    fused, eager = content["results"][:2]
    ratio = eager["milliseconds"] / fused["milliseconds"]
    assert (fused["times_as_fast"], eager["times_as_fast"]) == (pytest.approx(ratio), 1.0)
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("mode", "timed"),
    [("inference", ["forward"]), ("step", ["step"]), ("both", ["forward", "step"])],
)
def test_blocks(
    mode: str, timed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fused block beside the plain one on the same input, in the modes that were asked for, in
    a table, files and pictures."""
    out = tmp_path / "out"
    assert run("--model", HERE + "fused_net", "--batch-size", "2", "--mode", mode, "--blocks",
               "--out", str(out)) == 0  # fmt: skip
    printed = capsys.readouterr()
    rows = [line.split() for line in printed.out.splitlines()]
    assert [row[:3] for row in rows if row and row[0] in "01"] == [
        ["0", "ConvBlock", "2"], ["1", "Inception", "2"],
    ]  # fmt: skip
    assert "batch 2, block 1" in printed.err
    blocks = json.loads((out / "bench.json").read_text())["blocks"]
    assert [(b["block"], b["mode"]) for b in blocks] == [
        (name, of_block) for name in "01" for of_block in timed
    ]
    (head,) = [row for row in rows if row[:2] == ["block", "class"]]
    assert [name for name in ("forward", "step") if name in head] == timed
    for found in blocks:
        assert found["fused_milliseconds"] > 0
        assert found["eager_milliseconds"] > 0
    # 256 pixels of two images, 3 -> 8 channels, 3x3; in a step those of the filters' gradients too
    assert blocks[0]["flops"] == {"forward": 1, "step": 2}[timed[0]] * 2 * 2 * 256 * 27 * 8
    with open(out / "blocks.csv", newline="") as file:
        assert [line["block"] for line in csv.DictReader(file)] == [
            name for name in "01" for _ in timed
        ]
    for picture in ("bench.png", "speedup.png", "roofline.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_compiled_model_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[type[nn.Module], str]] = []
    note = lambda self, mode: asked.append((type(self), mode))  # noqa: E731
    monkeypatch.setattr(nn.Module, "compile", note)
    assert run("--model", HERE + "plain_net", "--batch-size", "1", "--compile", "max-autotune",
               "--mode", "inference") == 0  # fmt: skip
    assert asked == [(fi.reference.Inception, "max-autotune")]


def test_what_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fi.Inception.forward
    monkeypatch.setattr(fi.Inception, "forward", lambda self, x: 1.01 * right(self, x))
    monkeypatch.setattr(bench, "measure", lambda *args: pytest.fail("timed"))
    assert run("--model", HERE + "fused_net") == 2
    assert "so it is not timed" in capsys.readouterr().err


class _OnAGpu(torch.Tensor):
    """A CPU tensor that says otherwise."""

    @property
    def is_cuda(self) -> bool:
        return True


@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_timed_is_verified(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU at every batch size, whose launches are its own; in the modes that are timed."""
    seen: list[tuple[int, bool, bool]] = []
    real = bench.sample.prepared

    @contextlib.contextmanager
    def prepared(arguments: Any, batch: int) -> Iterator[tuple[nn.Module, torch.Tensor]]:
        with real(arguments, batch) as (model, x):
            yield model, x.as_subclass(_OnAGpu) if gpu else x

    def verify(model: nn.Module, x: torch.Tensor, *, gradients: bool) -> Any:
        seen.append((len(x), model.training, gradients))
        return SimpleNamespace(ok=True)

    monkeypatch.setattr(bench.sample, "prepared", prepared)
    monkeypatch.setattr(bench, "verify", verify)
    monkeypatch.setattr(bench, "measure", lambda models, x, mode, *_: [result(x, mode)])
    assert run("--model", HERE + "fused_net", "--batch-size", "1,4") == 0
    sizes = (1, 4) if gpu else (1,)
    assert seen == [(n, training, training) for n in sizes for training in (False, True)]


def result(x: torch.Tensor, mode: str) -> bench.Result:
    return bench.Result(len(x), mode, "eager", 1.0, 1.0, 1.0, 1.0, 1.0, None, 0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", HERE + "not_fusable"], "no block of this Conv2d can be fused"),
        (["--model", "nowhere:net"], "No module named 'nowhere'"),
        (["--model", HERE + "nothing"], "has no attribute 'nothing'"),
        (["--model", "lenet"], "take torchvision:googlenet, paper"),
    ],
)
def test_wrong_models(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fused-inception bench: error: ")
    assert message in error


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch-size", "0,1", "0 is not a whole number of 1 or more"),
        ("--batch-size", "a", "a is not a whole number of 1 or more"),
        *[
            ("--seconds", value, f"{value} is not a number above 0")
            for value in ("-1", "0", "nan", "inf", "a")
        ],
    ],
)
def test_wrong_numbers(
    flag: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("--model", "paper", f"{flag}={value}")
    assert stopped.value.code == 2
    assert f"argument {flag}: {message}" in capsys.readouterr().err


def test_a_bar_never_runs_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its total is known before anything is counted; a batch size given twice is measured once."""
    seen: list[tuple[int, int]] = []

    class Bar:
        def __init__(self, total: int, leave: bool) -> None:
            self.total, self.n = total, 0

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def set_description(self, text: str) -> None:
            pass

        def update(self) -> None:
            self.n += 1
            seen.append((self.n, self.total))

    def blocks(fused: nn.Module, *rest: Any) -> list[Any]:
        for name in bench.block_names(fused):
            rest[-1](name)
        return []

    monkeypatch.setattr("tqdm.tqdm", Bar)
    monkeypatch.setattr(bench, "verify", lambda *_, **options: SimpleNamespace(ok=True))
    monkeypatch.setattr(bench, "measure", lambda models, x, mode, *_: [result(x, mode)])
    monkeypatch.setattr(bench, "measure_blocks", blocks)
    assert run("--model", HERE + "fused_net", "--batch-size", "2,2,1,2", "--blocks") == 0
    # verified, two modes, two blocks
    assert seen == [(n, 2 * 5) for n in range(1, 11)]


def test_plots_need_matplotlib_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = errors.find_spec
    without = lambda name: None if name == "matplotlib" else real(name)  # noqa: E731
    monkeypatch.setattr(errors, "find_spec", without)
    monkeypatch.setattr(bench, "measure", lambda *args: [])
    assert run("--model", HERE + "fused_net", "--out", str(tmp_path)) == 2
    assert "matplotlib missing here" in capsys.readouterr().err
    assert run("--model", HERE + "fused_net", "--batch-size", "1") == 0


def test_results_before_an_interruption_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real, modes = bench.measure, iter(["step", "inference"])

    def measure(models: Any, x: Any, mode: str, *rest: Any) -> Any:
        if next(modes, None) is None:
            raise KeyboardInterrupt
        return real(models, x, mode, *rest)

    monkeypatch.setattr(bench, "measure", measure)
    what = ["--model", HERE + "fused_net", "--batch-size", "1,2"]
    assert run(*what, "--out", str(tmp_path / "new")) == 130
    assert "written: bench.json" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "bench.json").read_text())["results"]
    assert {row["batch"] for row in found} == {1}


def test_what_ended_a_run_is_told_where_its_results_are_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(arguments: Any, results: list[Any], *rest: Any) -> None:
        results.append(result(torch.zeros(1), "step"))
        raise errors.UserError("the cause")

    def report(*args: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(bench, "_measure", measure)
    monkeypatch.setattr(bench, "_report", report)
    assert run("--model", HERE + "fused_net") == 2
    printed = capsys.readouterr().err
    assert "results could not be written: no space" in printed
    assert "the cause" in printed


def test_a_folder_that_cannot_be_written_to_fails_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured first"))
    assert run("--model", HERE + "fused_net", "--out", str(tmp_path / "file")) == 2
    assert "nothing can be written to" in capsys.readouterr().err


def test_peaks_of_replayed_graphs_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_bytes", lambda piece, _: 1 if piece.allocates else None)
    models = {"eager": fused_net(), "compile": fused_net()}
    rows = bench.measure(models, torch.randn(1, 3, 8, 8), "step", 0.0, {"compile"})
    assert {row.provider: row.peak_bytes for row in rows} == {"eager": 1, "compile": None}


def test_spread_stays_between_its_samples() -> None:
    spread = Spread.of([1.0, 3.0])
    assert 1.0 <= spread.p20 <= spread.median == 2.0 <= spread.p80 <= 3.0


def test_a_step_passes_over_frozen_parameters() -> None:
    model = fused_net()
    for p in model[0].parameters():
        p.requires_grad_(False)
    rows = bench.measure({"eager": model}, torch.randn(1, 3, 8, 8), "step", 0.0)
    assert [row.provider for row in rows] == ["eager"]
    assert all(p.grad is None for p in model.parameters())


def test_clock_waits_for_any_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    for name in ("cpu", "mps", "cuda"):
        now(torch.device(name))
    assert [device.type for device in waited] == ["mps", "cuda"]

"""Runs of the command train that go on, and what protects those that lie in a folder."""

from pathlib import Path

import pytest
import torch

from fused_inception.__main__ import main
from fused_inception.tools import checkpoint, data, options, run, train
from tests.commands import fails_with

for extra in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(extra)

SMALL = {
    "variant": "torchvision",
    "image_size": 15,
    "aux": False,
    "batch_size": 4,
    "epochs": 3,
    "device": "cpu",
}
FLAGS = ["--image-size", "15", "--variant", "torchvision", "--no-aux", "--batch-size", "4"]


@pytest.fixture
def _untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets as far as a training step has failed."""

    def epoch(*_: object, **__: object) -> None:
        raise AssertionError("trained")

    for tool in (run, train):
        monkeypatch.setattr(tool, "train_epoch", epoch)


def start(out: Path, source: str = "digits") -> Path:
    """The checkpoint of a run that was stopped in its first epoch."""
    given = options.from_flags({**SMALL, "data": source}, None, "", testing=False)
    opened = data.open_data(source, given.image_size)
    out.mkdir(parents=True)
    run.Run(given, opened, torch.device("cpu"), out, None)._save([])
    return out / "checkpoint.pt"


@pytest.mark.usefixtures("_untrained")
def test_another_run_is_not_overwritten(tmp_path, capsys):
    first, second = start(tmp_path / "first"), start(tmp_path / "second")
    before = second.read_bytes()
    resume = ["train", "--resume", str(first.parent)]
    line = fails_with(capsys, [*resume, "--out", str(second.parent)])
    assert f"{second.parent} holds another run than {first}: take another --out" in line
    first.rename(second.with_name("older.pt"))
    line = fails_with(capsys, ["train", "--resume", str(second.with_name("older.pt"))])
    assert "holds another run than" in line
    line = fails_with(capsys, ["train", "--data", "synthetic", *FLAGS, "--out", str(second.parent)])
    assert "holds a run: go on with it by --resume" in line
    assert second.read_bytes() == before
    assert sorted(path.name for path in second.parent.iterdir()) == ["checkpoint.pt", "older.pt"]


@pytest.mark.usefixtures("_untrained")
def test_a_measurement_asks_first_whether_it_can_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    measure = ["train", "--data", "synthetic", *FLAGS, "--out"]
    assert "is a file, not a folder" in fails_with(capsys, [*measure, str(tmp_path / "file")])
    line = fails_with(capsys, [*measure, str(tmp_path / "file" / "below")])
    assert "nothing can be written to" in line


def test_a_run_that_goes_on_elsewhere_is_there_from_the_start(tmp_path, monkeypatch):
    first = start(tmp_path / "first")
    contents = checkpoint.read_checkpoint(first)
    row = {"epoch": 1, "test_accuracy": 0.5}
    torch.save(contents | {"history": [row]}, first)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_epoch", interrupt)
    assert main(["train", "--resume", str(first), "--out", str(tmp_path / "second")]) == 130
    assert checkpoint.read_checkpoint(tmp_path / "second")["history"] == [row]

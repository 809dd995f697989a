"""Runs of the command train that go on, and what protects those that lie in a folder."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_inception.__main__ import main
from fused_inception.tools import checkpoint, data, loop, options, run, train
from tests.commands import fails_with, image_folder

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


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs that train nothing, and no report behind the curves."""
    result = loop.Result(loss=1.0, accuracy=0.5, images=4, seconds=0.5)
    for name in ("train_epoch", "evaluate"):
        monkeypatch.setattr(run, name, lambda *_, **__: result)
    monkeypatch.setattr(run, "modes", lambda *_: [])
    speed = {"fused": 0.3139, "reference": 41.87}
    monkeypatch.setattr(run, "training_speed", lambda *_: speed)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


def start(out: Path, source: str = "digits") -> Path:
    """The checkpoint of a run that was stopped in its first epoch."""
    given = options.from_flags({**SMALL, "data": source}, None, "", testing=False)
    opened = data.open_data(source, given.image_size)
    given = replace(given, data=data.absolute(source))
    out.mkdir(parents=True)
    run.Run(given, opened, torch.device("cpu"), out, None)._save([])
    return out / "checkpoint.pt"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--aux"], "was trained with --no-aux, not --aux: leave out --aux, or start"),
        (["--limit", "8"], "was trained without --limit, not with it: leave out --limit, or"),
        (["--flip"], "was trained without --flip, not with it: leave out --flip, or"),
        (["--lr", "0.5"], "was trained with --lr 0.01, not 0.5: leave out --lr, or"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_flags_are_told_apart_as_one_types_them(flags, expected, tmp_path, capsys):
    saved = start(tmp_path / "run")
    assert expected in fails_with(capsys, ["train", "--resume", str(saved), *flags])


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


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("change", ["added", "removed", "renamed"])
def test_other_files_are_refused(change, folder, tmp_path, capsys):
    saved = start(tmp_path / "run", f"imagefolder:{folder}")
    image = folder / "dark" / "0.png"
    if change == "added":
        shutil.copy(image, folder / "dark" / "5.png")
    elif change == "removed":
        image.unlink()
    else:
        image.rename(folder / "dark" / "5.png")
    line = fails_with(capsys, ["train", "--resume", str(saved)])
    assert f"{saved} was trained on 8 images and tested on 2; imagefolder:{folder} has " in line
    assert f"has {8 + (change == 'added') - (change == 'removed')} and 2, not all" in line
    assert "undo what was added, removed or renamed" in line


def test_files_of_the_parts_are_told_apart(folder, tmp_path):
    """A test image among those to train on is another data set, wherever it lies."""
    shutil.copytree(folder, tmp_path / "parts" / "train")
    shutil.copytree(folder, tmp_path / "parts" / "val")
    shutil.copytree(tmp_path / "parts", tmp_path / "moved")

    def names(path: str) -> str | None:
        return data.open_data(f"imagefolder:{tmp_path / path}", 8).names

    first = names("parts")
    assert first == names("moved") != names("parts/train")
    (tmp_path / "parts" / "val" / "dark" / "0.png").unlink()
    (tmp_path / "moved" / "train" / "dark" / "0.png").unlink()
    assert len({first, names("parts"), names("moved")}) == 3


@pytest.mark.usefixtures("_quick")
def test_small_rates_keep_their_digits(folder, tmp_path, capsys):
    data_flags = ["--data", f"imagefolder:{folder}", "--epochs", "1", "--device", "cpu"]
    flags = ["train", *FLAGS, *data_flags, "--out"]
    assert main([*flags, str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "\n8 training and 2 test images\n" in printed
    assert "fused 0.314 images/s, plain PyTorch 41.9 images/s" in printed
    assert "   8 images/s" in printed
    assert main([*flags, str(tmp_path / "odd"), "--batch-size", "3", "--limit", "7"]) == 0
    note = "8 training and 2 test images; an epoch leaves out its incomplete training batch, of 1\n"
    assert note in capsys.readouterr().out


@pytest.mark.usefixtures("_quick")
def test_a_folder_of_images_is_found_again(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "run")
    train_on = ["train", *FLAGS, "--device", "cpu", "--data", "imagefolder:images/", "--out", out]
    assert main([*train_on, "--epochs", "1"]) == 0
    resume = ["train", "--resume", out, "--epochs"]
    monkeypatch.chdir(folder)
    assert main([*resume, "2"]) == 0
    assert main([*resume, "3", "--data", "imagefolder:../images/"]) == 0
    shutil.copytree(folder, tmp_path / "other")
    folder.rename(tmp_path / "moved")
    assert f"no folder {folder}: --data imagefolder:PATH" in fails_with(capsys, [*resume, "4"])
    moved = ["--data", f"imagefolder:{tmp_path / 'moved'}"]
    assert main([*resume, "4", *moved]) == 0
    assert len(checkpoint.read_checkpoint(out)["history"]) == 4
    assert main([*resume, "5"]) == 0

    (tmp_path / "other" / "dark" / "0.png").unlink()
    other = ["--data", f"imagefolder:{tmp_path / 'other'}"]
    assert "not all of them the same files" in fails_with(capsys, [*resume, "6", *other])
    (tmp_path / "other" / "dark").rename(tmp_path / "other" / "black")
    assert "was trained on other classes" in fails_with(capsys, [*resume, "6", *other])
    digits = fails_with(capsys, [*resume, "6", "--data", "digits"])
    assert f"was trained with --data imagefolder:{tmp_path / 'moved'}, not digits" in digits


@pytest.mark.usefixtures("_quick")
def test_checkpoints_without_names_go_on_where_they_were(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = start(tmp_path / "run", "imagefolder:images")
    contents = checkpoint.read_checkpoint(saved)
    del contents["files"]
    contents["options"]["data"] = "imagefolder:images"
    torch.save(contents, saved)
    shutil.copytree(folder, tmp_path / "other")
    resume = ["train", "--resume", str(saved), "--epochs", "1", "--data"]
    line = fails_with(capsys, [*resume, "imagefolder:other"])
    assert "was trained with --data imagefolder:images, not imagefolder:other" in line
    assert main([*resume, "imagefolder:images/"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("room", [0, 2**20])
def test_a_full_disk_leaves_the_last_checkpoint(room, tmp_path, capsys):
    import resource

    saved = start(tmp_path / "run")
    before = saved.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if room:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        else:
            saved.with_name("checkpoint.pt.tmp").symlink_to("/dev/full")
        line = fails_with(capsys, ["train", "--resume", str(saved)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert ("File too large" if room else "No space left on device") in line
    assert line.count(str(saved)) == 1
    assert f"goes on with: python -m fused_inception train --resume {saved.parent}" in line
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint.pt"]


@pytest.mark.usefixtures("_untrained")
@pytest.mark.parametrize("part", ["train", "test"])
def test_bad_images_are_found_before_the_first_step(part, folder, tmp_path, capsys):
    saved = start(tmp_path / "run", f"imagefolder:{folder}")
    path, _ = getattr(data.open_data(f"imagefolder:{folder}", 15), part).files[0]
    path.write_bytes(path.read_bytes()[: -20 if part == "test" else 10])
    line = fails_with(capsys, ["train", "--resume", str(saved)])
    assert f"cannot read the image {path}" in line
    assert (
        f"what is saved goes on with: python -m fused_inception train --resume {saved.parent}"
        in line
    )


def test_a_folder_with_the_name_of_an_image_is_none(folder):
    names = data.open_data(f"imagefolder:{folder}", 8).names
    (folder / "dark" / "x.png").mkdir()
    assert data.open_data(f"imagefolder:{folder}", 8).names == names
    (folder / "dark" / "missing.png").symlink_to("nowhere")
    assert data.open_data(f"imagefolder:{folder}", 8).names != names


@pytest.mark.usefixtures("_quick")
def test_curves_are_there_when_the_report_fails(tmp_path, monkeypatch, capsys):
    saved = start(tmp_path / "run")

    def fail(*_: object) -> None:
        raise OSError("no report")

    monkeypatch.setattr(run, "training_speed", fail)
    line = fails_with(capsys, ["train", "--resume", str(saved)])
    assert "no report; what is saved goes on with: python -m fused_inception train" in line
    assert saved.with_name("curves.png").exists()


@pytest.mark.usefixtures("_untrained")
def test_errors_of_other_kinds_name_the_way_on_too(tmp_path, monkeypatch, capsys):
    saved = start(tmp_path / "run")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(run, "train_epoch", fail)
    assert main(["train", "--resume", str(saved)]) == 2
    captured = capsys.readouterr()
    assert captured.out.endswith(f"fused_inception train --resume {saved.parent}\n")
    assert captured.err.count("\n") == 1

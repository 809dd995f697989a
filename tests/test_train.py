"""The commands train and predict: their results, their files and their errors."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_inception as fi
from fused_inception.__main__ import main
from fused_inception.tools import checkpoint, data, loop, options, parity, train
from tests.commands import fails_with, image_folder

for extra in ("matplotlib", "PIL", "sklearn", "tqdm"):
    pytest.importorskip(extra)

from PIL import Image  # noqa: E402

# bit-identity holds on a CPU
SMALL = ["--image-size", "32", "--no-aux", "--batch-size", "16", "--limit", "32", "--device", "cpu"]
TWO_EPOCHS = [*SMALL, "--epochs", "2", "--lr", "0.005"]


@pytest.fixture(autouse=True)
def _short_measurement(monkeypatch):
    monkeypatch.setattr(parity, "SPEED_SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "images")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of an uninterrupted run of two epochs on digits."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(parity, "SPEED_SECONDS", 0.0)
        assert main(["train", *TWO_EPOCHS, "--out", str(out)]) == 0
    return out


def read(out):
    """The checkpoint in a run's folder."""
    return checkpoint.read_checkpoint(out / "checkpoint.pt")


def without_times(history):
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in timing} for row in history]


def assert_same_result(got, want):
    """Bit-identical networks, optimizers and histories."""
    torch.testing.assert_close(got["model"], want["model"], rtol=0, atol=0)
    torch.testing.assert_close(
        got["optimizer"]["state"], want["optimizer"]["state"], rtol=0, atol=0
    )
    assert without_times(got["history"]) == without_times(want["history"])


def interrupt_at(monkeypatch, step):
    """Ctrl-C in the training step of this number, counted from 1."""
    objective, calls = loop.objective, []

    def interrupted(outputs, labels):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return objective(outputs, labels)

    monkeypatch.setattr(loop, "objective", interrupted)


def test_run_writes_checkpoint_metrics_and_curves(finished):
    files = sorted(path.name for path in finished.iterdir())
    assert files == ["checkpoint.pt", "curves.png", "metrics.json"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["epochs"]] == [1, 2]
    assert metrics["test_accuracy"] == metrics["epochs"][-1]["test_accuracy"]
    assert [(p["mode"], p["verdict"]) for p in metrics["parity"]] == [("fp32", "ok")]
    assert metrics["images_per_second"]["fused"] > 0
    assert metrics["images_per_second"]["reference"] > 0
    with Image.open(finished / "curves.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10


def test_loaded_checkpoint_is_ready_for_use(finished):
    model = fi.load_checkpoint(finished / "checkpoint.pt")
    assert not model.training
    held_out = data.open_data("digits", 32).test
    batches = data.held_out_batches(held_out, 16, limit=32)
    result = loop.evaluate(model, batches, device=torch.device("cpu"), amp="off", title="")
    assert result.accuracy == read(finished)["history"][-1]["test_accuracy"]


@pytest.mark.parametrize(
    ("step", "resume"),
    [(1, ["--resume", "."]), (4, ["--resume", "--out", "."])],
    ids=["in-first-epoch", "in-second-epoch"],
)
def test_interrupted_run_resumes_bit_identically(
    step, resume, finished, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert main(["train", *TWO_EPOCHS, "--out", str(tmp_path / "run")]) == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert len(read(tmp_path / "run")["history"]) == (step - 1) // 2
    torch.rand(7)  # the state of the global generator does not matter
    monkeypatch.chdir(tmp_path / "run")
    assert main(["train", *resume]) == 0
    assert_same_result(read(tmp_path / "run"), read(finished))


def test_a_finished_run_says_so(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "all 2 epochs are finished: a larger --epochs goes on" in capsys.readouterr().out
    assert_same_result(read(tmp_path / "run"), read(finished))


def test_interrupted_write_leaves_the_last_checkpoint(finished, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((finished / "checkpoint.pt").read_bytes())

    def half(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, half)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == (finished / "checkpoint.pt").read_bytes()


def test_evaluate_prints_the_accuracy_of_the_run(finished, capsys):
    before = sorted(finished.iterdir())
    assert main(["train", "--evaluate", str(finished / "checkpoint.pt")]) == 0
    accuracy = read(finished)["history"][-1]["test_accuracy"]
    assert f"test accuracy {100 * accuracy:.2f} % on 32 " in capsys.readouterr().out
    assert sorted(finished.iterdir()) == before


def test_synthetic_data_measures_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", "synthetic", "--image-size", "32", "--no-aux", "--batch-size", "2"]
    assert main(["train", *arguments, "--limit", "4"]) == 0
    assert "images/s" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_torchvision_variant_trains_with_heads(tmp_path, capsys):
    flags = ["--variant", "torchvision", "--image-size", "32", "--batch-size", "8"]
    flags += ["--limit", "16", "--epochs", "1", "--optimizer", "adamw", "--amp", "bf16"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("parity")] == [
        "parity in fp32",
        "parity in bf16",
    ]
    assert any("num_batches_tracked" in key for key in read(tmp_path / "run")["model"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", "imagefolder:nowhere"], "no folder nowhere"),
        (["--data", "mnist"], "use digits, imagefolder:PATH or synthetic"),
        (["--image-size", "30", "--no-aux"], "it takes 31 or more"),
        (["--image-size", "14", "--variant", "torchvision"], "it takes 15 or more"),
        (["--image-size", "46"], "take 47 or more, or --no-aux"),
        (["--variant", "resnet"], "invalid choice: 'resnet'"),
        (["--epochs", "0"], "0 is not a whole number of 1 or more"),
        (["--lr", "nan"], "nan is not a number of 0 or more"),
        (["--lr", "x"], "x is not a number of 0 or more"),
        (["--seed", "1.5"], "1.5 is not a whole number between 0 and"),
        (["--device", "cuda:99"], "--device cuda:99 is not usable here"),
        (["--device", "cpu", "--amp", "fp16"], "take --amp bf16"),
        (["--flip"], "--flip is for imagefolder:PATH"),
        (["--resume", "nowhere.pt"], "no checkpoint at nowhere.pt"),
        (["--resume"], "--resume needs"),
        (["--evaluate", "x", "--data", "synthetic"], "needs real images"),
        (["--evaluate", "x", "--resume", "y"], "--evaluate writes nothing"),
        (
            ["--image-size", "16", "--variant", "torchvision", "--no-aux", "--batch-size", "1"],
            "--batch-size 1 with BatchNorm needs an --image-size of 47 or more",
        ),
        (
            ["--image-size", "16", "--variant", "torchvision", "--no-aux", "--limit", "1"],
            "--limit 1 with BatchNorm needs an --image-size of 47 or more",
        ),
        (["--evaluate", "pyproject.toml"], "pyproject.toml is not a checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags_are_one_line(flags, expected, tmp_path, capsys):
    out = [] if "--evaluate" in flags or flags == ["--resume"] else ["--out", str(tmp_path / "x")]
    assert expected in fails_with(capsys, ["train", *flags, *out])
    assert list(tmp_path.iterdir()) == []


def test_one_image_to_test_on(folder, tmp_path, capsys):
    """Its gradients are compared at the end of a run, which needs statistics of a batch."""
    root = tmp_path / "parts"
    root.mkdir()
    folder.rename(root / "train")
    (root / "val" / "dark").mkdir(parents=True)
    Image.new("L", (9, 9)).save(root / "val" / "dark" / "0.png")
    flags = [*SMALL, "--variant", "torchvision", "--data", f"imagefolder:{root}"]
    line = fails_with(capsys, ["train", *flags, "--out", str(tmp_path / "run")])
    assert "one test image with BatchNorm needs an --image-size of 47 or more" in line
    assert not (tmp_path / "run").exists()


def test_a_test_takes_images_one_by_one():
    """Running statistics do for that."""
    saved = {"image_size": 32, "epochs": 1, "lr": 0.1, "weight_decay": 0.0, "aux": False}
    saved["variant"] = "torchvision"
    given = {"batch_size": 1, "limit": 1}
    assert options.from_flags(given, saved, "", testing=True).limit == 1


def test_smallest_images_train():
    for variant, size in (("paper", 31), ("torchvision", 15)):
        model = fi.googlenet(variant, num_classes=2, aux_logits=False)
        with torch.no_grad():
            assert model(torch.zeros(2, 3, size, size)).shape == (2, 2)


def test_checkpoint_of_another_variant_is_refused(finished, capsys):
    for flag in ("--resume", "--evaluate"):
        line = fails_with(capsys, ["train", flag, str(finished), "--variant", "torchvision"])
        assert "was trained with --variant paper, not torchvision" in line


def test_out_that_holds_a_run_is_refused(finished, capsys):
    weights = finished / "checkpoint.pt"
    before = weights.read_bytes()
    assert "--resume" in fails_with(capsys, ["train", *TWO_EPOCHS, "--out", str(finished)])
    assert "is a file, not" in fails_with(capsys, ["train", *TWO_EPOCHS, "--out", str(weights)])
    assert weights.read_bytes() == before


def test_a_run_goes_on_with_its_classes_and_no_fewer_epochs(finished, folder, capsys):
    resume = ["train", "--resume", str(finished)]
    other = [*resume, "--data", f"imagefolder:{folder}"]
    assert "was trained with --data digits" in fails_with(capsys, other)
    assert "has finished 2 epochs" in fails_with(capsys, [*resume, "--epochs", "1"])


def test_a_run_without_a_folder_gets_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source, name in (("digits", "digits-paper-48px"), ("imagefolder:a/b", "b-paper-224px")):
        given = options.from_flags({"data": source}, None, "", testing=False)
        for number in ("", "-2", "-3"):
            made = train._new_folder(given)
            assert made == Path("runs") / f"{name}{number}"
            made.mkdir(parents=True)


def test_diverged_run_says_so_and_leaves_nothing(tmp_path, capsys):
    flags = [*SMALL, "--epochs", "1", "--lr", "1e30", "--out", str(tmp_path / "run")]
    assert "try a lower --lr" in fails_with(capsys, ["train", *flags])
    assert list(tmp_path.iterdir()) == []


def test_training_on_a_folder_and_predicting(folder, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--data", f"imagefolder:{folder}", "--image-size", "32", "--no-aux", "--flip"]
    flags += ["--batch-size", "4", "--epochs", "2", "--workers", "1"]
    assert main(["train", *flags, "--out", str(out)]) == 0
    capsys.readouterr()
    bright, dark = folder / "bright" / "0.png", folder / "dark" / "2.png"
    assert (
        main(["predict", str(out / "checkpoint.pt"), str(bright), str(dark), "--device", "cpu"])
        == 0
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["image", "probability", "class"]
    assert [row[0] for row in rows[1::2]] == [str(bright), str(dark)]

    model = fi.load_checkpoint(out / "checkpoint.pt")
    pixels = torch.stack([data.read_image(path, 32) for path in (bright, dark)])
    with torch.no_grad():
        want = model(data.to_input(pixels, torch.device("cpu"))).softmax(1)
    for image, row in enumerate(rows[1::2]):
        value, _, name = row[1:]
        assert name == ("bright", "dark")[want[image].argmax()]
        assert float(value) == pytest.approx(100 * want[image].max().item(), abs=0.06)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_training_image_is_one_line(workers, folder, tmp_path, capsys):
    for name in ("bright", "dark"):
        for path in (folder / name).glob("*.png"):
            path.write_bytes(path.read_bytes()[:60])
    flags = ["--data", f"imagefolder:{folder}", "--image-size", "32", "--no-aux", "--epochs", "1"]
    flags += ["--workers", workers, "--out", str(tmp_path / "run")]
    assert "cannot read the image" in fails_with(capsys, ["train", *flags])
    assert not (tmp_path / "run").exists()


def test_predict_refuses_what_it_cannot_read(finished, tmp_path, capsys):
    weights = str(finished / "checkpoint.pt")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    assert "cannot read the image" in fails_with(
        capsys, ["predict", weights, str(tmp_path / "bad.png")]
    )
    assert "no image" in fails_with(capsys, ["predict", weights, str(tmp_path / "none.png")])
    assert "is not a checkpoint" in fails_with(
        capsys, ["predict", str(tmp_path / "bad.png"), weights]
    )
    torch.save({"model": {}}, tmp_path / "other.pt")
    torch.save({"kind": checkpoint.KIND}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("hello")
    contents = torch.load(weights)
    torch.save(contents | {"model": {}}, tmp_path / "bare.pt")
    assert (
        "do not fit its network: Error(s) in loading state_dict for GoogLeNet: Miss"
        in fails_with(capsys, ["predict", str(tmp_path / "bare.pt"), weights])
    )
    for command, part in (
        ("predict", "classes"),
        ("train --evaluate", "options"),
        ("train --resume", "optimizer"),
    ):
        torch.save({k: v for k, v in contents.items() if k != part}, tmp_path / "less.pt")
        images = [weights] if command == "predict" else []
        complaint = fails_with(capsys, [*command.split(), str(tmp_path / "less.pt"), *images])
        assert complaint.endswith(f"not what this needs too: {part}\n")
    for name in ("other.pt", "empty.pt", "text.pt"):
        complaint = fails_with(capsys, ["predict", str(tmp_path / name), weights])
        assert "is not a checkpoint" in complaint


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("fused_inception.tools.errors.find_spec", lambda name: None)
    assert "pip install 'fused-inception[train]'" in fails_with(capsys, ["train", *TWO_EPOCHS])


def test_defaults():
    got = options.from_flags({}, None, "", testing=False)
    assert (got.data, got.variant, got.image_size, got.aux) == ("digits", "paper", 48, True)
    assert (got.optimizer, got.lr, got.weight_decay) == ("sgd", 0.01, 2e-4)
    assert options.from_flags({"optimizer": "adamw"}, None, "", testing=False).lr == 5e-4
    assert options.from_flags({"data": "synthetic"}, None, "", testing=False).image_size == 224


def test_objective_weighs_the_heads():
    torch.manual_seed(0)
    labels = torch.tensor([0, 2])
    logits, aux2, aux1 = torch.randn(3, 2, 4)
    total, main_loss, main_logits = loop.objective(
        fi.GoogLeNetOutputs(logits=logits, aux_logits2=aux2, aux_logits1=aux1), labels
    )
    want = nn.CrossEntropyLoss()(logits, labels)
    heads = nn.CrossEntropyLoss()(aux1, labels) + nn.CrossEntropyLoss()(aux2, labels)
    torch.testing.assert_close(total, want + 0.3 * heads)
    torch.testing.assert_close(main_loss, want)
    assert main_logits is logits


def test_biases_and_norm_parameters_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, plain = loop.new_optimizer(model, "sgd", 0.1, 0.5).param_groups
    assert [id(p) for p in decayed["params"]] == [id(model[0].weight), id(model[2].weight)]
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)


def test_learning_rate_rises_then_falls():
    rates = [loop.learning_rate(i / 100, 2.0) for i in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == max(rates) == 2.0
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(rates[5:]))


def test_info_names_versions_and_what_is_fused(monkeypatch, capsys):
    monkeypatch.setenv("FUSED_INCEPTION_BACKEND", "torch")
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("fused_inception ")
    assert f"torch {torch.__version__.partition('+')[0]}" in lines[1]
    assert lines[2] == "backend torch:"
    assert "PyTorch's own operators" in lines[3]
    assert sum("9 of 9 Inception modules" in line for line in lines) >= 1
    assert "not replayed" not in "".join(lines)
    monkeypatch.setenv("FUSED_INCEPTION_BACKEND", "cuda")
    assert "must be one of" in fails_with(capsys, ["info"])


def test_info_names_what_is_slower_with_a_triton_that_is_not_known(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("triton.__version__", "4.0.0")
    assert main(["info"]) == 0
    assert "launches are not replayed, each takes 20 us" in capsys.readouterr().out

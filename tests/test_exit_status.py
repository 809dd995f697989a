"""What a command returns and prints where it cannot do its work."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fused_inception.__main__ import COMMANDS, main
from tests.test_verify import biased


def make_mistake() -> nn.Module:
    raise KeyError("theirs")


def make_huge() -> nn.Module:
    class Huge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.empty(1 << 60) + x

    return nn.Sequential(*biased(), Huge())


@pytest.mark.parametrize("tool", ["verify", "explain"])
def test_what_nobody_expected_is_no_difference(tool: str, capsys: pytest.CaptureFixture) -> None:
    """Exit status 1 says that fused and plain PyTorch disagree."""
    assert main([tool, "--model", "tests.test_exit_status:make_mistake", "--image-size", "8"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("KeyError: 'theirs'\n")


def test_a_cpu_without_memory(capsys: pytest.CaptureFixture) -> None:
    command = ["verify", "--model", "tests.test_exit_status:make_huge", "--image-size", "8"]
    assert main(command) == 2
    message = "error: not enough device memory: lower --batch-size or --image-size\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize(
    "command", ["verify --model paper", "info --network paper"], ids=["verify", "info"]
)
def test_commands_advise_no_argument_of_python(command: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*command.split(), "--image-size", "8"]) == 2
    assert capsys.readouterr().err.endswith("with the paper's heads, got 8\n")


def test_the_command_names_what_it_does_not_know(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--varient", "paper"])
    error = capsys.readouterr().err
    assert error.startswith("fused-inception train: error: unrecognized arguments: --varient paper")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_the_output_cannot_encode(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a class in another script, and of a file whose name is no UTF-8."""
    tool = SimpleNamespace(
        add_arguments=lambda parser: None, run=lambda _: print("\u732b \udcff") or 0
    )
    monkeypatch.setitem(COMMANDS, "info", (tool, ""))
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    assert main(["info"]) == 0
    sys.stdout.flush()
    cat = "\u732b" if encoding == "utf-8" else r"\u732b"
    assert written.getvalue().decode(encoding).rstrip() == rf"{cat} \udcff"


@pytest.mark.parametrize("command", ["train", "verify --model paper", "tune --list"])
@pytest.mark.parametrize("seed", ["x", str(2**64)])
def test_a_seed_is_the_same_to_every_command(
    command: str, seed: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--seed", seed])
    assert f"--seed: {seed} is not a whole number between 0 and" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "predict", "verify", "explain", "bench", "tune"])
def test_help_says_where_the_backend_comes_from(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    """Without the flag the environment decides."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert "default: FUSED_INCEPTION_BACKEND, else auto" in " ".join(
        capsys.readouterr().out.split()
    )

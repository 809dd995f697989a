"""What `verify` and `explain` have in common: random numbers that go on, inputs, clear errors."""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.nn.conv_block import change_of
from fused_inception.tools import blocks
from tests.test_verify import biased, images

looks = pytest.mark.parametrize("look", [fi.verify, fi.explain])
Look = Callable[[nn.Module, Any], Any]


class Wrapped(nn.Module):
    """Blocks, and something of the user's behind them."""

    def __init__(self, behind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.blocks = biased()
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.blocks(x))


def draw(y: Tensor) -> Tensor:
    torch.rand(3)
    return y * random.random() * np.random.rand()


def fail(y: Tensor) -> Tensor:
    draw(y)
    raise KeyError("theirs")


@looks
@pytest.mark.parametrize("behind", [draw, fail])
def test_all_random_numbers_go_on(look: Look, behind: Callable[[Tensor], Tensor]) -> None:
    def states() -> list[str]:
        theirs = (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )
        return [*map(str, theirs), str(np.random.get_state()[2:])]

    model, x = Wrapped(behind), images()
    before = states()
    if behind is fail:
        with pytest.raises(KeyError, match="theirs"):
            look(model, x)
    else:
        assert getattr(look(model, x), "ok", True)
    assert states() == before
    assert torch.is_grad_enabled()


@looks
@pytest.mark.parametrize("started", [False, True])
def test_seeds_of_gpus(look: Look, started: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch on the CPU, too, every GPU's generator is given back, or none is touched."""
    kept: list[list[int]] = []
    seeded: list[int] = []
    generators = [SimpleNamespace(manual_seed=seeded.append) for _ in range(2)]
    fork = torch.random.fork_rng

    def fork_cpu(devices: Any) -> Any:
        kept.append(list(devices))
        return fork(devices=[])

    for name, value in {
        "is_initialized": lambda: started,
        "device_count": lambda: 2,
        "default_generators": generators,
        "get_rng_state": lambda i: torch.zeros(1),
        "manual_seed": seeded.append,
        "manual_seed_all": seeded.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.random, "fork_rng", fork_cpu)
    look(biased(), images())
    assert kept == [[0, 1] if started else []]
    assert started or not seeded


class _Dropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_is_no_failure(training: bool) -> None:
    """A fused block's output has its channels last, so the same numbers meet other elements."""
    assert fi.verify(Wrapped(nn.Dropout()).train(training), images()).model.verdict == "ok"
    report = fi.verify(Wrapped(_Dropout()).train(training), images())
    assert report.ok
    assert [check.verdict for check in report.blocks] == ["ok", "ok"]
    assert report.model.verdict == ("unclear" if training else "ok")
    assert ("random numbers besides nn.Dropout's" in str(report)) == training
    assert "ReLUs or maxima" not in str(report)


def test_a_wrong_block_fails_beside_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks themselves are still held to their limits."""
    right = fi.Inception.forward
    monkeypatch.setattr(fi.Inception, "forward", lambda self, x: 2 * right(self, x))
    report = fi.verify(Wrapped(F.dropout), images())
    assert not report.ok
    assert [check.verdict for check in report.blocks] == ["ok", "FAILED"]


@looks
@pytest.mark.parametrize("fused", [False, True])
def test_batch_of_inference_mode(look: Look, fused: bool) -> None:
    model = biased()
    if fused:
        fi.fuse_(model)
    with torch.inference_mode():
        x = images()
    assert getattr(look(model, x), "ok", True)
    with torch.inference_mode():
        assert getattr(look(model, x), "ok", True)


@looks
def test_batch_that_is_none(look: Look) -> None:
    with pytest.raises(TypeError, match=r"^x must be a torch\.Tensor, .* model, got list$"):
        look(biased(), [images()])


@looks
def test_model_that_cannot_be_copied(look: Look) -> None:
    model = Wrapped(nn.Identity())
    model.blocks.cache = [model.blocks(images())]
    with pytest.raises(
        ValueError,
        match=r"^this Wrapped cannot be deep-copied.*: blocks\.cache: RuntimeError: Only",
    ):
        look(model, images())
    del model.blocks.cache
    model.blocks[0].held = (i for i in range(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.held: TypeError: cannot pickle"):
        look(model, images())


@pytest.mark.parametrize(
    ("behind", "kind"),
    [(torch.argmax, "Tensor"), (lambda y: SimpleNamespace(y=y), "SimpleNamespace")],
)
def test_nothing_to_compare(behind: Callable[[Tensor], Any], kind: str) -> None:
    with pytest.raises(ValueError, match=f"^this Wrapped returns a {kind} without a floating"):
        fi.verify(Wrapped(behind), images())
    assert fi.explain(Wrapped(behind), images()).blocks


def test_layers_of_the_same_name_are_told_apart() -> None:
    namesake = type("Conv2d", (nn.Conv2d,), {"__module__": "quantised.layers"})
    assert change_of(namesake(1, 1, 1), nn.Conv2d) == "is a quantised.layers.Conv2d"
    assert change_of(nn.Conv1d(1, 1, 1), nn.Conv2d) == "is a Conv1d"
    assert change_of(nn.Conv2d(1, 1, 1), nn.Conv2d) is None


def test_copy_without_a_culprit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that refuses as a whole, as sharded ones do, is named alone."""
    model = Wrapped(nn.Identity())
    model.__class__ = type("Sharded", (Wrapped,), {"__deepcopy__": lambda self, _: 1 / 0})
    with pytest.raises(ValueError, match=r"^this Sharded .* are run: ZeroDivisionError: division"):
        blocks.copy_of(model)

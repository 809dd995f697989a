"""The line at the end of training: do fused and plain network agree?"""

from typing import Any

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception import functional
from fused_inception.tools import parity


def test_a_wrong_module() -> None:
    network: dict[str, Any] = {
        "variant": "paper",
        "num_classes": 3,
        "aux_logits": False,
        "image_size": 32,
    }
    torch.manual_seed(0)
    model = fi.googlenet(**network)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    assert parity.compare(model, network, x, labels, "fp32").verdict == "ok"
    model.inception4c.register_forward_hook(lambda module, inputs, output: 1.05 * output)
    assert str(parity.compare(model, network, x, labels, "fp32")).endswith("FAILED")


def test_no_verdict_where_rounding_decides() -> None:
    def verdict(gradients: float, own_gradients: float) -> str:
        return parity.Parity(16, "bf16", 0.01, gradients, 0.01, own_gradients).verdict

    nan = float("nan")
    assert verdict(0.02, 0.01) == verdict(0.02, 0.5) == "ok"
    assert verdict(0.3, 0.01) == verdict(nan, 0.01) == "FAILED"
    assert verdict(0.6, 0.5).startswith("inconclusive")
    assert verdict(nan, nan).startswith("inconclusive")


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 1.05 * dy


def test_a_wrong_gradient_behind_right_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is no flip: the blocks by themselves are wrong too."""
    right = functional.inception
    wrong = lambda *args: WrongGradient.apply(right(*args))  # noqa: E731
    monkeypatch.setattr(functional, "inception", wrong)
    network: dict[str, Any] = {
        "variant": "paper",
        "num_classes": 3,
        "aux_logits": False,
        "image_size": 32,
    }
    model = fi.googlenet(**network)
    # layer by layer
    model.maxpool3 = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
    model.maxpool4 = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
    x, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    found = parity.compare(model, network, x, labels, "fp32")
    assert found.logits < 1e-5
    assert found.blocks_agree is False
    assert found.verdict == "FAILED"


def test_a_flip_is_no_failure() -> None:
    """Gradients of other maxima, where every block by itself is right."""

    def verdict(logits: float, blocks_agree: bool | None) -> str:
        return parity.Parity(16, "fp32", logits, 5e-3, 1e-6, 2e-6, blocks_agree).verdict

    assert verdict(1e-6, True).startswith("inconclusive, single ReLUs or maxima flip")
    assert verdict(1e-6, False) == verdict(1e-6, None) == verdict(0.1, True) == "FAILED"


def test_blocks_are_asked_where_gradients_alone_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    network: dict[str, Any] = {"num_classes": 3, "aux_logits": False, "image_size": 32}
    model = fi.googlenet(**network)
    x, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    assert parity.compare(model, network, x, labels, "fp32").blocks_agree is None
    of_logits = iter([True, False] * 2)
    # gradients come second: of fused against plain, then of plain against fp64
    monkeypatch.setattr(parity, "_distance", lambda *_: 1e-7 if next(of_logits) else 5e-3)
    monkeypatch.setattr(parity, "SLACK", 0.0)
    found = parity.compare(model, network, x, labels, "fp32")
    assert found.blocks_agree is True
    assert found.verdict.startswith("inconclusive")

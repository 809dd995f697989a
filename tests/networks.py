"""Whole networks side by side: ours and the reference in one dtype, the reference in fp64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import reference
from tests.tolerances import assert_within_l2

CLASSES = 10
# a power of two changes no relative error, and keeps gradients from vanishing in fp16
SCALE = 256.0


@dataclass(frozen=True)
class Results:
    """Logits of the three classifiers, and every parameter's gradient of the paper's loss."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    @classmethod
    def of(cls, network: nn.Module, x: Tensor, labels: Tensor) -> "Results":
        """One training step without an optimiser."""
        network.zero_grad()
        outputs = network(x)._asdict()
        weights = {"logits": 1.0, "aux_logits2": 0.3, "aux_logits1": 0.3}
        loss = sum(
            weight * nn.functional.cross_entropy(outputs[name].to(torch.float64), labels)
            for name, weight in weights.items()
        )
        (SCALE * loss).backward()
        return cls(outputs, {k: p.grad for k, p in network.named_parameters()})


@dataclass(frozen=True)
class PaperNetworks:
    """`googlenet("paper")` with the same weights three times, without dropout."""

    ours: nn.Module
    theirs: nn.Module
    exact: nn.Module  # the reference in fp64

    @classmethod
    def make(cls, side: int, dtype: torch.dtype, device: torch.device | str) -> "PaperNetworks":
        """For images of side `side`."""
        options: dict[str, Any] = {
            "num_classes": CLASSES, "image_size": side, "dropout": 0.0, "dropout_aux": 0.0,
        }  # fmt: skip
        exact = reference.googlenet("paper", dtype=torch.float64, **options).to(device)
        ours, theirs = fi.googlenet("paper", **options), reference.googlenet("paper", **options)
        for network in (ours, theirs):
            network.to(device, dtype)
            network.load_state_dict(exact.state_dict())
        return cls(ours, theirs, exact)


def assert_networks_agree(got: Results, want: Results, baseline: Results) -> None:
    """Outputs one by one, gradients together: as near to fp64 as PyTorch's own are.

    A small map has few gates, and one that rounding flips shows: in one gradient alone, in 16 bits,
    it may do so for one of the two and not for the other. In fp32 each gradient is held, too.
    """
    for name, output in got.outputs.items():
        assert_within_l2(name, output, want.outputs[name], baseline.outputs[name])
    errors, yardsticks = (
        torch.stack([(g[k].double() - w).norm() / w.norm() for k, w in want.gradients.items()])
        for g in (got.gradients, baseline.gradients)
    )
    assert errors.isfinite().all()
    assert errors.norm() <= 3 * yardsticks.norm()
    for name, gradient in got.gradients.items():
        if gradient.dtype == torch.float32:
            exact, theirs = want.gradients[name], baseline.gradients[name]
            assert_within_l2(name, gradient, exact, theirs, slack=3.0)

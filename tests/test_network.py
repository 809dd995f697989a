"""The whole paper network through ATen, at the sizes that people use."""

import pytest
import torch

import fused_inception as fi
from tests.networks import Networks, Results, assert_networks_agree, on_some_draw
from tests.tolerances import assert_within_l2

LABELS = torch.tensor([7])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step_at_224(dtype: torch.dtype) -> None:
    """All logits and all gradients as near to fp64 as PyTorch's own are."""

    def agree() -> None:
        networks = Networks.paper(224, dtype, "cpu")
        x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
        with fi.backend("torch"):
            got = Results.of(networks.ours, x.to(dtype), LABELS)
        want = Results.of(networks.exact, x, LABELS)
        assert_networks_agree(got, want, Results.of(networks.theirs, x.to(dtype), LABELS))

    if dtype == torch.float32:
        on_some_draw(agree)
    else:
        agree()


def test_fp64_is_exact_at_224() -> None:
    networks = Networks.paper(224, torch.float64, "cpu")
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    got, want = (Results.of(network, x, LABELS) for network in (networks.ours, networks.exact))
    for ours, theirs in ((got.outputs, want.outputs), (got.gradients, want.gradients)):
        assert ours.keys() == theirs.keys()
        for name, exact in theirs.items():
            distance = (ours[name] - exact).norm() / exact.norm()
            assert distance < 1e-10, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("side", [225, 299])
def test_odd_image_sizes(side: int) -> None:
    """Windows that end beyond the map, on maps of odd sides."""
    networks = Networks.paper(side, torch.float32, "cpu")
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    with fi.backend("torch"), torch.no_grad():
        got, baseline = networks.ours(x.float()), networks.theirs(x.float())
        want = networks.exact(x)
    for name, ours, exact, theirs in zip(want._fields, got, want, baseline, strict=True):
        assert_within_l2(name, ours, exact, theirs)

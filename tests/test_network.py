"""The whole paper network through ATen, at the sizes that people use."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from tests.networks import Networks, Results, assert_networks_agree, on_some_draw
from tests.test_modules import twins, variants
from tests.tolerances import assert_within_l2

LABELS = torch.tensor([7])


# fp16, which CPUs compute slowly, in smaller images
@pytest.mark.parametrize(
    ("dtype", "side"), [(torch.float32, 224), (torch.bfloat16, 224), (torch.float16, 64)], ids=str
)
def test_training_step(dtype: torch.dtype, side: int) -> None:
    """All logits and all gradients as near to fp64 as PyTorch's own are."""

    def agree() -> None:
        networks = Networks.paper(side, dtype, "cpu")
        x = torch.randn(1, 3, side, side, dtype=torch.float64)
        with fi.backend("torch"):
            got = Results.of(networks.ours, x.to(dtype), LABELS)
        want = Results.of(networks.exact, x, LABELS)
        assert_networks_agree(got, want, Results.of(networks.theirs, x.to(dtype), LABELS))

    on_some_draw(agree)


@pytest.mark.parametrize("side", [224, 225, 299])
def test_fp64_is_exact(side: int) -> None:
    """All logits and all gradients, also where windows end beyond maps of odd sides."""
    networks = Networks.paper(side, torch.float64, "cpu")
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    got, want = (Results.of(network, x, LABELS) for network in (networks.ours, networks.exact))
    for ours, theirs in ((got.outputs, want.outputs), (got.gradients, want.gradients)):
        assert ours.keys() == theirs.keys()
        for name, exact in theirs.items():
            distance = (ours[name] - exact).norm() / exact.norm()
            assert distance < 1e-10, f"{name}: {distance:.1e}"


@pytest.mark.parametrize("module", ["inception4c", "conv1", "conv3", "aux1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_part_without_gradients_is_seen(module: str, dtype: torch.dtype) -> None:
    """The check of the tests above, at the size of those of the kernels."""
    networks = Networks.paper(48, dtype, "cpu")
    x, labels = torch.randn(2, 3, 48, 48, dtype=torch.float64), torch.tensor([1, 7])
    want = Results.of(networks.exact, x, labels)
    baseline = Results.of(networks.theirs, x.to(dtype), labels)
    assert_networks_agree(baseline, want, baseline)
    broken = {
        name: torch.zeros_like(g) if name.startswith(module) else g
        for name, g in baseline.gradients.items()
    }
    with pytest.raises(AssertionError):
        assert_networks_agree(replace(baseline, gradients=broken), want, baseline)


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


@variants
@pytest.mark.parametrize("name", ["aux1", "aux2"])
def test_one_head_alone(variant: str, name: str) -> None:
    """As torchvision's network has it: None in the place of the one that was taken out."""
    found = []
    for network in twins(variant):
        setattr(network, name, None)
        draw = torch.Generator().manual_seed(0)
        outputs = network(torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=draw))
        assert getattr(outputs, name.replace("aux", "aux_logits")) is None
        found.append([y for y in outputs if y is not None])
        assert isinstance(network.eval()(torch.zeros(2, 3, 64, 64).double()), Tensor)
    assert len(found[0]) == 2
    torch.testing.assert_close(*found)


def test_export_for_any_batch() -> None:
    """On a CPU into PyTorch's own operators: whoever loads it does without this library."""
    network = fi.googlenet("torchvision", num_classes=3, image_size=48).eval()
    x, other = torch.randn(2, 3, 48, 48), torch.randn(3, 3, 48, 48)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    with fi.backend("torch"), torch.no_grad():
        program = torch.export.export(network, (x,), dynamic_shapes=(batch,))
        torch.testing.assert_close(program.module()(other), network(other))
    assert "fused_inception" not in program.graph_module.code

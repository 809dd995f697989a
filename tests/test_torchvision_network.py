"""torchvision's own `googlenet` behind `fuse_`, whole: outputs, gradients, running statistics.

Through ATen at 224. test_network_kernels has the kernels.
"""

import pytest
import torch

import fused_inception as fi
from tests.networks import FLIPS, Networks, Results, assert_networks_agree, on_some_draw

SMALL = 48  # the smallest round size with more than a pixel in the last map
LABELS = torch.tensor([7, 2])
# how far apart two orders of the same sums may bring all gradients, in so many layers
ALIKE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def batches(count: int, side: int) -> list[torch.Tensor]:
    return [torch.randn(2, 3, side, side, dtype=torch.float64) for _ in range(count)]


def assert_agree_on(
    networks: Networks,
    x: torch.Tensor,
    dtype: torch.dtype,
    labels: torch.Tensor | None,
    alike: float | None,
    flips: float = 0.0,
) -> None:
    """One pass of all three; fp32 parameters, 16 bits under autocast."""
    amp = None if dtype == torch.float32 else dtype
    got, baseline = (
        Results.of(network, x.float(), labels, amp) for network in (networks.ours, networks.theirs)
    )
    assert got.outputs["logits"].dtype == dtype
    want = Results.of(networks.exact, x, labels)
    assert_networks_agree(got, want, baseline, alike, flips)


@pytest.mark.parametrize(
    ("dtype", "side", "steps"),
    [
        (torch.float32, 224, 2),
        (torch.bfloat16, 224, 2),
        # which CPUs compute slowly
        (torch.float16, SMALL, 1),
    ],
    ids=str,
)
def test_training_steps(dtype: torch.dtype, side: int, steps: int) -> None:
    """The statistics run on from batch to batch."""
    networks = Networks.torchvision("cpu")
    with fi.backend("torch"):
        for x in batches(steps, side):
            assert_agree_on(networks, x, dtype, LABELS, ALIKE[dtype])
    assert networks.ours.conv1.bn.num_batches_tracked == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_in_training_and_eval_at_224(dtype: torch.dtype) -> None:
    """Without gradients; in eval with the statistics of another batch."""
    networks = Networks.torchvision("cpu")
    with fi.backend("torch"):
        for x in batches(2, 224):
            assert_agree_on(networks, x, dtype, None, None)
        networks.calibrate(x)
        for x in batches(2, 224):
            assert_agree_on(networks, x, dtype, None, None)


@pytest.mark.parametrize(
    ("dtype", "side"),
    [
        (torch.float32, 224),
        (torch.float32, SMALL),
        (torch.bfloat16, 224),
        (torch.float16, SMALL),
    ],
    ids=str,
)
def test_gradients_in_eval(dtype: torch.dtype, side: int) -> None:
    """Statistics are frozen; the classifiers of training are not run."""

    def agree() -> None:
        networks = Networks.torchvision("cpu")
        statistics_of, x = batches(2, side)
        networks.calibrate(statistics_of)
        with fi.backend("torch"):
            assert_agree_on(networks, x, dtype, LABELS, None, FLIPS if side > SMALL else 0.0)

    if (dtype, side) == (torch.float32, SMALL):
        on_some_draw(agree)
    else:
        agree()

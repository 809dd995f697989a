"""The whole network with its kernels, through the public API: in the interpreter or on a GPU."""

import pytest
import torch

import fused_inception as fi
from tests.networks import CLASSES, Networks, Results, assert_networks_agree, on_some_draw

pytestmark = pytest.mark.usefixtures("few_large_tiles")

SIDE = 48  # smallest round size that the auxiliary classifiers allow


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_training_step_of_the_paper_network(dtype: torch.dtype, device: torch.device) -> None:
    """All logits and all gradients as near to fp64 as PyTorch's own are."""

    def agree() -> None:
        networks = Networks.paper(SIDE, dtype, device)
        x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64).to(device)
        labels = torch.tensor([1, 7], device=device)
        with fi.backend("triton"), fi.record_launches() as launches:
            got = Results.of(networks.ours, x.to(dtype), labels)
        assert sum(launch.kernel == "_branches_kernel" for launch in launches) == 9
        assert sum(launch.config.get("FILTERS", 0) is True for launch in launches) == 9
        want = Results.of(networks.exact, x, labels)
        assert_networks_agree(got, want, Results.of(networks.theirs, x.to(dtype), labels))

    on_some_draw(agree)


@pytest.mark.usefixtures("nan_filled_empty")
def test_training_step_of_torchvisions_network(device: torch.device) -> None:
    """With BatchNorm, behind `fuse_`. In 16 bits PyTorch's own gradients of the whole network are
    half wrong: test_batch_norm_ops has them of one block."""

    def agree() -> None:
        networks = Networks.torchvision(device)
        x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64).to(device)
        labels = torch.tensor([1, 7], device=device)
        with fi.backend("triton"), fi.record_launches() as launches:
            got = Results.of(networks.ours, x.float(), labels)
        # nine modules, three convolutions of the stem, one of each auxiliary classifier
        assert sum(launch.kernel == "_batch_statistics_kernel" for launch in launches) == 14
        want = Results.of(networks.exact, x, labels)
        assert_networks_agree(got, want, Results.of(networks.theirs, x.float(), labels))

    on_some_draw(agree)


def test_no_images(device: torch.device) -> None:
    """Logits of shape [0, C], and gradients of zeros."""
    network = fi.googlenet("paper", num_classes=CLASSES, image_size=SIDE).to(device)
    with fi.backend("triton"):
        outputs = network(torch.randn(0, 3, SIDE, SIDE, device=device))
        sum(output.sum() for output in outputs).backward()
    assert [tuple(output.shape) for output in outputs] == [(0, CLASSES)] * 3
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


def test_inference_is_the_same_alone_and_in_a_batch(device: torch.device) -> None:
    """Features do not depend on the batch that an image is in, nor on the run."""
    network = fi.googlenet("paper", num_classes=CLASSES, aux_logits=False).to(device).eval()
    x = torch.randn(3, 3, 32, 32).to(device)
    with fi.backend("triton"), torch.inference_mode():
        together = network(x)
        again = network(x)
        alone = network(x[1:2])
    assert torch.equal(together, again)
    torch.testing.assert_close(alone, together[1:2])

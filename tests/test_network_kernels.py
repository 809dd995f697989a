"""The whole network with its kernels, through the public API: in the interpreter or on a GPU."""

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import reference
from fused_inception.tuning.targets import Target
from tests.tolerances import assert_within_l2

CLASSES = 10
SIDE = 48  # smallest round size that the auxiliary classifiers allow


def results(
    network: nn.Module, x: Tensor, labels: Tensor
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Logits of all classifiers and every parameter's gradient of the paper's loss."""
    network.zero_grad()
    outputs = network(x)
    weights = {"logits": 1.0, "aux_logits2": 0.3, "aux_logits1": 0.3}
    loss = sum(
        weight * nn.functional.cross_entropy(getattr(outputs, name).float(), labels)
        for name, weight in weights.items()
    )
    loss.backward()
    return [*outputs], {k: p.grad for k, p in network.named_parameters()}


@pytest.fixture(autouse=True)
def _few_large_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    if device.type == "cpu":
        largest = Target("interpreter", 2**40, 1, 1e40, 1e40, 1, 256 * 256)
        monkeypatch.setattr("fused_inception.ops.problem.target_of", lambda device: largest)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step_of_the_paper_network(dtype: torch.dtype, device: torch.device) -> None:
    """All logits and all gradients as near to fp64 as PyTorch's own are."""
    options = {"num_classes": CLASSES, "image_size": SIDE, "dropout": 0.0, "dropout_aux": 0.0}
    exact = reference.googlenet("paper", dtype=torch.float64, **options).to(device)
    x = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64).to(device)
    labels = torch.tensor([1, 7], device=device)
    ours, theirs = fi.googlenet("paper", **options), reference.googlenet("paper", **options)
    for network in (ours, theirs):
        network.load_state_dict(exact.state_dict())
        network.to(device, dtype)
    with fi.backend("triton"), fi.record_launches() as launches:
        got = results(ours, x.to(dtype), labels)
    want, baseline = results(exact, x, labels), results(theirs, x.to(dtype), labels)
    assert sum(launch.kernel == "_branches_kernel" for launch in launches) == 9
    assert sum(launch.kernel == "_wgrad_kernel" for launch in launches) == 9
    for name, a, b, c in zip(("logits", "aux2", "aux1"), got[0], want[0], baseline[0], strict=True):
        assert_within_l2(name, a, b, c)
    # a map of 2 x 2 has few gates, and one that rounding flips shows: relative errors, all together
    errors, yardsticks = (
        torch.stack([(g[k].double() - w).norm() / w.norm() for k, w in want[1].items()])
        for g in (got[1], baseline[1])
    )
    assert errors.isfinite().all()
    assert errors.norm() <= 3 * yardsticks.norm()
    if dtype == torch.float32:
        for name, gradient in got[1].items():
            assert_within_l2(name, gradient, want[1][name], baseline[1][name], slack=3.0)


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

"""Models in CUDA graphs: refused inputs anywhere, captures where there is a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for a machine with a GPU."""
    return pytest.mark.gpu(NO_GPU(test))


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="needs an input on a CUDA device, got a tensor on cpu"):
        fi.graphed(fi.Inception(16, 8, 8, 8, 8, 8, 8), torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="needs an input on a CUDA device, got a list"):
        fi.graphed(fi.Inception(16, 8, 8, 8, 8, 8, 8), [torch.zeros(1, 16, 4, 4)])  # type: ignore[arg-type]


def network(variant: str = "paper") -> nn.Module:
    torch.manual_seed(0)
    return fi.googlenet(variant, num_classes=10, image_size=64).to("cuda")


def images(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)


@needs_gpu
@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_inference_follows_its_parameters(variant: str) -> None:
    model = network(variant).eval()
    run = fi.graphed(model, images(0))
    for scale in (1.0, 1.1):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
            got = run(images(1))
            torch.testing.assert_close(got, model(images(1)), rtol=1e-5, atol=1e-5)
            other = run(images(2))
    assert not torch.equal(got, other)
    with pytest.raises(ValueError, match=r"captured for \(2, 3, 64, 64\)"):
        run(images(1)[:1])


@needs_gpu
@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_training_steps_are_those_of_the_plain_model(variant: str) -> None:
    """Without dropout: gradients and buffers after some steps, with an optimiser outside."""
    models = [network(variant).train() for _ in range(2)]
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    before = [b.clone() for b in models[0].buffers()]
    runs = [fi.graphed(models[0], images(0)), models[1]]
    for buffer, kept in zip(models[0].buffers(), before, strict=True):
        assert torch.equal(buffer, kept)
    for run, model in zip(runs, models, strict=True):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for seed in range(3):
            optimiser.zero_grad()
            sum(output.float().square().mean() for output in run(images(seed))).backward()
            optimiser.step()
    for ours, theirs in zip(
        (*models[0].parameters(), *models[0].buffers()),
        (*models[1].parameters(), *models[1].buffers()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_dropout_draws_anew() -> None:
    run = fi.graphed(network().train(), images(0))
    first, second = (run(images(1)).logits.detach().clone() for _ in range(2))
    assert not torch.equal(first, second)


@needs_gpu
def test_what_cannot_be_captured() -> None:
    model = network().train()
    with pytest.raises(ValueError, match="all of the model on cuda"):
        fi.graphed(network().cpu(), images(0))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="GoogLeNet without hooks of its own"):
        fi.graphed(model, images(0))

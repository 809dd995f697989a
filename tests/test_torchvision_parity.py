"""The reference's torchvision variants against torchvision's own network, on the CPU."""

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fused_inception import reference
from tests.facts import FACTS
from tests.networks import draw_norms

VARIANTS = ("torchvision", "torchvision5x5")


def build_theirs(module: ModuleType, variant: str, **options) -> nn.Module:
    """torchvision's network, for "torchvision5x5" with the true filters put into its blocks."""

    class Inception5x5(module.Inception):
        def __init__(self, *widths: int, **block_options) -> None:
            super().__init__(*widths, **block_options)
            _, _, _, _, ch5x5red, ch5x5, _ = widths
            self.branch3[1] = module.BasicConv2d(ch5x5red, ch5x5, kernel_size=5, padding=2)

    block = module.Inception if variant == "torchvision" else Inception5x5
    blocks = [module.BasicConv2d, block, module.InceptionAux]
    return module.GoogLeNet(init_weights=False, blocks=blocks, **options)


def pair(module: ModuleType, variant: str, **options) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same weights, and running statistics away from their start."""
    theirs = build_theirs(module, variant, **options)
    draw_norms(theirs)
    ours = reference.googlenet(variant, init_weights=False, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dicts_load_both_ways(tv: ModuleType, variant: str) -> None:
    theirs = build_theirs(tv, variant)
    ours = reference.googlenet(variant)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert len(ours.state_dict()) == len(FACTS["torchvision_state_dict"]) == 364
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(value, ours.state_dict()[key], rtol=0, atol=0)
    ours.load_state_dict(build_theirs(tv, variant).state_dict(), strict=True)


@pytest.mark.parametrize("image_size", [224, 97])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eval(tv: ModuleType, variant: str, image_size: int) -> None:
    ours, theirs = pair(tv, variant, transform_input=True)
    x = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step(tv: ModuleType, variant: str) -> None:
    """Outputs with dropout, every gradient, the input's too, and all running statistics."""
    ours, theirs = pair(tv, variant, num_classes=10)
    x = torch.randn(4, 3, 80, 80)
    targets = torch.randint(10, (4,))
    our_outputs, our_dx = step(ours.train(), x, targets)
    their_outputs, their_dx = step(theirs.train(), x, targets)
    assert our_outputs._fields == their_outputs._fields
    for field in our_outputs._fields:
        torch.testing.assert_close(getattr(our_outputs, field), getattr(their_outputs, field))
    torch.testing.assert_close(our_dx, their_dx)
    their_parameters = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        want = their_parameters[name].grad
        torch.testing.assert_close(parameter.grad, want, msg=lambda m, name=name: f"{name}: {m}")
    their_buffers = dict(theirs.named_buffers())
    moved = 0
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, their_buffers[name])
        moved += name.endswith("num_batches_tracked") and buffer.item() == 1
    assert moved == 59


def step(model: nn.Module, x: Tensor, targets: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    outputs = model(x)
    weights = (1.0, 0.3, 0.2)
    loss = sum(
        weight * nn.functional.cross_entropy(output, targets)
        for weight, output in zip(weights, outputs, strict=True)
    )
    loss.backward()
    return outputs, x.grad


def test_same_seed_gives_the_same_weights(tv: ModuleType) -> None:
    torch.manual_seed(5)
    theirs = tv.GoogLeNet(init_weights=True, aux_logits=False, num_classes=10)
    torch.manual_seed(5)
    ours = reference.googlenet("torchvision", aux_logits=False, num_classes=10)
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], rtol=0, atol=0)


def test_outputs_without_heads(tv: ModuleType) -> None:
    ours, theirs = pair(tv, "torchvision", aux_logits=False, num_classes=10)
    assert len(ours.state_dict()) == 344
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(7)
    got = ours.train()(x)
    torch.manual_seed(7)
    torch.testing.assert_close(got, theirs.train()(x))

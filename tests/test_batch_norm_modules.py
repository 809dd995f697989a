"""Whole modules with BatchNorm through their kernels: far means, 16 bits, options of the layers."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.launches import Launch
from tests.test_batch_norm_ops import (
    DIMS,
    assert_same_step,
    block,
    data,
    draw_norms,
    norms,
    step,
    twin_of,
)


def convolution() -> fi.ConvBlock:
    """One that takes and returns as many channels as `block`."""
    module = fi.ConvBlock(
        DIMS.in_channels, DIMS.out_channels, kernel_size=3, padding=1, norm="batch"
    )
    draw_norms(module)
    return module


KINDS: dict[str, Callable[[], nn.Module]] = {"module": block, "convolution": convolution}


def with_options(module: nn.Module, **options: Any) -> nn.Module:
    """All BatchNorms made anew; what is left of their parameters and statistics stays."""
    for name, layer in [*module.named_modules()]:
        if isinstance(layer, nn.BatchNorm2d):
            made = nn.BatchNorm2d(layer.num_features, layer.eps, **options)
            made.load_state_dict(layer.state_dict(), strict=False)
            module.set_submodule(name, made)
    return module


def with_open_gates(module: nn.Module) -> nn.Module:
    """All but one in a thousand: a gate that rounding flips would show in a maximum."""
    for layer in norms(module):
        nn.init.uniform_(layer.weight, 0.7, 1.0)
        nn.init.constant_(layer.bias, 3.0)
    return module


def kernels_of(launches: Sequence[Launch]) -> Counter[str]:
    return Counter(launch.kernel for launch in launches)


def odd_sizes(seed: int) -> tuple[Tensor, Tensor]:
    """Two images of 7x9, ties at 0 in every pooling window, and the gradient of the output."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, DIMS.in_channels, 7, 9, generator=draw).relu()
    return x, torch.randn(2, DIMS.out_channels, 7, 9, generator=draw)


# of the maps and filters, of BatchNorms
SIXTEEN_BITS = {
    "fp16": (torch.float16, torch.float16),
    "fp16-fp32-norms": (torch.float16, torch.float32),
    "bf16-fp32-norms": (torch.bfloat16, torch.float32),
}


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtypes", SIXTEEN_BITS.values(), ids=SIXTEEN_BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_in_16_bits(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> None:
    """Each by itself, and the running statistics."""
    module = with_open_gates(KINDS[kind]()).to(device, dtypes[0])
    for layer in norms(module):
        layer.to(dtypes[1])
    assert_same_step(module, "triton", steps=1, draw=odd_sizes)


def far_from_zero(seed: int) -> tuple[Tensor, Tensor]:
    """Mean 1000 and variance 1 in each channel, and the gradient of the output."""
    draw = torch.Generator().manual_seed(seed)
    x = 1000.0 + torch.randn(2, DIMS.in_channels, 9, 9, generator=draw)
    return x, torch.randn(2, DIMS.out_channels, 9, 9, generator=draw)


@pytest.mark.usefixtures("nan_filled_empty")
def test_far_means(device: torch.device) -> None:
    """Mean 1000 and variance 1 behind each convolution: every filter passes one channel on, and the
    beta of the reduces moves what the 3x3 and 5x5 read. A mean that is two roundings off shows."""
    module = with_open_gates(block())
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d):
            side, out = layer.kernel_size[0] // 2, torch.arange(layer.out_channels)
            nn.init.zeros_(layer.weight)
            with torch.no_grad():
                layer.weight[out, out % layer.in_channels, side, side] = 1.0
        elif name in ("branch2.0.bn", "branch3.0.bn"):
            nn.init.constant_(layer.bias, 1000.0)
    assert_same_step(module.to(device), "triton", draw=far_from_zero)
    for layer in norms(module):
        # behind two batches at 0.1: 190 of 1000, from within 2 of 0
        assert layer.running_mean.min() > 180
        assert layer.running_var.max() < 1.6


# of nn.BatchNorm2d -> steps
OPTIONS = {
    "momentum=None": ({"momentum": None}, 3),
    "affine=False": ({"affine": False}, 1),
    "track_running_stats=False": ({"track_running_stats": False}, 1),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_options(kind: str, name: str, device: torch.device) -> None:
    """Each by itself; test_batch_norm_ops has a module without both parameters and statistics."""
    options, steps = OPTIONS[name]
    module = with_options(KINDS[kind](), **options).to(device)
    with fi.record_launches() as launches:
        assert_same_step(module, "triton", steps)
    assert kernels_of(launches)["_batch_statistics_kernel"] == steps


def test_a_frozen_convolution_in_training(device: torch.device) -> None:
    """In eval its statistics are folded into the filter, and kept; every gradient is there."""
    module = convolution().to(device)
    module.bn.eval()
    before = [b.clone() for b in module.buffers()]
    with fi.record_launches() as launches:
        assert_same_step(module, "triton", steps=1)
    kernels = kernels_of(launches)
    assert kernels["_conv2d_fwd_kernel"] == 1
    assert kernels["_batch_statistics_kernel"] == kernels["_normalise_kernel"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


def test_some_frozen_layers_in_training(device: torch.device) -> None:
    """The six convolutions run one by one, each with its kernels."""
    module = block().to(device)
    frozen = module.branch1.bn, module.branch3[0].bn
    for layer in frozen:
        layer.eval()
    assert not module.is_fused
    with fi.record_launches() as launches:
        assert_same_step(module, "triton")
    kernels = kernels_of(launches)
    assert kernels["_conv2d_fwd_kernel"] == 2 * 6
    assert kernels["_batch_statistics_kernel"] == 2 * 4
    assert all(n.num_batches_tracked == (0 if n in frozen else 2) for n in norms(module))


def test_one_layer_for_two_convolutions(device: torch.device) -> None:
    """It counts and averages twice in training: one launch that did both would be a race."""
    module, twin = block().to(device), twin_of(block()).to(device)
    for of in (module, twin):
        of.branch1.bn = of.branch3[1].bn
    twin.load_state_dict(module.state_dict())
    assert "plain PyTorch: BatchNorm layers share their running statistics" in repr(module)
    x, dy = (t.to(device) for t in data(0))
    with fi.backend("triton"):
        got = step(module, x, dy)
    torch.testing.assert_close(got, step(twin, x, dy), rtol=1e-3, atol=1e-4)
    assert module.branch1.bn.num_batches_tracked == 2
    module.eval()
    assert module.is_fused


def test_half_of_a_pair_is_plain_pytorch() -> None:
    """A gamma without beta is computed, half of the statistics refused."""
    x = torch.randn(2, DIMS.in_channels, 3, 3)
    module = convolution()
    module.bn.bias = None
    assert "plain PyTorch: BatchNorm has one of weight and bias" in repr(module)
    torch.testing.assert_close(module(x), twin_of(module)(x))
    module.bn.running_var = None
    assert "BatchNorm has one of" in repr(module)
    for of in (module, twin_of(module)):
        with pytest.raises(ValueError, match="running_mean and running_var must either both"):
            of(x)
    module.bn.weight = None
    assert "plain PyTorch: BatchNorm has one of running_mean and running_var" in repr(module)


@pytest.mark.parametrize("kind", KINDS)
def test_one_value_a_channel(kind: str, device: torch.device) -> None:
    """PyTorch's error in training, before anything is counted; in eval a result."""
    module, x = KINDS[kind]().to(device), torch.randn(1, DIMS.in_channels, 1, 1, device=device)
    with fi.backend("triton"):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            module(x)
        assert all(layer.num_batches_tracked == 0 for layer in norms(module))
        torch.testing.assert_close(module.eval()(x), twin_of(module)(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_eps_of_zero(kind: str, backend: str, device: torch.device) -> None:
    """An error in training, as PyTorch's; in eval a result."""
    module = KINDS[kind]().to(device)
    for layer in norms(module):
        layer.eps = 0.0
    x = torch.randn(2, DIMS.in_channels, 3, 3, device=device)
    with fi.backend(backend):
        with pytest.raises(ValueError, match=r"eps must be positive in training, got 0.0"):
            module(x)
        assert all(layer.num_batches_tracked == 0 for layer in norms(module))
        twin = twin_of(module.eval())
        for layer in norms(twin):  # torch 2.11 takes no zero in eval either
            layer.eps = 1e-30
        torch.testing.assert_close(module(x), twin(x))

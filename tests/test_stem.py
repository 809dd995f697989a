"""The stem of the paper's network on the ATen path: the function, its errors, the network's use of
it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import STEM_NORM, STEM_POOL, Window
from fused_inception.nn import stem
from fused_inception.ops import stem as ops
from fused_inception.ops.stages import Stem as StemOptions
from tests.test_gpu import Stem


def tensors(c_in: int = 3, widths: tuple[int, int, int] = (8, 16, 24)) -> list[Tensor]:
    """x, then filter and bias of each convolution."""
    c1, c2, c3 = widths
    result = [torch.randn(1, c_in, 19, 17)]
    for shape in ((c1, c_in, 7, 7), (c2, c1, 1, 1), (c3, c2, 3, 3)):
        result += [torch.randn(shape) * shape[1] ** -0.5 / shape[2], torch.randn(shape[0])]
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_by_layer(dtype: torch.dtype) -> None:
    options = {"pool1": Window(5, 2, 1), "norm2": (3, 0.5, 0.6, 2.0), "stride": 1, "padding": 2}
    got, want = (
        function(*(t.to(dtype) for t in inputs), **options)
        for inputs in [tensors(5)]
        for function in (functional.googlenet_stem, reference.googlenet_stem)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("c_in", "widths", "pool1", "reason"),
    [
        (5, (8, 8, 8), STEM_POOL, "conv1 is no 7x7 convolution of stride 2"),
        (3, (8, 12, 16), STEM_POOL, r"multiples of 8, got \[8, 12, 16\]"),
        (3, (8, 8, 8), Window(5, 2), "kernel_size 5: kernels exist up to 3"),
        (3, (64, 64, 192), STEM_POOL, None),
    ],
    ids=["channels", "widths", "window", "the-paper's"],
)
def test_stems_without_an_operator(
    c_in: int, widths: tuple[int, int, int], pool1: Window, reason: str | None
) -> None:
    stem = StemOptions(2, 3, pool1, STEM_NORM, STEM_NORM, STEM_POOL)
    why = ops.why_not(tensors(c_in, widths)[1::2], stem)
    assert why is None if reason is None else re.search(reason, why)
    wide = StemOptions(2, 3, STEM_POOL, STEM_NORM, (33, 1e-4, 0.75, 1.0), STEM_POOL)
    assert ops.why_not(tensors()[1::2], wide) == "size 33: kernels exist up to 32"


@pytest.mark.parametrize(
    ("position", "shape", "options", "message"),
    [
        (1, (8, 2, 7, 7), {}, r"w1 must be of shape \[C_out, 3, K, K\], got \[8, 2, 7, 7\]"),
        (3, (16, 8, 3, 3), {}, r"w2 must be of shape \[C_out, 8, 1, 1\]"),
        (5, (24, 16, 5, 5), {}, r"w3 must be of shape \[C_out, 16, 3, 3\]"),
        (5, (24, 16, 3), {}, "w3 must be of shape"),
        (4, (15,), {}, r"b2 must be of shape \[16\], got \[15\]"),
        (0, (1, 3, 19), {}, "x must have 4 dimensions"),
        (0, (1, 3, 3, 19), {}, "a window of 3 does not fit a side of 1"),
        (None, (), {"stride": 0}, "stride must be at least 1, got 0"),
        (None, (), {"padding": -1}, "padding must be at least 0, got -1"),
        (None, (), {"pool2": Window(3, 2, 2)}, "padding must be at most half"),
        (None, (), {"pool1": Window(3, 0)}, "stride must be at least 1, got 0"),
        (None, (), {"norm1": (0, 1.0, 1.0, 1.0)}, "size must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(
    position: int | None, shape: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    inputs = tensors()
    if position is not None:
        inputs[position] = torch.randn(shape)
    with pytest.raises(ValueError, match=message):
        functional.googlenet_stem(*inputs, **options)


def test_wrong_types() -> None:
    inputs = tensors()
    inputs[3] = inputs[3].double()
    with pytest.raises(TypeError, match="w2 must be float32, got float64"):
        functional.googlenet_stem(*inputs)
    with fi.backend("triton"), pytest.raises(TypeError, match="float64"):
        functional.googlenet_stem(*(t.double() for t in inputs))


class TestChangesInTheStem:
    """What its operator would pass over makes the layers compute one by one."""

    x = torch.rand(1, 3, 40, 40)

    @pytest.fixture(autouse=True)
    def _network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.network = fi.googlenet("paper", num_classes=3, aux_logits=False).eval()
        self.calls: list[dict[str, Any]] = []
        stem = functional.googlenet_stem

        def count(*tensors: Tensor, **options: Any) -> Tensor:
            self.calls.append(options)
            return stem(*tensors, **options)

        monkeypatch.setattr(functional, "googlenet_stem", count)
        assert "stem: one operator" in self.network.extra_repr()
        self.y = self.network(self.x)
        assert len(self.calls) == 1

    def check(self, reason: str) -> None:
        assert f"stem: layer by layer, {reason}" in self.network.extra_repr()
        torch.testing.assert_close(self.network(self.x), self.y)
        assert len(self.calls) == 1

    @pytest.mark.parametrize("name", ["conv1", "maxpool1", "norm1", "conv2", "norm2", "maxpool2"])
    def test_hook(self, name: str) -> None:
        seen = []
        self.network.get_submodule(name).register_forward_hook(lambda *a: seen.append(a))
        self.check(f"{name} has a hook")
        # a hook on one of a pair keeps them apart too
        assert len(seen) == 1

    def test_inner_hook(self) -> None:
        seen = []
        self.network.conv3.conv.register_forward_hook(lambda *a: seen.append(a))
        self.check("conv3 is plain PyTorch")
        assert len(seen) == 1

    def test_another_type(self) -> None:
        self.network.norm2 = nn.LocalResponseNorm(5, 1e-4, 0.75, 1.0)
        self.check("norm2 is a torch.nn.modules.normalization.LocalResponseNorm")

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_batch_norm(self, number: int) -> None:
        name = f"conv{number}"
        conv = getattr(self.network, name).conv
        block = fi.ConvBlock(
            conv.in_channels, conv.out_channels, kernel_size=conv.kernel_size[0],
            stride=conv.stride[0], padding=conv.padding[0], norm="batch", eps=0.0,
        )  # fmt: skip
        with torch.no_grad():
            block.conv.weight.copy_(conv.weight)
            block.bn.bias.copy_(conv.bias)
        setattr(self.network, name, block.eval())
        self.check(f"{name} has batch norm")

    def test_another_convolution(self) -> None:
        conv = nn.Conv2d(64, 64, 3, padding=1)
        with torch.no_grad():
            conv.weight.zero_()[:, :, 1:2, 1:2].copy_(self.network.conv2.conv.weight)
            conv.bias.copy_(self.network.conv2.conv.bias)
        self.network.conv2.conv = conv
        self.check("conv2 is no 1x1 convolution that keeps the size")

    def test_another_first_convolution(self) -> None:
        conv = nn.Conv2d(3, 64, 9, 2, 4)
        with torch.no_grad():
            conv.weight.zero_()[:, :, 1:-1, 1:-1].copy_(self.network.conv1.conv.weight)
            conv.bias.copy_(self.network.conv1.conv.bias)
        self.network.conv1.conv = conv
        self.check("conv1 is no 7x7 convolution of stride 2 and padding 3")

    def test_a_size_for_each_direction(self) -> None:
        self.network.maxpool1 = fi.MaxPool2d((3, 3), (2, 2), ceil_mode=True)
        self.check("maxpool1 has a size for each direction")

    def test_options_come_from_the_layers(self) -> None:
        self.network.norm1.alpha, self.network.maxpool2.ceil_mode = 0.5, False
        y = self.network(self.x)
        assert self.calls[1]["norm1"] == (5, 0.5, 0.75, 1.0)
        assert not self.calls[1]["pool2"].ceil_mode
        self.network.conv1.register_forward_hook(lambda *a: None)
        torch.testing.assert_close(self.network(self.x), y)


def test_the_first_layers_alone() -> None:
    """What the tests that need a GPU run."""
    network, x = fi.googlenet("paper", num_classes=2, aux_logits=False), torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(Stem(network)(x), stem.stem(x, network._stem()))

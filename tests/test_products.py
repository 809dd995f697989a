"""The products of launches: what results need and what tiles multiply, by hand."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import products
from benchmarks.padding import OPERANDS
from benchmarks.products import Product
from fused_inception.geometry import STEM_NORM, STEM_POOL, AvgWindow, InceptionDims, NaiveDims
from fused_inception.ops.stages import Stem
from fused_inception.tuning import conv_heuristic, heuristic, naive_heuristic
from fused_inception.tuning.configs import (
    AvgPoolProjectConfig,
    BranchesConfig,
    ImageConvConfig,
    InputGradConfig,
    MaskConfig,
    StemConvConfig,
    StemWgradConfig,
    Tile,
    WgradJob,
)
from tests.conftest import HAS_TRITON, INTERPRETED

BF16 = OPERANDS["bf16"]


def test_tiles_against_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """288 columns in 2 * 128 + 32, 100 pixels in 128 rows, 144 channels of a tap in 5 * 32."""
    dims = InceptionDims(512, 112, 144, 288, 32, 64, 64)
    other = Tile(64, 64, 32)
    for tail, columns in ((32, 288), (0, 384)):
        config = BranchesConfig(Tile(128, 128, 32), tail, other, 8, 3)
        monkeypatch.setattr(heuristic, "branches_config", lambda *_, c=config: c)
        (product,) = dict(products.launches(dims, 100, BF16, "sm_90"))["B 3x3"]
        assert product.useful == 100 * 288 * 144 * 9
        assert product.issued == 128 * columns * 160 * 9


def test_gradients_of_images_try_all_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7x7 of stride 2 on 16 x 16 pixels, 64 outputs: 1 product in 4 is of a tap that the stride
    meets, 3 of 16 columns are channels. 147 positions and the bias are 3 tiles of 64."""
    config = ImageConvConfig(Tile(128, 64, 32), WgradJob(Tile(64, 64, 64), 1), Tile(64, 16, 64), 4)
    monkeypatch.setattr(conv_heuristic, "image_conv_config", lambda *_: config)
    found = products.image_convolution(3, 64, 7, 2, 1, 16, BF16, "sm_90")
    (forward,), (dgrad,), (wgrad,) = found.values()
    needed = 8 * 8 * 64 * 3 * 49
    assert (forward.useful, dgrad.useful, wgrad.useful) == (needed,) * 3
    assert forward.issued == 128 * 64 * 160
    assert dgrad.issued == 16 * 16 * 64 * 16 * 49
    assert wgrad.issued == 64 * 192 * 64
    # the bias begins a tile: 64 positions and it, for 9 x 9 pixels
    (wgrad,) = products.image_convolution(4, 64, 4, 2, 1, 16, BF16, "sm_90")["image_conv_wgrad"]
    assert (wgrad.useful, wgrad.issued) == (64 * 64 * 81, 64 * 128 * 128)


@pytest.mark.skipif(not HAS_TRITON, reason="the packed image is the kernels'")
def test_products_of_the_stem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed image of 32 x 32 pixels: 147 positions of 256 elements; windows begin at 19 * 15 +
    16 = 301 packed pixels, for 256 output pixels: 3 steps of 64 in one split, 2 in the other. 8 x 8
    pixels behind the pool."""
    job = WgradJob(Tile(128, 128, 64), 1)
    wgrad = StemWgradConfig(
        WgradJob(Tile(128, 64, 64), 2), job, job, MaskConfig(32, 64, 32, 4), 8, 3
    )
    forward = StemConvConfig(Tile(128, 64, 64), 4, 2)
    monkeypatch.setattr(conv_heuristic, "stem_wgrad_config", lambda *_: wgrad)
    monkeypatch.setattr(conv_heuristic, "stem_conv_config", lambda *_: forward)
    found = products.stem(3, (64, 64, 192), 1, 32, BF16, "sm_90")
    (conv1,), (first, second, third) = found["stem_conv_fwd"], found["stem_wgrad"]
    assert (conv1.useful, conv1.issued) == (256 * 64 * 147, 256 * 64 * 256)
    assert (first.useful, first.issued) == (147 * 64 * 256, 256 * 64 * 320)
    assert (second.useful, second.issued) == (64 * 64 * 64, 128 * 128 * 64)
    assert (third.useful, third.issued) == (576 * 192 * 64, 640 * 256 * 64)


def test_products_of_the_naive_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of 192 channels in 2 * 128 columns, of 100 pixels in 128 rows: 72, 128 and 48
    outputs of a tap in steps of 32."""
    config = InputGradConfig(Tile(128, 128, 32), 8, 3)
    monkeypatch.setattr(naive_heuristic, "naive_input_grad_config", lambda *_: config)
    found = products.naive(NaiveDims(192, 72, 128, 48), 100, BF16, "sm_90")["naive_input_grad"]
    assert sum(p.useful for p in found) == 100 * 192 * (72 + 9 * 128 + 25 * 48)
    assert sum(p.issued for p in found) == 128 * 256 * (96 + 9 * 128 + 25 * 64)


def test_products_of_auxiliary_classifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 images of 14 x 14 pixels and 4 x 4 windows, 520 channels: the gradient of the map takes
    two tiles of 128 pixels an image, and each multiplies 16 windows of a tile of 32."""
    job = WgradJob(Tile(64, 128, 64), 1)
    config = AvgPoolProjectConfig(Tile(128, 32, 64), 25, job, Tile(64, 32, 64), 128, 4, 8)
    monkeypatch.setattr(conv_heuristic, "avg_pool_project_config", lambda *_: config)
    window = AvgWindow(kernel=5, stride=3, ceil_mode=True)
    found = products.auxiliary(520, 128, 3, 14, window, BF16, "sm_90")
    (forward,), (wgrad, dgrad) = found.values()
    assert (forward.useful, forward.issued) == (48 * 520 * 128, 64 * 576 * 128)
    assert (wgrad.useful, wgrad.issued) == (48 * 520 * 128, 64 * 576 * 128)
    assert (dgrad.useful, dgrad.issued) == (48 * 520 * 128, 3 * 2 * 32 * 576 * 128)


class Counted:
    """Multiply-adds of the products that interpreted kernels make."""

    def __init__(self) -> None:
        self.each: list[int] = []

    def is_of(self, *found: Iterable[list[Product]]) -> bool:
        """Whether the tiles of these launches issue as many, to the last one."""
        return sum(self.each) == sum(p.issued for launches in found for of in launches for p in of)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """What the test multiplies."""
    if not (HAS_TRITON and INTERPRETED):
        pytest.skip("counts in Triton's interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot
    counted = Counted()

    def count(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        counted.each.append(a.data.size * b.data.shape[-1])
        return create_dot(builder, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", count)
    return counted


def parameters(*shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(shape) for shape in shapes], [torch.randn(shape[0]) for shape in shapes]


def draw(*shape: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "dims", [InceptionDims(40, 24, 16, 40, 8, 16, 24), NaiveDims(40, 24, 40, 16)], ids=type
)
def test_modules_multiply_as_much(counted: Counted, dims: InceptionDims | NaiveDims) -> None:
    from fused_inception.ops import inception_naive_triton, inception_triton

    naive = isinstance(dims, NaiveDims)
    script = inception_naive_triton if naive else inception_triton
    x = draw(2, 40, 7, 7)
    filters, biases = parameters(*dims.filter_shapes)
    y, saved = script.forward(x, filters, biases, True)
    dtypes = [bias.dtype for bias in biases]
    script.backward(y, x, saved, filters, dtypes, [True] * (1 + 2 * len(filters)))
    launches = products.naive if naive else products.launches
    assert counted.is_of(dict(launches(dims, 2 * 7 * 7, BF16, "sm_90")).values())


@pytest.mark.parametrize(("c_in", "c_out", "kernel", "stride"), [(3, 24, 3, 2), (16, 40, 3, 1)])
def test_convolutions_multiply_as_much(
    counted: Counted, c_in: int, c_out: int, kernel: int, stride: int
) -> None:
    from fused_inception.ops import conv2d_triton

    x = draw(2, c_in, 9, 9)
    (weight,), (bias,) = parameters((c_out, c_in, kernel, kernel))
    window = stride, kernel // 2
    y, saved = conv2d_triton.forward(x, weight, bias, *window, True)
    conv2d_triton.backward(y, x, saved, weight, bias, *window, [True] * 3)
    if c_in == 3:
        found = products.image_convolution(c_in, c_out, kernel, stride, 2, 9, BF16, "sm_90")
    else:
        found = products.convolution(c_in, c_out, kernel, 2 * 9 * 9, BF16, "sm_90", norm=False)
    assert counted.is_of(found.values())


def test_conv1_alone_multiplies_as_much(counted: Counted) -> None:
    """Ahead of a BatchNorm, of a packed image."""
    from fused_inception.ops import conv2d_bn_triton
    from fused_inception.ops.running import Running

    x = draw(2, 3, 20, 20)
    (weight,), _ = parameters((16, 3, 7, 7))
    running = Running([], [], [], 0.1, False)
    y, saved = conv2d_bn_triton.forward(x, [weight], [], [], running, 1e-3, 2, 3)
    conv2d_bn_triton.backward(y, x, saved, [weight], [], 2, 3, [False, True, False, False])
    assert counted.is_of(products.packed_convolution(3, 16, 2, 20, BF16, "sm_90").values())


def test_stem_multiplies_as_much(counted: Counted) -> None:
    """Its filter gradients are one launch, those of conv2 and conv3 none of their own."""
    from fused_inception.ops import stem_triton

    widths = c1, c2, c3 = 16, 8, 24
    options = Stem(2, 3, STEM_POOL, STEM_NORM, STEM_NORM, STEM_POOL)
    filters, biases = parameters((c1, 3, 7, 7), (c2, c1, 1, 1), (c3, c2, 3, 3))
    x = draw(2, 3, 20, 20)
    y, saved = stem_triton.forward(x, filters, biases, options, True)
    stem_triton.backward(y, x, saved, filters, biases, options, [False, *[True] * 6])
    where = BF16, "sm_90"
    found = products.stem(3, widths, 2, 20, *where)
    for name, c_in, c_out, kernel in (("conv2", c1, c2, 1), ("conv3", c2, c3, 3)):
        of = products.convolution(c_in, c_out, kernel, 2 * 5 * 5, *where, norm=False)
        found |= {f"{name} {way}": of[f"conv2d_{way}"] for way in ("fwd", "dgrad")}
    assert counted.is_of(found.values())


def test_auxiliary_classifiers_multiply_as_much(counted: Counted) -> None:
    from fused_inception.ops import avg_pool_project_triton

    window = AvgWindow(kernel=5, stride=3, ceil_mode=True)
    x = draw(2, 72, 12, 12)
    (weight,), (bias,) = parameters((24, 72, 1, 1))
    y, saved = avg_pool_project_triton.forward(x, weight, bias, window, True)
    avg_pool_project_triton.backward(y, y, *saved, weight, bias, tuple(x.shape), window, [True] * 3)
    found = products.auxiliary(72, 24, 2, 12, window, BF16, "sm_90")
    assert counted.is_of(found.values())

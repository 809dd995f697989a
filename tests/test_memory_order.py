"""Memory in another order than usual: saved maps that hooks give back, filters, vectors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional
from fused_inception.geometry import Window
from fused_inception.nn.inception import parameters_of

pytestmark = pytest.mark.usefixtures("on_device")

WIDTHS = (16, 8, 8, 8, 8, 8, 8)


def repacked(t: Tensor) -> Tensor:
    """What `torch.autograd.graph.save_on_cpu(pin_memory=True)` keeps: sizes and no strides."""
    return torch.empty(t.size(), dtype=t.dtype).copy_(t)


def gradients(
    run: Callable[[], Tensor], leaves: list[Tensor], backend: str = "triton"
) -> list[Tensor]:
    with fi.backend(backend):
        y = run()
    draw = torch.Generator(y.device).manual_seed(1)
    dy = torch.randn(y.shape, generator=draw, device=y.device, dtype=y.dtype)
    return list(torch.autograd.grad(y, leaves, dy))


def trunk() -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    blocks = [fi.Inception(*WIDTHS), fi.Inception(32, *WIDTHS[1:]), fi.Inception(32, *WIDTHS[1:])]
    parameters = [parameters_of(block) for block in blocks]
    pools = {0: Window(3, 2, ceil_mode=True)}

    def run(x: Tensor) -> Tensor:
        y, (tapped,) = functional.inception_trunk(
            x, parameters, pools=pools, taps=[1], global_pool=True
        )
        return y.flatten() + tapped.mean()

    return run, [p for block in blocks for p in block.parameters()]


def of_module(module: nn.Module) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    return module, list(module.parameters())


def of_function(name: str, *options: int) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    return lambda x: getattr(functional, name)(x, *options), []


SAVING: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], list[Tensor]]]] = {
    "module": lambda: of_module(fi.Inception(*WIDTHS)),
    "module with BatchNorm": lambda: of_module(fi.Inception(*WIDTHS, norm="batch")),
    "naive": lambda: of_module(fi.InceptionNaive(16, 8, 8, 8)),
    "convolution": lambda: of_module(fi.ConvBlock(16, 8, kernel_size=3, padding=1)),
    "convolution with BatchNorm": lambda: of_module(
        fi.ConvBlock(16, 8, kernel_size=3, padding=1, norm="batch")
    ),
    "auxiliary": lambda: of_module(fi.InceptionAux(16, 3, map_size=5, dropout=0.0)),
    "trunk": trunk,
    "max_pool2d": lambda: of_function("max_pool2d", 3, 2),
    "lrn_max_pool2d": lambda: of_function("lrn_max_pool2d", 5, 3, 2),
    "max_pool2d_lrn": lambda: of_function("max_pool2d_lrn", 5, 3, 2),
    "local_response_norm": lambda: of_function("local_response_norm", 5),
}


def turned_round(t: Tensor) -> Tensor:
    """Matrices by columns."""
    return t.t().contiguous().t() if t.dim() == 2 else t


@pytest.mark.parametrize("name", ["module", "module with BatchNorm", "convolution", "trunk"])
def test_saved_matrices_come_back_by_columns(name: str) -> None:
    """Masks and numbers of a channel."""
    run, parameters = SAVING[name]()
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(lambda: run(x), [x, *parameters])
    with torch.autograd.graph.saved_tensors_hooks(turned_round, lambda t: t):
        got = gradients(lambda: run(x), [x, *parameters])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", SAVING)
def test_saved_maps_come_back_in_another_order(name: str) -> None:
    run, parameters = SAVING[name]()
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *parameters]
    expected = gradients(lambda: run(x), leaves)
    with torch.autograd.graph.saved_tensors_hooks(repacked, lambda t: t):
        got = gradients(lambda: run(x), leaves)
    for ours, theirs in zip(got, expected, strict=True):
        # a linear layer rounds otherwise where its weight lies otherwise
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_saved_maps_of_the_stem_come_back_in_another_order() -> None:
    shapes = ((8, 3, 7, 7), (8,), (8, 8, 1, 1), (8,), (8, 8, 3, 3), (8,))
    weights = [torch.randn(shape).mul(0.1).requires_grad_() for shape in shapes]
    x = torch.randn(1, 3, 24, 24)
    expected = gradients(lambda: functional.googlenet_stem(x, *weights), weights)
    with torch.autograd.graph.saved_tensors_hooks(repacked, lambda t: t):
        got = gradients(lambda: functional.googlenet_stem(x, *weights), weights)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_saved_image_of_conv1_comes_back_in_another_order() -> None:
    block = fi.ConvBlock(3, 8, kernel_size=7, stride=2, padding=3, norm="batch")
    x = torch.randn(2, 3, 24, 22)
    expected = gradients(lambda: block(x), [*block.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(repacked, lambda t: t):
        got = gradients(lambda: block(x), [*block.parameters()])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    plain = gradients(lambda: block(x), [*block.parameters()], "torch")
    for ours, theirs in zip(got, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def turned(*shape: int) -> Tensor:
    """A filter that lies in memory as [C_in, C_out, K, K], as a transposed or tied one does."""
    c_out, c_in, *sides = shape
    return torch.randn(c_in, c_out, *sides).mul(0.2).transpose(0, 1).requires_grad_()


def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d_relu(x, w, b, padding=w.shape[2] // 2)


def normalised(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d_bn_relu(
        x, w, None, None, b.abs() + 0.5, b, padding=w.shape[2] // 2, training=True
    )


@pytest.mark.parametrize(
    ("run", "kernel"),
    [
        (convolution, 1),
        (convolution, 3),
        (normalised, 1),
        (normalised, 3),
        (functional.avg_pool2d_conv1x1_relu, 1),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_dense_filters_in_another_order(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], kernel: int
) -> None:
    x, bias = torch.randn(2, 8, 6, 6), torch.randn(16)
    weight = turned(16, 8, kernel, kernel)
    assert not weight.is_contiguous()
    (got,) = gradients(lambda: run(x, weight, bias), [weight])
    usual = weight.detach().contiguous().requires_grad_()
    (expected,) = gradients(lambda: run(x, usual, bias), [usual])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert got.stride() == weight.stride()


def apart(t: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    both = torch.stack([t.detach(), torch.full_like(t, 1e3)], dim=-1)
    return both[..., 0]


@pytest.mark.parametrize("c_in", [3, 16])
def test_strided_biases(c_in: int) -> None:
    x, w, b = torch.randn(2, c_in, 6, 6), torch.randn(16, c_in, 3, 3), torch.randn(16)
    with fi.backend("triton"):
        got, expected = (functional.conv2d_relu(x, w, of, 1, 1) for of in (apart(b), b))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_strided_norms() -> None:
    x, w = torch.randn(2, 16, 6, 6), torch.randn(16, 16, 3, 3)
    gamma, beta = torch.rand(16).requires_grad_(), torch.randn(16).requires_grad_()

    def run(gamma: Tensor, beta: Tensor) -> Tensor:
        return functional.conv2d_bn_relu(x, w, None, None, gamma, beta, padding=1, training=True)

    strided = [apart(t).requires_grad_() for t in (gamma, beta)]
    expected = gradients(lambda: run(gamma, beta), [gamma, beta])
    for ours, theirs in zip(gradients(lambda: run(*strided), strided), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with fi.backend("triton"):
        torch.testing.assert_close(run(*strided), run(gamma, beta), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_statistics_of_two_dtypes_are_refused_where_they_are_written_to(backend: str) -> None:
    x, w = torch.randn(2, 16, 6, 6).half(), torch.randn(16, 16, 3, 3).half()
    running = torch.zeros(16).half(), torch.ones(16)
    with fi.backend(backend):
        with pytest.raises(TypeError, match=r"of one dtype, got float16 and float32"):
            functional.conv2d_bn_relu(x, w, *running, padding=1, training=True)
        functional.conv2d_bn_relu(x, w, *running, padding=1)


@pytest.mark.parametrize("which", [0, 1])
def test_strided_statistics_are_refused_where_they_are_written_to(which: int) -> None:
    x, w = torch.randn(2, 16, 6, 6), torch.randn(16, 16, 3, 3)
    running = [torch.zeros(16), torch.ones(16)]
    running[which] = apart(running[which])
    with pytest.raises(ValueError, match=r"must be contiguous.*got stride 2"):
        functional.conv2d_bn_relu(x, w, *running, padding=1, training=True)
    usual = [t.contiguous() for t in running]
    with fi.backend("triton"):
        got, expected = (functional.conv2d_bn_relu(x, w, *of, padding=1) for of in (running, usual))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("run", [functional.conv2d_relu, functional.googlenet_stem])
def test_channels_of_images_beyond_two_to_the_31_elements(
    run: Callable[..., Tensor],
) -> None:
    """As frames of a long clip [C, T, H, W] that stands for a batch."""
    apart = 2**30
    far = torch.empty(2 * apart + 2**12, dtype=torch.float16).as_strided(
        (1, 3, 24, 24), (24 * 24, apart, 24, 1)
    )
    near = far.copy_(torch.randn(1, 3, 24, 24)).contiguous()
    shapes = [(8, 3, 7, 7), (8,)]
    if run is functional.googlenet_stem:
        shapes += [(8, 8, 1, 1), (8,), (8, 8, 3, 3), (8,)]
    weights = [torch.randn(shape).mul(0.1).half().requires_grad_() for shape in shapes]
    for x in (far, near):
        with torch.no_grad(), fi.backend("triton"):
            y = run(x, *weights)
        found = y, *gradients(lambda x=x: run(x, *weights), weights)
        if x is far:
            expected = found
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)

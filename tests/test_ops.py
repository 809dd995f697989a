"""The registered operators: schema, fakes, autograd, autocast; numbers and compilation on ATen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import InceptionDims
from fused_inception.ops.inception import inception, inception_backward
from tests.cases import INCEPTION_CASES, SMALL, InceptionCase, InceptionTensors
from tests.conftest import needs_triton
from tests.tolerances import assert_within

NAMES = ("x", "w1", "w3r", "w3", "w5r", "w5", "wp", "b1", "b3r", "b3", "b5r", "b5", "bp")
TINY = InceptionDims(4, 2, 3, 2, 2, 3, 2)
cases = pytest.mark.parametrize("case", INCEPTION_CASES, ids=lambda case: case.name)


def pairs(data: InceptionTensors) -> list[Tensor]:
    """w1, b1, w3r, b3r ...: the arguments of the public function behind x."""
    return [t for pair in zip(data.filters, data.biases, strict=True) for t in pair]


def in_public_order(data: InceptionTensors) -> list[Tensor]:
    return [data.x, *pairs(data)]


def with_gradients(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def step(function: Callable[..., Tensor], arguments: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the gradient of every argument."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in arguments]
    for leaf in leaves:
        leaf.requires_grad_()
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def exact_strides(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return h * w * c, 1, w * c, c


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_output_and_gradients(case: InceptionCase, dtype: torch.dtype) -> None:
    data = case.tensors(dtype)
    got = step(functional.inception, in_public_order(data), data.dy)
    wide = data.to(torch.float64)
    want = step(reference.inception, in_public_order(wide), wide.dy)
    baseline = step(reference.inception, in_public_order(data), data.dy)
    for i, (a, b, c) in enumerate(zip(got, want, baseline, strict=True)):
        assert_within(f"tensor {i}", a, b, c, slack=3.0 if i else 2.0)


@cases
def test_fp64_is_exact(case: InceptionCase) -> None:
    data = case.tensors(torch.float64)
    got = step(functional.inception, in_public_order(data), data.dy)
    want = step(reference.inception, in_public_order(data), data.dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@cases
def test_output_is_exactly_channels_last(case: InceptionCase) -> None:
    data = case.tensors(torch.float32)
    y = functional.inception(*in_public_order(data))
    assert y.stride() == exact_strides(*y.shape)


def test_nan_passes_forward_and_backward() -> None:
    """ReLU keeps a NaN and lets the gradient through there: the mask is not (y <= 0)."""
    data = InceptionCase("", SMALL, 1, 4, 4).tensors(torch.float32)
    data.biases[0][3] = float("nan")
    y = functional.inception(*in_public_order(data))
    assert y[:, 3].isnan().all()
    got = step(functional.inception, in_public_order(data), data.dy)
    want = step(reference.inception, in_public_order(data), data.dy)
    assert (got[3] != 0).any()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.contiguous(), id="contiguous"),
        pytest.param(
            lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 16:],
            id="slice",
        ),
        pytest.param(
            lambda x: torch.cat([x[:, :3], x], 1).contiguous(memory_format=torch.channels_last)[
                :, 3:
            ],
            id="slice-at-an-odd-channel",
        ),
        pytest.param(lambda x: x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), id="turned"),
        pytest.param(lambda x: x[:, :, ::2], id="every-second-row"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded-batch"),
    ],
)
def test_any_strides_of_x(change: Callable[[Tensor], Tensor]) -> None:
    data = InceptionCase("", SMALL, 2, 6, 5).tensors(torch.float64)
    x = change(data.x)
    data = data._replace(x=x, dy=torch.randn(2, SMALL.out_channels, *x.shape[2:]).double())

    def of(function: Callable[..., Tensor]) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, *pairs(data))
        return [y, *torch.autograd.grad(y, leaf, data.dy)]

    for a, b in zip(of(functional.inception), of(reference.inception), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean], ids=["sum", "mean"])
def test_expanded_gradients(reduce: Callable[[Tensor], Tensor]) -> None:
    data = InceptionCase("", SMALL, 2, 4, 3).tensors(torch.float64)

    def of(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = with_gradients(in_public_order(data))
        return list(torch.autograd.grad(reduce(function(*leaves)), leaves))

    for a, b in zip(of(functional.inception), of(reference.inception), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("needed", [(0,), (7,), (1,), (2, 8), (3,), (6,), (0, 4), (1, 2, 9), (13,)])
def test_only_needed_gradients(needed: tuple[int, ...]) -> None:
    """Positions in NAMES; 13 stands for all parameters without x."""
    if needed == (13,):
        needed = tuple(range(1, 13))
    data = InceptionCase("", SMALL, 2, 4, 3).tensors(torch.float64)
    tensors = [data.x, *data.filters, *data.biases]
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    y = functional.inception(
        *in_public_order(data._replace(x=leaves[0], filters=leaves[1:7], biases=leaves[7:]))
    )
    got = torch.autograd.grad(y, [leaves[i] for i in needed], data.dy)
    everything = step(reference.inception, in_public_order(data), data.dy)[1:]
    want = [everything[0], *everything[1::2], *everything[2::2]]
    for i, gradient in zip(needed, got, strict=True):
        torch.testing.assert_close(gradient, want[i], msg=NAMES[i])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_filter_gradients_take_the_strides_of_the_filters(layout: torch.memory_format) -> None:
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32)
    filters = [w.contiguous(memory_format=layout) for w in data.filters]
    got = step(functional.inception, in_public_order(data._replace(filters=filters)), data.dy)
    for w, dw in zip(filters, got[2::2], strict=True):
        assert dw.stride() == w.stride()
        # no part of a larger gradient, all of which it would keep alive
        assert dw.untyped_storage().nbytes() == dw.nbytes


@needs_triton
def test_nothing_is_saved_without_gradients(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32, device)
    y, saved = inception(data.x, data.filters, data.biases, False)
    assert saved == []
    assert y.shape[1] == SMALL.out_channels


@needs_triton
def test_backward_without_saved_tensors_is_an_error(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32, device)
    data.x.requires_grad_()
    y, _ = inception(data.x, data.filters, data.biases, False)
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


class _Cut(torch.autograd.Function):
    """What is ahead of it gets no gradient, not even zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        return (None,) * len(gradients)


WIDTHS = (16, 8, 8, 8, 8, 8, 8)
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: fi.Inception(*WIDTHS),
    "module with BatchNorm": lambda: fi.Inception(*WIDTHS, norm="batch"),
    "naive module": lambda: fi.InceptionNaive(16, 8, 8, 8),
    "convolution": lambda: fi.ConvBlock(16, 8, kernel_size=3, padding=1),
    "convolution with BatchNorm": lambda: fi.ConvBlock(16, 8, kernel_size=1, norm="batch"),
    "max pool": lambda: fi.MaxPool2d(3, 2),
    "global pool": lambda: fi.GlobalAvgPool2d(),
    "norm": lambda: fi.LocalResponseNorm(5),
    "auxiliary classifier": lambda: fi.InceptionAux(16, 4),
}


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("block", BLOCKS)
def test_without_a_gradient_there_are_none(block: str, backend: str, device: torch.device) -> None:
    """As of PyTorch's own layers: neither zeros nor an error."""
    module = BLOCKS[block]().to(device)
    side = 14 if block == "auxiliary classifier" else 5
    x = torch.randn(2, 16, side, side, device=device, requires_grad=True)
    with fi.backend(backend):
        (y,) = _Cut.apply(module(x))
    y.sum().backward()
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])
def test_stem_without_a_gradient_has_none(backend: str, device: torch.device) -> None:
    shapes = (8, 3, 7, 7), (8,), (8, 8, 1, 1), (8,), (8, 8, 3, 3), (8,)
    parameters = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    with fi.backend(backend):
        y = functional.googlenet_stem(torch.randn(1, 3, 20, 20, device=device), *parameters)
    _Cut.apply(y)[0].sum().backward()
    assert all(p.grad is None for p in parameters)


def test_double_backward_is_an_error() -> None:
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32)
    leaves = with_gradients(in_public_order(data))
    (dx,) = torch.autograd.grad(functional.inception(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


def test_double_backward_of_the_pool_is_an_error() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    y = functional.global_avg_pool2d(x).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.square().sum().backward()


def test_gradcheck() -> None:
    data = InceptionCase("", TINY, 2, 3, 2).tensors(torch.float64)
    # distinct values: differences across a tie of the pool are not gradients
    x = torch.randperm(data.x.numel()).double().view_as(data.x) / data.x.numel()
    leaves = with_gradients([x, *in_public_order(data)[1:]])
    assert torch.autograd.gradcheck(functional.inception, leaves)


def test_gradcheck_of_the_pool() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(functional.global_avg_pool2d, x)


@needs_triton
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("save", [False, True], ids=["forward", "training"])
def test_opcheck_inception(batch: int, save: bool, device: torch.device) -> None:
    data = InceptionCase("", SMALL, batch, 4, 3).tensors(torch.float32, device)
    filters, biases = data.filters, data.biases
    if save:
        filters, biases = with_gradients(filters), with_gradients(biases)
        data.x.requires_grad_()
    torch.library.opcheck(inception, (data.x, filters, biases, save))


@needs_triton
@pytest.mark.parametrize("every", [1, 2], ids=["all", "every-second"])
def test_opcheck_inception_backward(every: int, device: torch.device) -> None:
    data = InceptionCase("", SMALL, 2, 4, 3).tensors(torch.float32, device)
    _, saved = inception(data.x, data.filters, data.biases, True)
    needs = [i % every == 0 for i in range(13)]
    arguments = (data.dy, data.x, saved, data.filters, data.biases, needs)
    torch.library.opcheck(inception_backward, arguments)


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (0, 5, 4, 3), (1, 1, 1, 1), (3, 8, 7, 7)], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_global_pool(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape[0], shape[1], 1, 1).to(dtype)
    got = step(functional.global_avg_pool2d, [x], dy)
    want = step(reference.global_avg_pool2d, [x.double()], dy.double())
    baseline = step(reference.global_avg_pool2d, [x], dy)
    assert got[0].stride() == exact_strides(shape[0], shape[1], 1, 1)
    for name, a, b, c in zip(("y", "dx"), got, want, baseline, strict=True):
        assert_within(name, a, b, c)


# torch's own: inductor imports scripted modules of torch
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(engine: str) -> None:
    """One graph forward and backward, and none anew where the batch changes twice."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(engine)
    compiled = torch.compile(
        lambda *t: functional.global_avg_pool2d(functional.inception(*t)),
        fullgraph=True,
        backend=graphs,
    )

    def eager(*t: Tensor) -> Tensor:
        return reference.global_avg_pool2d(reference.inception(*t))

    for batch in (2, 3, 5, 4):
        data = InceptionCase("", SMALL, batch, 5, 4).tensors(torch.float64)
        dy = torch.randn(batch, SMALL.out_channels, 1, 1).double()
        got = step(compiled, in_public_order(data), dy)
        want = step(eager, in_public_order(data), dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2  # batch 2, then any


def test_compile_under_autocast() -> None:
    torch._dynamo.reset()
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float32)

    def amp(*t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.inception(*t)

    dy = data.dy.bfloat16()
    got = step(torch.compile(amp, fullgraph=True, backend="aot_eager"), in_public_order(data), dy)
    for a, b in zip(got, step(amp, in_public_order(data), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_autocast_casts_input_and_filters() -> None:
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float32)

    def amp(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*t: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*t)

        return run

    dy = data.dy.bfloat16()
    got = step(amp(functional.inception), in_public_order(data), dy)
    baseline = step(amp(reference.inception), in_public_order(data), dy)
    wide = data.to(torch.float64)
    want = step(reference.inception, in_public_order(wide), wide.dy)
    assert got[0].dtype == torch.bfloat16
    assert {t.dtype for t in got[1:]} == {torch.float32}
    for i, (a, b, c) in enumerate(zip(got, want, baseline, strict=True)):
        assert_within(f"tensor {i}", a, b, c, slack=3.0 if i else 2.0)


@needs_triton
def test_autocast_rule_of_the_operator_itself(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = inception(data.x, data.filters, data.biases, False)
    assert y.dtype == torch.bfloat16


def test_backward_inside_autocast() -> None:
    """A backward pass inside the autocast block computes what one outside of it does."""
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float32)
    outside = step(functional.inception, in_public_order(data), data.dy)
    leaves = with_gradients(in_public_order(data))
    y = functional.inception(*leaves)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, data.dy)
    for a, b in zip(outside[1:], inside, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0)


def test_autocast_leaves_float64_alone() -> None:
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.inception(*in_public_order(data))
    assert y.dtype == torch.float64


def test_biases_may_be_fp32() -> None:
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.bfloat16)
    data = data._replace(biases=[b.float() for b in data.biases])
    got = step(functional.inception, in_public_order(data), data.dy)
    assert [t.dtype for t in got[3::2]] == [torch.float32] * 6


@needs_triton
def test_no_gradient_of_what_is_saved(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32, device)
    data.x.requires_grad_()
    y, saved = inception(data.x, data.filters, data.biases, True)
    assert y.requires_grad
    assert not any(t.requires_grad for t in saved)


def test_meta_tensors_give_shapes() -> None:
    data = InceptionCase("", SMALL, 2, 5, 4).tensors(torch.float32, "meta")
    y = functional.inception(*in_public_order(data))
    assert y.device.type == "meta"
    assert y.stride() == exact_strides(*y.shape)

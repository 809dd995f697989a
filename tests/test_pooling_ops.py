"""Pooling and normalisation as functions, operators and modules; numbers on ATen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import Window
from fused_inception.ops import pooling
from fused_inception.tuning.pool_heuristic import march_config, vector_config
from fused_inception.tuning.targets import TARGETS
from tests.conftest import HAS_TRITON, implementations
from tests.pooling_cases import OPS, POOLING_CASES, PoolingCase
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = PoolingCase("", (2, 13, 5, 6), Window(3, 2, 1, True))
ops = pytest.mark.parametrize("op", OPS)
cases = pytest.mark.parametrize("case", POOLING_CASES, ids=lambda case: case.name)


def step(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


def exact_strides(t: Tensor) -> tuple[int, int, int, int]:
    _, c, h, w = t.shape
    return h * w * c, 1, w * c, c


def apply(op: str, case: PoolingCase, x: Tensor, impl: str, save: bool = True) -> Any:
    return getattr(pooling, op)(x, *case.options(op), save, impl)


@ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_output_and_gradient(case: PoolingCase, op: str, dtype: torch.dtype) -> None:
    x, dy = case.tensors(op, dtype)
    got = step(case.call(functional, op), x, dy)
    want, baseline = case.plain(op, x.double(), dy.double()), case.plain(op, x, dy)
    for name, a, b, c in zip(("y", "dx"), got, want, baseline, strict=True):
        # an empty gradient has any strides
        assert a.stride() == exact_strides(a) or (name == "dx" and not a.numel())
        assert_within(name, a, b, c, slack=2.0 if name == "y" else 3.0)


@ops
@cases
def test_fp64_is_exact(case: PoolingCase, op: str) -> None:
    x, dy = case.tensors(op, torch.float64)
    got = step(case.call(functional, op), x, dy)
    for a, b in zip(got, case.plain(op, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@ops
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x.contiguous(), id="contiguous"),
        pytest.param(lambda x: x[:, 3:], id="slice-at-an-odd-channel"),
        pytest.param(lambda x: x[:, :, ::2], id="every-second-row"),
        pytest.param(lambda x: x[:1].expand_as(x), id="expanded-batch"),
    ],
)
def test_any_strides_of_x(op: str, change: Callable[[Tensor], Tensor]) -> None:
    x = change(PLAIN.tensors(op, torch.float64)[0])
    got, want = (PLAIN.call(module, op)(x) for module in (functional, reference))
    torch.testing.assert_close(got, want)
    assert got.stride() == exact_strides(got)


@ops
def test_expanded_gradients(op: str) -> None:
    x, _ = PLAIN.tensors(op, torch.float64)
    gradients = []
    for module in (functional, reference):
        leaf = x.detach().requires_grad_()
        gradients += torch.autograd.grad(PLAIN.call(module, op)(leaf).sum(), leaf)
    torch.testing.assert_close(*gradients)


@implementations
@ops
def test_what_is_saved(op: str, impl: str, device: torch.device) -> None:
    """Bytes beside x, and x itself only where backward reads it."""
    case = PoolingCase("", (2, 16, 6, 6), Window(2, 2))
    x, _ = case.tensors(op, torch.float32, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), fi.backend(impl):
        case.call(functional, op)(x.requires_grad_())
    own = sum(t.nbytes for t in saved if t.data_ptr() != x.data_ptr())
    windows = 2 * 16 * 3 * 3
    index = 8 if impl == "torch" else 1
    expected = {"local_response_norm": 0, "max_pool2d_lrn": (index + 4) * windows}
    assert own == expected.get(op, index * windows)
    keeps_x = any(t.data_ptr() == x.data_ptr() for t in saved)
    plain = impl == "torch" and op == "max_pool2d"  # PyTorch's own keeps it
    assert keeps_x == (plain or op in ("local_response_norm", "lrn_max_pool2d"))


@ops
def test_contiguous_input_is_converted_once(op: str) -> None:
    """What is saved of x is the converted tensor."""
    x, _ = PLAIN.tensors(op, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        PLAIN.call(functional, op)(x.contiguous().requires_grad_())
    for t in saved:
        assert t.stride() == exact_strides(t)


@ops
def test_inference_saves_nothing_and_says_so(op: str) -> None:
    x, _ = PLAIN.tensors(op, torch.float32)
    y, saved = apply(op, PLAIN, x.requires_grad_(), "torch", save=False)
    assert saved == []
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


@ops
def test_double_backward_is_an_error(op: str) -> None:
    x, _ = PLAIN.tensors(op, torch.float32)
    y = PLAIN.call(functional, op)(x.requires_grad_()).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"double backward.*reference.{op}"):
        dx.square().sum().backward()


@ops
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_gradcheck(op: str, beta: float) -> None:
    case = PoolingCase("", (2, 5, 4, 3), Window(2, 1, 1), (3, 0.7, beta, 1.2))
    # distinct values: differences across a tie of the pool are not gradients
    count = 2 * 5 * 4 * 3
    x = (torch.randperm(count).double() / count - 0.5).view(case.shape)
    assert torch.autograd.gradcheck(case.call(functional, op), x.requires_grad_())


@implementations
@ops
@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(op: str, batch: int, impl: str, device: torch.device) -> None:
    case = PoolingCase("", (batch, 5, 4, 3), Window(2, 2, 1))
    x, dy = case.tensors(op, torch.float32, device)
    arguments = (x, *case.options(op), False, impl)
    torch.library.opcheck(getattr(pooling, op), arguments)
    arguments = (x.requires_grad_(), *case.options(op), True, impl)
    torch.library.opcheck(getattr(pooling, op), arguments)
    _, saved = apply(op, case, x.detach(), impl)
    backward = (dy, x.detach(), saved, case.shape, *case.options(op), impl)
    torch.library.opcheck(getattr(pooling, f"{op}_backward"), backward)


# torch's own: inductor imports scripted modules of torch
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compile(engine: str) -> None:
    """One graph forward and backward, and none anew where the batch changes twice."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(engine)

    def all_of(module: Any) -> Callable[[Tensor], Tensor]:
        case = PoolingCase("", (2, 5, 9, 7), Window(3, 1, 1))
        calls = [case.call(module, op) for op in OPS]
        return lambda x: calls[3](calls[2](calls[1](calls[0](x))))

    compiled = torch.compile(all_of(functional), fullgraph=True, backend=graphs)
    for batch in (2, 3, 5, 4):
        x, dy = torch.randn(2, batch, 5, 9, 7, dtype=torch.float64)
        want = step(all_of(reference), x, dy)
        for a, b in zip(step(compiled, x, dy), want, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2  # batch 2, then any


@ops
def test_autocast_keeps_the_dtype(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = PLAIN.tensors(op, dtype)
        outside = step(PLAIN.call(functional, op), x, dy)
        with torch.autocast("cpu", torch.bfloat16):
            inside = step(PLAIN.call(functional, op), x, dy)
        for a, b in zip(outside, inside, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@ops
def test_meta_tensors_give_shapes(op: str) -> None:
    x, dy = PLAIN.tensors(op, torch.float32, "meta")
    y = PLAIN.call(functional, op)(x)
    assert y.shape == dy.shape
    assert y.stride() == exact_strides(y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kernel_size=0), "kernel_size must be at least 1, got 0"),
        (dict(kernel_size=(2, 3)), r"kernel_size must be one number .* got \(2, 3\)"),
        (dict(kernel_size=2, stride=0), "stride must be at least 1"),
        (dict(kernel_size=3, padding=2), "padding must be at most half of kernel_size, 1, got 2"),
        (dict(kernel_size=3, padding=-1), "padding must be at least 0"),
        (dict(kernel_size=2, dilation=2), "dilation must be 1, got 2"),
        (dict(kernel_size=7), "a window of 7 does not fit a side of 5 .* the map to pool is 5x6"),
    ],
)
def test_wrong_windows(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.max_pool2d(torch.ones(1, 1, 5, 6), **options)


@ops
def test_wrong_arguments(op: str) -> None:
    call = PLAIN.call(functional, op)
    with pytest.raises(ValueError, match="4 dimensions"):
        call(torch.ones(3, 5, 5))
    with pytest.raises(TypeError, match="got int64"):
        call(torch.ones(1, 3, 5, 5, dtype=torch.int64))
    if op != "max_pool2d":
        no_window = PoolingCase("", PLAIN.shape, PLAIN.window, (0, 1.0, 0.75, 1.0))
        with pytest.raises(ValueError, match="size must be at least 1, got 0"):
            no_window.call(functional, op)(torch.ones(1, 3, 5, 5))


@pytest.mark.usefixtures("on_device")
@pytest.mark.skipif(not HAS_TRITON, reason="the message is about Triton")
def test_windows_without_a_kernel() -> None:
    x = torch.randn(1, 2, 20, 20)
    with (
        fi.backend("triton"),
        pytest.raises(fi.BackendError, match="kernel_size 4: kernels exist up to 3"),
    ):
        functional.max_pool2d(x, 4)
    torch.testing.assert_close(functional.max_pool2d(x, 4), reference.max_pool2d(x, 4))
    with fi.backend("triton"), pytest.raises(fi.BackendError, match="size 33: kernels exist up to"):
        functional.local_response_norm(x, 33)
    with fi.backend("triton"), pytest.raises(fi.BackendError, match="size 33: kernels exist up to"):
        functional.lrn_max_pool2d(x, 33, 3, 2)


def test_pairs_of_equal_numbers_are_one() -> None:
    x = torch.randn(1, 2, 7, 8)
    got = functional.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1))
    torch.testing.assert_close(got, reference.max_pool2d(x, 3, 2, 1))


MODULES: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (fi.MaxPool2d(3, ceil_mode=True), nn.MaxPool2d(3, ceil_mode=True)),
    (fi.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)),
    (fi.LocalResponseNorm(4, 0.5, 0.6, 2.0), nn.LocalResponseNorm(4, 0.5, 0.6, 2.0)),
    (fi.LocalResponseNorm(5), nn.LocalResponseNorm(5)),
    (
        fi.LRNMaxPool2d(5, 3, 2, alpha=0.3, beta=0.7, k=2.0, padding=1, ceil_mode=True),
        nn.Sequential(
            nn.LocalResponseNorm(5, 0.3, 0.7, 2.0), nn.MaxPool2d(3, 2, 1, 1, False, True)
        ),
    ),
    (
        fi.MaxPoolLRN2d(5, 3, 2, alpha=0.3, beta=0.7, k=2.0, padding=1, ceil_mode=True),
        nn.Sequential(
            nn.MaxPool2d(3, 2, 1, 1, False, True), nn.LocalResponseNorm(5, 0.3, 0.7, 2.0)
        ),
    ),
    (
        fi.LRNMaxPool2d(5, 3, 2),
        nn.Sequential(nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)),
    ),
    (
        fi.MaxPoolLRN2d(5, 2, 2),
        nn.Sequential(nn.MaxPool2d(2, 2), nn.LocalResponseNorm(5)),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), MODULES, ids=lambda m: type(m).__name__)
def test_modules(ours: nn.Module, theirs: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 13, 8, 9)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not ours.state_dict()
    assert "one fused operator" in repr(ours)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
@pytest.mark.parametrize("batch", [0, 1, 32, 256])
def test_configurations(batch: int, target: Any) -> None:
    """Whole warps, all processors busy where there is work, short columns where there is little."""
    warp = 64 if target.name == "gfx942" else 32
    window = Window(3, 2, 0, True)
    march = march_config(batch * 28, 28, 24, window, target)
    for config in (vector_config(batch * 28 * 28 * 24, target), march):
        assert config.block_v == config.num_warps * warp
        assert config.num_warps in (1, 2, 4)
    assert 1 <= march.rows <= 28
    programs = batch * 28 * 28 * 24 / march.rows / march.block_v
    assert programs >= min(batch, 32) * 28 * 28 * 24 / (4 * warp) / 28
    if batch == 1:
        assert march.rows == 1
    if batch == 256:
        assert march.rows > 1

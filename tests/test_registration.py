"""`call` is its operator: outputs, gradients, and who else is asked on the way."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

import fused_inception as fi
from fused_inception import functional
from fused_inception.ops.global_pool import global_avg_pool2d, global_avg_pool2d_backward
from fused_inception.ops.inception import inception
from fused_inception.ops.registration import IMPLEMENTATIONS, call
from tests.cases import SMALL, InceptionCase
from tests.conftest import needs_triton

pytestmark = needs_triton


def plain(op: Any, *arguments: Any) -> Any:
    """What `call` stands for."""
    return op(*arguments)


def module(
    of: Callable[..., Any], tensors: list[Tensor], needed: frozenset[int]
) -> list[Tensor | None]:
    """The output, and the gradient of each of x, six filters, six biases; those not `needed` are
    frozen."""
    leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    x, filters, biases = leaves[0], leaves[1:7], leaves[7:]
    y, saved = of(inception, x, filters, biases, True)
    assert all(not t.requires_grad for t in saved)
    assert y.requires_grad == bool(needed)
    if needed:
        y.square().sum().backward()
    return [y, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize(
    "needed",
    [range(13), (), (0,), (3,), (8,), (2, 12), range(1, 13)],
    ids=["all", "none", "x", "filter", "bias", "some", "parameters"],
)
def test_gradients_are_those_of_the_operator(needed: Any, device: torch.device) -> None:
    data = InceptionCase("", SMALL, 2, 4, 3).tensors(torch.float32, device)
    tensors = [data.x, *data.filters, *data.biases]
    got, want = (module(of, tensors, frozenset(needed)) for of in (call, plain))
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None) == (i > 0 and i - 1 not in needed)
        if a is not None and b is not None:
            assert a.equal(b)
            assert a.stride() == b.stride()


def test_no_list_of_tensors_and_one_output(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    kept = torch.rand(2, 3, device=device) > 0.5
    for mask in (None, kept):
        got, want = (of(global_avg_pool2d, x, mask, 2.0) for of in (call, plain))
        assert isinstance(got, Tensor)
        assert got.equal(want)
        (dx, want_dx) = (torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want))
        assert dx.equal(want_dx)


def test_register_autograd_is_not_asked_in_eager_mode(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    names = [type(of(global_avg_pool2d, x, None, 1.0).grad_fn).__name__ for of in (call, plain)]
    assert names[0] == "global_avg_pool2d_functionBackward"
    assert names[1].startswith("GeneratedBackward")


def test_operators_stay_visible(device: torch.device) -> None:
    """To modes that count or trace: none of them is passed over."""
    seen = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with fi.backend("triton"), Count():
        functional.global_avg_pool2d(x).sum().backward()
    ours = [op._opname for op in seen if op.namespace == "fused_inception"]
    assert ours == ["global_avg_pool2d", "global_avg_pool2d_backward"]


class _Straight:
    """How often implementations were called by the library itself, not by the dispatcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for op in (global_avg_pool2d, global_avg_pool2d_backward):
            monkeypatch.setitem(IMPLEMENTATIONS, op, self._counting(IMPLEMENTATIONS[op]))

    def _counting(self, implementation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            self.count += 1
            return implementation(*arguments)

        return run


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> _Straight:
    return _Straight(monkeypatch)


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "paper": lambda: fi.googlenet("paper", num_classes=2, image_size=47),
    "torchvision": lambda: fi.googlenet("torchvision", num_classes=2, image_size=47),
    "one by one": lambda: torch.nn.Sequential(
        fi.ConvBlock(3, 8, kernel_size=7, stride=2, padding=3),
        fi.MaxPool2d(3, 2),
        fi.LocalResponseNorm(5, k=1),
        fi.LRNMaxPool2d(5, 3, 2),
        fi.MaxPoolLRN2d(5, 3, 2),
        fi.InceptionNaive(8, 8, 8, 8),
        fi.GlobalAvgPool2d(),
    ),
}


@pytest.mark.usefixtures("launches_do_nothing")
@pytest.mark.parametrize("name", NETWORKS)
def test_every_operator_goes_straight(
    name: str, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """In training and in inference, also under autocast."""
    dispatched: list[str] = []
    dispatch = torch._ops.OpOverload.__call__

    def counted(op: Any, /, *args: Any, **kwargs: Any) -> Any:
        dispatched.extend([op._opname] * (op.namespace == "fused_inception"))
        return dispatch(op, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverload, "__call__", counted)
    network, x = NETWORKS[name]().to(device), torch.randn(2, 3, 47, 47, device=device)
    for enabled in (False, True):
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
        with fi.backend("triton"), autocast, fi.record_launches() as launches:
            outputs = network.train()(x)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(y.float().sum() for y in outputs).backward()
            with torch.no_grad():
                network.eval()(x)
        assert launches
        assert not dispatched


class _Subclass(Tensor):
    """As those of distributed tensors: what it holds is elsewhere."""


def test_nobody_on_the_way(straight: _Straight, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    want = x.mean((2, 3), keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(call(global_avg_pool2d, x, None, 1.0), want)
    with torch.inference_mode():
        torch.testing.assert_close(call(global_avg_pool2d, x, None, 1.0), want)
    assert straight.count == 2
    call(global_avg_pool2d, x.requires_grad_(), None, 1.0).sum().backward()
    assert straight.count == 4
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 16))


def test_autocast_is_off_inside(straight: _Straight, device: torch.device) -> None:
    """As the operator's rule has it."""
    x = torch.randn(2, 3, 4, 4, device=device)
    seen: list[torch.dtype] = []

    def implementation(*_: Any) -> Tensor:
        seen.append(torch.mm(x[0, 0], x[0, 0]).dtype)
        return x

    IMPLEMENTATIONS[global_avg_pool2d] = implementation  # of `straight`, which puts it back
    with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
        call(global_avg_pool2d, x, None, 1.0)
        assert torch.mm(x[0, 0], x[0, 0]).dtype == torch.bfloat16
    assert seen == [torch.float32]


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("watcher", "unseen"),
    [
        (_Functions, 1),  # to which `backward` is one function
        (_Operators, 0),
        (lambda: torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True), 0),
    ],
    ids=["function mode", "dispatch mode", "profiler"],
)
def test_who_watches_sees_operators(
    watcher: Callable[[], Any], unseen: int, straight: _Straight, device: torch.device
) -> None:
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    with watcher() as watching:
        call(global_avg_pool2d, x, None, 1.0).sum().backward()
        with torch.no_grad():
            call(global_avg_pool2d, x, None, 1.0)
    assert straight.count == unseen
    if isinstance(watching, torch.profiler.profile):
        names = {event.key for event in watching.key_averages()}
        assert names >= {f"fused_inception::global_avg_pool2d{end}" for end in ("", "_backward")}


def test_traces_hold_operators(straight: _Straight, device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 4, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit's end
        traced = torch.jit.trace(
            lambda x: call(global_avg_pool2d, x, None, 1.0), (x,), check_trace=False
        )
    assert "fused_inception::global_avg_pool2d" in str(traced.graph)
    other = torch.randn(5, 3, 4, 4, device=device)
    torch.testing.assert_close(traced(other), other.mean((2, 3), keepdim=True))
    assert straight.count == 0


def test_tensors_that_are_not_what_they_seem(straight: _Straight, device: torch.device) -> None:
    """Negated when they are read, without data, or of a class of their own."""
    x = torch.randn(2, 3, 4, 4, device=device)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    with torch.no_grad():
        torch.testing.assert_close(
            call(global_avg_pool2d, negated, None, 1.0), -x.mean((2, 3), keepdim=True)
        )
        assert call(global_avg_pool2d, x.to("meta"), None, 1.0).shape == (2, 3, 1, 1)
        assert type(call(global_avg_pool2d, x.as_subclass(_Subclass), None, 1.0)) is _Subclass
    assert straight.count == 0


def test_what_an_operator_would_convert(straight: _Straight, device: torch.device) -> None:
    """An integer where it takes a float, a tuple of tensors where it takes a list."""
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32, device)
    seen: list[Any] = []
    run = IMPLEMENTATIONS[inception]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        x = data.x
        torch.testing.assert_close(call(global_avg_pool2d, x, None, 1), x.mean((2, 3), True))
        assert straight.count == 0
        patch.setitem(IMPLEMENTATIONS, inception, lambda *args: seen.append(args) or run(*args))
        lists = [*data.filters], [*data.biases]
        for filters, biases in (lists, map(tuple, lists)):
            y, _ = call(inception, x, filters, biases, False)
            assert y.shape[1] == SMALL.out_channels
    assert len(seen) == 1


def test_batches_of_vmap(straight: _Straight, device: torch.device) -> None:
    """PyTorch takes them one by one, by its dispatcher."""
    xs = torch.randn(3, 2, 3, 4, 4, device=device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow
        got = torch.vmap(lambda x: call(global_avg_pool2d, x, None, 1.0))(xs)
    torch.testing.assert_close(got, xs.mean((3, 4), keepdim=True))
    assert straight.count == 0


def test_double_backward_is_an_error_as_before(straight: _Straight, device: torch.device) -> None:
    """Gradients that are to be differentiated are the operator's."""
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    y = call(global_avg_pool2d, x, None, 1.0).square().sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    assert straight.count == 1
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_hooks_of_accumulation_and_reuse_of_the_graph(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32, device)
    leaves = [t.detach().clone().requires_grad_() for t in (data.x, *data.filters, *data.biases)]
    counted: list[int] = []
    for i, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda _, i=i: counted.append(i))
    y, _ = call(inception, leaves[0], leaves[1:7], leaves[7:], True)
    loss = y.sum()
    loss.backward(retain_graph=True)
    once = [leaf.grad.clone() for leaf in leaves if leaf.grad is not None]
    loss.backward()
    assert sorted(counted) == sorted([*range(13)] * 2)
    for first, leaf in zip(once, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_parameter_written_between_forward_and_backward_is_an_error(device: torch.device) -> None:
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32, device)
    filters = [t.detach().clone().requires_grad_() for t in data.filters]
    y, _ = call(inception, data.x, filters, list(data.biases), True)
    with torch.no_grad():
        filters[2].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()

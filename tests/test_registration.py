"""`call` is its operator: outputs, gradients, and who else is asked on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception import functional
from fused_inception.ops.global_pool import global_avg_pool2d
from fused_inception.ops.inception import inception
from fused_inception.ops.registration import call
from tests.cases import SMALL, InceptionCase
from tests.conftest import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


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
    from torch.utils._python_dispatch import TorchDispatchMode

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

"""The ATen path: what autograd keeps of it, and what may be done around it."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fused_inception import functional, reference
from fused_inception.ops.layout import channels_last
from tests.cases import SMALL, InceptionCase
from tests.test_ops import exact_strides, in_public_order, pairs, step


def test_saved_on_the_aten_path() -> None:
    """What PyTorch's own layers save; x and parameters are not copied."""
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32)

    def saved_by(function: Callable[..., Tensor]) -> int:
        storages: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        leaves = [t.detach().requires_grad_() for t in in_public_order(data)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = function(*leaves)
        del y
        return sum(storages.values())

    assert saved_by(functional.inception) == saved_by(reference.inception)


def test_contiguous_input_is_converted_once() -> None:
    """What is saved is the converted tensor, which backward need not convert again."""
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        functional.inception(data.x.contiguous().requires_grad_(), *pairs(data))
    found = [t for t in saved if t.shape == data.x.shape and t.equal(data.x)]
    assert len({t.data_ptr() for t in found}) == 1
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found)


def test_double_backward_of_one_filter_is_an_error() -> None:
    """Also where all else is frozen."""
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32)
    w = data.filters[2].requires_grad_()
    (dw,) = torch.autograd.grad(
        functional.inception(*in_public_order(data)).square().sum(), w, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r"double backward .*reference\.inception has"):
        torch.autograd.grad(dw.sum(), w)


MADE_OF = ("upstream", "x", "filter", "gamma", "beta", "downstream")


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("by", MADE_OF)
def test_no_gradient_has_another(by: str, linear: bool) -> None:
    """Of all that the output is made of, by all that it is made of, and by the layers behind it,
    whether these gradients depend on the output or not."""
    torch.manual_seed(0)
    upstream, downstream = (torch.tensor(1.5, requires_grad=True) for _ in range(2))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    w, gamma, beta = (torch.randn(*s, requires_grad=True) for s in ((2, 3, 3, 3), (2,), (2,)))
    y = functional.conv2d_bn_relu(
        x * upstream, w, None, None, gamma, beta, padding=1, training=True
    )
    loss = (y * downstream if linear else (y * downstream).square()).sum()
    made_of = dict(zip(MADE_OF, (upstream, x, w, gamma, beta, downstream), strict=True))
    gradients = torch.autograd.grad(loss, [*made_of.values()][:-1], create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=r"double backward .*reference\.conv2d_bn_relu has"):
            torch.autograd.grad(gradient.sum(), made_of[by], retain_graph=True)


@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 3), (0, 2, 2), (2, 3, 2)], ids=str)
def test_the_gradient_of_x_takes_its_strides(size: tuple[int, int, int]) -> None:
    """Four branches read it: their gradients are summed, and the layout of a sum may be another."""
    data = InceptionCase("", SMALL, *size).tensors(torch.float32)
    x = channels_last(data.x).requires_grad_()
    y = functional.inception(x, *pairs(data))
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.stride() == x.stride() == exact_strides(*x.shape)


def test_first_gradients_may_ask_for_a_graph() -> None:
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32)
    leaves = [t.requires_grad_() for t in in_public_order(data)]
    found = [
        torch.autograd.grad(
            functional.inception(*leaves).square().sum(), leaves, create_graph=create_graph
        )
        for create_graph in (False, True)
    ]
    assert all(map(torch.equal, *found))


def test_an_output_without_a_gradient() -> None:
    """A function behind it may have none to give."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32)
    x = data.x.requires_grad_()
    for create_graph in (False, True):
        y = Nothing.apply(functional.inception(*in_public_order(data)))
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph, allow_unused=True)
        assert dx is None or not dx.any()


@pytest.mark.parametrize("offloaded", [False, True])
def test_nothing_is_kept_but_what_autograd_keeps(offloaded: bool) -> None:
    """As long as a loss lives its graph does: without what was saved in it behind its backward, and
    before, where saved tensors are put elsewhere."""
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float32)
    x = data.x.requires_grad_() * 1
    hooks: Any = nullcontext()
    if offloaded:
        hooks = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t)
    with hooks:
        loss = functional.inception(x, *pairs(data)).sum()
    storage = StorageWeakRef(x.untyped_storage())
    del x
    assert storage.expired() == offloaded
    loss.backward()
    assert storage.expired()


def test_what_follows_may_work_in_place() -> None:
    """On the ATen path y is not saved, as nothing behind PyTorch's own concatenation is."""
    data = InceptionCase("", SMALL, 2, 4, 4).tensors(torch.float64)

    def changed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: function(*t).mul_(2).sigmoid_()

    got = step(changed(functional.inception), in_public_order(data), data.dy)
    want = step(changed(reference.inception), in_public_order(data), data.dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_parts_compute_no_gradient() -> None:
    data = InceptionCase("", SMALL, 1, 4, 4).tensors(torch.float32)
    data.filters[2].requires_grad_()
    with torch.profiler.profile(acc_events=True) as profile:
        functional.inception(*in_public_order(data)).sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::convolution_backward"] == 1
    assert "aten::max_pool2d_with_indices_backward" not in counts


def test_a_filter_written_to_before_backward_is_named() -> None:
    """In the words that PyTorch's layers have for a step of an optimiser that comes too early."""
    data = InceptionCase("", SMALL, 1, 3, 3).tensors(torch.float32)
    leaves = [t.detach().contiguous().requires_grad_() for t in in_public_order(data)]
    y, weight = functional.inception(*leaves), leaves[5]
    with torch.no_grad():
        weight.mul_(2)
    shape = re.escape(str([*weight.shape]))
    with pytest.raises(RuntimeError, match=f"modified by an inplace operation: .*{shape}"):
        y.sum().backward()

"""Pool and convolution of an auxiliary classifier as function, operator and module."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import AvgWindow
from fused_inception.ops import avg_pool_project as ops
from tests.auxiliary_cases import AUXILIARY_CASES, BY_NAME, AuxiliaryCase, adaptive
from tests.conftest import implementations, needs_triton
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
cases = pytest.mark.parametrize("case", AUXILIARY_CASES, ids=lambda case: case.name)
names = pytest.mark.parametrize("name", ["odd-widths", "adaptive-uneven"])


def step(function: Callable[..., Tensor], inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def results(module: object, case: AuxiliaryCase, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    return step(lambda *t: case.call(module, *t), inputs, dy)


@cases
def test_fp64_is_exact(case: AuxiliaryCase) -> None:
    inputs, dy = case.tensors(torch.float64)
    got, want = (results(module, case, inputs, dy) for module in (functional, reference))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    _, c, h, w = case.shape
    assert got[1].stride() == (h * w * c, 1, w * c, c) or not got[1].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["paper", "adaptive"])
def test_output_and_gradients_through_aten(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    inputs, dy = case.tensors(dtype)
    got, baseline = (results(module, case, inputs, dy) for module in (functional, reference))
    want = results(reference, case, [t.double() for t in inputs], dy.double())
    for part, a, b, c in zip(("y", "dx", "dw", "db"), got, want, baseline, strict=True):
        assert_within(part, a, b, c, slack=2.0 if part == "y" else 3.0)


@pytest.mark.parametrize(
    "window",
    [
        *(AvgWindow(*w) for w in ((5, 3, True), (5, 3, False), (2, 3, True), (3, 1, True))),
        *(adaptive(side) for side in (1, 4, 7)),
    ],
    ids=str,
)
def test_windows_are_those_of_torch(window: AvgWindow) -> None:
    """How many there are, how long they are, how many a pixel lies in: from torch's weights."""
    for side in range(1, 25):
        if not window.grid and side + window.ceil_mode * (window.stride - 1) < window.kernel:
            with pytest.raises(ValueError, match="does not fit"):
                window.out(side)
            continue
        # pixels as channels: weights[pixel, i] is what window i takes of it
        pixels = torch.eye(side)[None]
        if window.grid:
            (weights,) = F.adaptive_avg_pool1d(pixels, window.grid)
        else:
            (weights,) = F.avg_pool1d(
                pixels, window.kernel, window.stride, ceil_mode=window.ceil_mode
            )
        taken = weights != 0
        assert window.out(side) == weights.shape[1]
        assert window.extent(side) == taken.sum(0).max()
        assert window.overlap(side) >= taken.sum(1).max()


@needs_triton
@names
def test_operator_passes_opcheck(name: str, device: torch.device) -> None:
    case = BY_NAME[name]
    inputs, dy = case.tensors(torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(ops.avg_pool2d_conv1x1_relu, (*leaves, *case.options, True))
    with torch.no_grad():
        y, saved = ops.avg_pool2d_conv1x1_relu(*inputs, *case.options, True)
    _, weight, bias = (t.detach() for t in inputs)
    backward = (dy, y, *saved, weight, bias, case.shape, *case.options, [True, False, True])
    torch.library.opcheck(ops.avg_pool2d_conv1x1_relu_backward, backward)


@names
def test_gradcheck_in_fp64(name: str) -> None:
    case = BY_NAME[name]
    inputs, _ = case.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: case.call(functional, *t), leaves, fast_mode=True)


@implementations
def test_compiles_into_one_graph(impl: str, device: torch.device) -> None:
    case = BY_NAME["odd-widths"]
    inputs, dy = case.tensors(torch.float32, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: case.call(functional, *t), backend=counter, fullgraph=True)
    with fi.backend(impl):
        got, want = step(compiled, inputs, dy), results(functional, case, inputs, dy)
    assert counter.frame_count == 1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_triton
def test_saves_the_pooled_map_and_its_output(device: torch.device) -> None:
    case = BY_NAME["paper"]
    inputs, _ = case.tensors(torch.float32, device)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), fi.backend("triton"):
        y = case.call(functional, *(t.requires_grad_() for t in inputs))
    known = {t.data_ptr() for t in inputs[1:]}
    kept = {t.data_ptr(): t.nbytes for t in saved if t.data_ptr() not in known}
    assert inputs[0].data_ptr() not in kept
    assert kept.pop(y.data_ptr()) == y.nbytes
    assert list(kept.values()) == [4 * 2 * 24 * 16]


@needs_triton
def test_inference_saves_nothing_and_says_so(device: torch.device) -> None:
    case = BY_NAME["odd-widths"]
    inputs, _ = case.tensors(torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs]
    y, saved = ops.avg_pool2d_conv1x1_relu(*leaves, *case.options, False)
    assert saved == []
    with pytest.raises(RuntimeError, match="save=False"):
        y.sum().backward()


@implementations
def test_autocast_casts_map_and_filter(impl: str, device: torch.device) -> None:
    case = BY_NAME["paper"]
    inputs, dy = case.tensors(torch.float32, device)
    with fi.backend(impl), torch.autocast(device.type, torch.bfloat16):
        got = results(functional, case, inputs, dy.bfloat16())
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 3]
    want = results(reference, case, inputs, dy)
    assert (got[0] - want[0]).norm() < 0.02 * want[0].norm()


def test_double_backward_is_an_error() -> None:
    case = BY_NAME["odd-widths"]
    inputs, _ = case.tensors(torch.float32)
    x, *_ = leaves = [t.requires_grad_() for t in inputs]
    (dx,) = torch.autograd.grad(case.call(functional, *leaves).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"x": (1, 6, 2, 9)}, ValueError, "a window of 5 does not fit a side of 2"),
        ({"weight": (8, 6, 3, 3)}, ValueError, r"weight must be of shape \[C_out, 6, 1, 1\]"),
        ({"weight": (8, 5, 1, 1)}, ValueError, r"weight must be of shape \[C_out, 6, 1, 1\]"),
        ({"bias": (7,)}, ValueError, r"bias must be of shape \[8\]"),
        ({"options": (0,)}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"options": (5, 0)}, ValueError, "stride must be at least 1, got 0"),
        ({"grid": 0}, ValueError, "output_size must be at least 1, got 0"),
        ({"dtype": torch.float64}, TypeError, "weight must be float32, got float64"),
    ],
    ids=["map", "filter", "channels", "bias", "kernel", "stride", "grid", "dtype"],
)
def test_wrong_arguments(call: dict, error: type[Exception], message: str) -> None:
    x = torch.randn(call.get("x", (1, 6, 7, 7)))
    weight = torch.randn(call.get("weight", (8, 6, 1, 1)), dtype=call.get("dtype"))
    bias = torch.randn(call.get("bias", (8,)))
    if "grid" in call:
        name, options = "adaptive_avg_pool2d_conv1x1_relu", (call["grid"],)
    else:
        name, options = "avg_pool2d_conv1x1_relu", call.get("options", ())
    with pytest.raises(error, match=message):
        getattr(functional, name)(x, weight, bias, *options)


class TestModule:
    """The head of the network computes child by child where the operator would pass one over."""

    @pytest.fixture(autouse=True)
    def _head(self) -> None:
        self.head = fi.InceptionAux(12, 5, map_size=9, dropout=0.0)
        self.x = torch.randn(3, 12, 9, 9)
        self.want = self.head(self.x)

    @pytest.mark.parametrize("inner", ["conv", "conv.conv"])
    def test_hook(self, inner: str) -> None:
        seen: list[object] = []
        handle = self.head.get_submodule(inner).register_forward_hook(lambda *a: seen.append(a))
        torch.testing.assert_close(self.head(self.x), self.want)
        assert len(seen) == 1
        assert f"{inner} has a hook" in self.head.extra_repr()
        handle.remove()
        assert self.head.is_fused
        assert torch.equal(self.head(self.x), self.want)

    def test_another_block(self) -> None:
        self.head.conv = torch.nn.Sequential(self.head.conv, torch.nn.Tanh())
        assert not self.head.is_fused
        assert not torch.allclose(self.head(self.x), self.want)

    def test_another_convolution(self) -> None:
        self.head.conv.conv = torch.nn.Conv2d(12, 128, 1, bias=False)
        assert not self.head.is_fused
        assert self.head(self.x).shape == (3, 5)

    def test_hook_on_the_module_itself_keeps_it_fused(self) -> None:
        self.head.register_forward_hook(lambda *a: None)
        assert self.head.is_fused
        assert torch.equal(self.head(self.x), self.want)

    def test_adaptive_pool_takes_any_map(self) -> None:
        head = fi.InceptionAux(12, 5, pool="adaptive", dropout=0.0)
        plain = reference.InceptionAux(12, 5, pool="adaptive", dropout=0.0)
        plain.load_state_dict(head.state_dict())
        assert head.is_fused
        for sides in ((9, 9), (3, 11), (1, 1)):
            x = torch.randn(2, 12, *sides)
            torch.testing.assert_close(head(x), plain(x))

    def test_with_batch_norm_its_convolution_is_fused(self) -> None:
        """The report of a second `fuse_`, `print` and `explain` say so in the same words."""
        head = reference.InceptionAux(12, 5, norm="batch", pool="adaptive")
        fi.fuse_(head)
        words = "its convolution is fused, pool and linear layers are PyTorch's"
        assert fi.fuse_(head).skipped == {"": f"already fused: {words}"}
        assert head.extra_repr() == f"adaptive pool, {words}"
        assert str(fi.explain(head, self.x)).count(f"layers: {words}") == 1
        head.conv.bn.register_forward_hook(lambda *_: None)
        why = "plain PyTorch: conv.bn has a hook"
        assert fi.fuse_(head).skipped == {"": f"already fused, but {why}"}
        assert head.extra_repr() == f"adaptive pool, {why}"
        assert f"layers: {why}" in str(fi.explain(head, self.x))


@pytest.mark.usefixtures("on_device")
def test_windows_that_overlap_too_much_run_through_aten() -> None:
    """A kernel of 49 windows over a pixel compiles for most of a minute."""
    x, w, b = torch.randn(1, 8, 14, 14), torch.randn(8, 8, 1, 1), torch.randn(8)
    call = functional.avg_pool2d_conv1x1_relu
    with fi.backend("triton"), pytest.raises(fi.BackendError, match="49 windows over one pixel"):
        call(x, w, b, 7, 1)
    got, want = (of.avg_pool2d_conv1x1_relu(x, w, b, 7, 1) for of in (functional, reference))
    torch.testing.assert_close(got, want)
    assert AvgWindow(4, 1, True).why_no_kernel(9, 9) is None
    # one pixel, in all windows of an adaptive pool
    assert AvgWindow(0, 0, False, 4).why_no_kernel(1, 1) is None
    assert AvgWindow(0, 0, False, 5).why_no_kernel(1, 1) is not None


def test_one_graph_for_maps_of_any_side() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = functional.adaptive_avg_pool2d_conv1x1_relu
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    w, b = torch.randn(8, 8, 1, 1), torch.randn(8)
    for side in (14, 15, 17):
        x = torch.randn(2, 8, side, side + 3)
        torch.testing.assert_close(compiled(x, w, b), call(x, w, b))
    assert counter.frame_count == 1

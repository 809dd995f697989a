"""The trunk as one operator, in the interpreter or on a GPU: against fp64, against the operators
that it stands for, and the operator around its kernels."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import InceptionDims, Window
from fused_inception.ops import pooling_triton
from fused_inception.ops import trunk as ops
from fused_inception.ops.stages import Trunk
from fused_inception.tuning import dispatch
from fused_inception.tuning.configs import MaskConfig
from tests.tolerances import assert_within, assert_within_l2
from tests.tracing import SavedMemory

pytestmark = pytest.mark.usefixtures("few_large_tiles")

# each behind the one before
FIRST = InceptionDims(16, 8, 16, 16, 8, 8, 8)
SECOND = InceptionDims(40, 16, 8, 8, 8, 16, 8)
THIRD = InceptionDims(48, 8, 16, 24, 8, 8, 8, 3)
POOL = Window(3, 2, 0, True)


@dataclass(frozen=True)
class Case:
    """Modules, the map that they begin with, what stands between them."""

    dims: tuple[InceptionDims, ...]
    shape: tuple[int, int, int]  # batch, height, width
    pools: Mapping[int, Window] = field(default_factory=dict)
    taps: tuple[int, ...] = ()
    mean: bool = True

    @property
    def options(self) -> dict[str, Any]:
        return {"pools": self.pools, "taps": self.taps, "global_pool": self.mean}

    @property
    def trunk(self) -> Trunk:
        return Trunk(dict(self.pools), self.taps, self.mean)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """x, then filters and biases in turn."""
        draw = torch.Generator().manual_seed(3)
        n, height, width = self.shape
        tensors = [torch.randn(n, self.dims[0].in_channels, height, width, generator=draw).relu()]
        for dims in self.dims:
            for shape in dims.filter_shapes:
                std = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
                tensors.append(torch.randn(shape, generator=draw) * std)
                tensors.append(torch.randn(shape[0], generator=draw) * 0.1)
        x = tensors[0].contiguous(memory_format=torch.channels_last)
        return [t.to(device, dtype) for t in (x, *tensors[1:])]


CASES = {
    "as-in-googlenet": Case((FIRST, SECOND, THIRD), (2, 9, 7), {1: POOL}, (0,)),
    "ends-with-a-pool": Case((FIRST, SECOND), (2, 5, 6), {1: POOL}, (0,), mean=False),
    "ends-with-a-module": Case((FIRST, SECOND), (1, 3, 4), mean=False),
    "one-module": Case((FIRST,), (2, 5, 3)),
    "pools-of-two-and-with-gaps": Case(
        (FIRST, SECOND, THIRD), (1, 11, 8), {0: Window(2, 2), 1: Window(2, 3, 1)}
    ),
    "two-taps": Case((FIRST, SECOND, THIRD), (1, 3, 4), {}, (0, 1)),
    "one-pixel": Case((FIRST, SECOND), (3, 1, 1), {}, (0,)),
    "empty-batch": Case((FIRST, SECOND), (0, 5, 4), {0: POOL}),
}
TINY = Case((FIRST, SECOND), (1, 3, 3), {}, (0,))


def of_modules(parameters: list[Tensor]) -> list[list[Tensor]]:
    return [parameters[i : i + 12] for i in range(0, len(parameters), 12)]


def results(
    function: Callable[..., Any], inputs: list[Tensor], *, of_taps: bool = True, **options: Any
) -> list[Tensor]:
    """All outputs, and the gradients of fixed ones of them, of that of the mean alone without
    `of_taps`."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, taps = function(leaves[0], of_modules(leaves[1:]), **options)
    outputs = [y, *taps] if of_taps else [y]
    gradients = torch.autograd.grad(outputs, leaves, [gradient_of(t) for t in outputs])
    return [t.detach() for t in (y, *taps, *gradients)]


def gradient_of(y: Tensor) -> Tensor:
    scale = 1.0 if y.shape[2:] == (1, 1) else 0.1
    drawn = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * scale
    return drawn.to(y.device, y.dtype)


def fused(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    with fi.backend("triton"):
        return results(functional.inception_trunk, inputs, **options)


def one_by_one(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The same by the operators of its parts."""
    with fi.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "why_not", lambda *_: "asked for")
        return results(functional.inception_trunk, inputs, **options)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        ("as-in-googlenet", torch.bfloat16),
        ("two-taps", torch.float16),
    ],
    ids=str,
)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    case = CASES[name]
    inputs = case.tensors(dtype, device)
    with fi.record_launches() as launches:
        got = fused(inputs, **case.options)
    masking = sum(launch.kernel == "_relu_mask_kernel" for launch in launches)
    assert masking == (name == "ends-with-a-module")
    exact = results(reference.inception_trunk, [t.double() for t in inputs], **case.options)
    baseline = results(reference.inception_trunk, inputs, **case.options)
    # rounding to 16 bits changes which element of a window wins, which breaks a maximum
    within = assert_within if dtype == torch.float32 else assert_within_l2
    outputs = 1 + len(case.taps)
    for i, (ours, want, theirs) in enumerate(zip(got, exact, baseline, strict=True)):
        within(f"{name} {i}", ours, want, theirs, slack=2.0 if i < outputs else 3.0)
    for ours in got[: outputs + 1]:
        _, c, h, w = ours.shape
        assert ours.stride() == (h * w * c, 1, w * c, c)


def is_bias(i: int, outputs: int) -> bool:
    """Whether result i is a bias's gradient: behind the outputs x, then filter and bias in turn."""
    return i > outputs and (i - outputs) % 2 == 0


# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("special", ["", "ties", "nan"])
def test_gates_are_those_of_its_parts(special: str, device: torch.device) -> None:
    """Masked where it is made or by launch M: the same to the bit; sums over pixels are near."""
    case = CASES["as-in-googlenet"]
    inputs = case.tensors(torch.float32, device)
    if special == "ties":
        # every map takes few values, many of them 0
        for t in inputs:
            t.copy_(t.mul(2).round().clamp(-1, 1))
    elif special == "nan":
        inputs[0][1, 2, 4, 5] = math.nan
    got = fused(inputs, **case.options, of_taps=False)
    want = one_by_one(inputs, **case.options, of_taps=False)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        near = 1e-5 if is_bias(i, 2) else 0.0
        torch.testing.assert_close(ours, theirs, rtol=near, atol=near, equal_nan=True)
    assert got[0].isnan().any() == (special == "nan")
    assert not got[0].isnan().all()


@pytest.mark.usefixtures("nan_filled_empty")
def test_bitwise_the_same_again_and_for_any_strides(device: torch.device) -> None:
    case = CASES["two-taps"]
    x, *parameters = case.tensors(torch.float32, device)
    runs = []
    with fi.backend("triton"):
        for image in (x, x, x.contiguous()):
            leaves = [t.detach().requires_grad_() for t in (image, *parameters)]
            y, taps = functional.inception_trunk(leaves[0], of_modules(leaves[1:]), **case.options)
            outputs = [y, *taps]
            if image is x:
                grads = [torch.ones_like(t) for t in outputs]
            else:
                grads = [t.new_ones(()).expand(t.shape) for t in outputs]
            runs.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for run in runs[1:]:
        for ours, first in zip(run, runs[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("of", ["tap", "both"])
def test_gradients_that_begin_at_a_tap(of: str, device: torch.device) -> None:
    """Modules behind the last output that is differentiated get none, as from PyTorch."""
    case = CASES["two-taps"]
    inputs = case.tensors(torch.float32, device)
    found = []
    for function, backend in (
        (functional.inception_trunk, "triton"),
        (reference.inception_trunk, "torch"),
    ):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with fi.backend(backend):
            _, taps = function(leaves[0], of_modules(leaves[1:]), **case.options)
        chosen = taps[:1] if of == "tap" else taps
        with fi.record_launches() as launches:
            torch.autograd.backward(chosen, [gradient_of(t) for t in chosen])
        found.append([leaf.grad for leaf in leaves])
        if backend == "triton":
            # launch M where the gradient enters, nowhere else
            assert sum(launch.kernel == "_relu_mask_kernel" for launch in launches) == 1
    modules = {"tap": 1, "both": 2}[of]
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert (ours is None) == (theirs is None) == (i > 12 * modules)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# what needs a gradient -> launches L1, L2, L3 of the modules, those of the pool
SUBSETS: dict[str, tuple[list[int], int, int, int, int]] = {
    "everything": ([*range(37)], 3, 3, 3, 1),
    "the last module": ([*range(25, 37)], 1, 0, 1, 0),
    "one filter of the second": ([15], 2, 1, 1, 1),
    "x": ([0], 3, 3, 0, 1),
}


@pytest.mark.parametrize("name", SUBSETS)
@pytest.mark.usefixtures("nan_filled_empty")
def test_what_is_frozen_costs_nothing(name: str, device: torch.device) -> None:
    case = CASES["as-in-googlenet"]
    inputs = case.tensors(torch.float32, device)
    everything = fused(inputs, **case.options, of_taps=False)[2:]
    needed, reductions, data, filters, pools = SUBSETS[name]
    leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    with fi.backend("triton"):
        y, _ = functional.inception_trunk(leaves[0], of_modules(leaves[1:]), **case.options)
    with fi.record_launches() as launches:
        y.backward(gradient_of(y))
    for i, leaf in enumerate(leaves):
        if i in needed:
            torch.testing.assert_close(leaf.grad, everything[i], rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None
    kernels = [launch.kernel for launch in launches]
    # launches L2 and L3, together or apart
    assert sum(launch.config.get("INPUT", False) for launch in launches) == data
    assert sum(launch.config.get("FILTERS", 0) is True for launch in launches) == filters
    assert kernels.count("_masked_max_pool_bwd_kernel") == pools
    assert kernels.count("_dgrad_kernel") == reductions
    assert kernels.count("_global_pool_bwd_kernel") == 1


@pytest.mark.parametrize("config", [MaskConfig(2, 16, 4, 4), MaskConfig(4, 32, 64, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_chunks_of_the_pool_change_little(
    config: MaskConfig, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several chunks, and a block of channels that ends beyond the last one."""
    draw = torch.Generator().manual_seed(0)
    shape = (2, 40, 7, 5)
    dy = torch.randn((2, 40, 3, 2), generator=draw).to(device, dtype)
    x = torch.randn(shape, generator=draw).to(device, dtype)
    bits = torch.randn(shape, generator=draw) > 0
    packed = bits.permute(0, 2, 3, 1).reshape(-1, 5, 8).int() << torch.arange(8)
    mask = packed.sum(2).to(device, torch.uint8)
    window = Window(3, 2)
    monkeypatch.setattr(pooling_triton, "masked_pool_config", lambda *_: config)
    _, (index,) = pooling_triton.max_pool2d(x, window, True)
    dx, sums = pooling_triton.max_pool2d_backward_masked(dy, shape, index, window, mask)
    want = pooling_triton.max_pool2d_backward(dy, shape, index, window) * bits.to(device)
    assert torch.equal(dx, want)
    assert sums.shape[0] > 1 or config.pixels == 64
    torch.testing.assert_close(sums.sum(0), want.float().sum((0, 2, 3)), rtol=1e-5, atol=1e-4)


def test_library_convolutions_inside(device: torch.device) -> None:
    case = CASES["two-taps"]
    inputs = case.tensors(torch.float32, device)
    want = fused(inputs, **case.options)
    with dispatch.forced(dispatch.PARTS), fi.record_launches() as launches:
        got = fused(inputs, **case.options)
    assert any(launch.kernel == "_gate_kernel" for launch in launches)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_saved_bytes(frozen: int, device: torch.device) -> None:
    """What the modules and the pools keep by themselves, but for outputs that a pool reads and the
    last one; nothing twice; nothing of those in front of the first that is trained."""
    case = CASES["as-in-googlenet"]
    inputs = case.tensors(torch.bfloat16, device)
    for t in inputs[1 + 12 * frozen :]:
        t.requires_grad_()
    memory = SavedMemory(nn.ParameterList(inputs[1:]))
    with fi.backend("triton"), memory.watch():
        functional.inception_trunk(inputs[0], of_modules(inputs[1:]), **case.options)
    before, behind = 2 * 9 * 7, 2 * 4 * 3
    want = 0
    for i, dims in enumerate(case.dims):
        if i < frozen:
            continue
        pixels = before if i < 2 else behind
        # x and r, 16 bits; winning taps, a byte; the mask, a bit
        want += pixels * 2 * (dims.in_channels + dims.reduced_channels)
        want += pixels * dims.in_channels + pixels * dims.out_channels // 8
    if frozen < 2:
        want += behind * SECOND.out_channels  # winning taps of the pool
    assert memory.bytes == want


def test_inference_keeps_nothing(device: torch.device) -> None:
    case = TINY
    inputs = case.tensors(torch.float16, device)
    want = fused(inputs, **case.options)
    with fi.backend("triton"), torch.no_grad(), fi.record_launches() as launches:
        for _ in range(2):
            y, taps = functional.inception_trunk(inputs[0], of_modules(inputs[1:]), **case.options)
    assert torch.equal(y, want[0])
    assert torch.equal(taps[0], want[1])
    kernels = [launch.kernel for launch in launches]
    # packed filters stay; the second time as many launches without them
    assert kernels.count("_pack_kernel") == 1
    assert len(kernels) == 1 + 2 * (2 * 2 + 1)


def test_mixed_precision(device: torch.device) -> None:
    """Under autocast filters stay fp32, and so do their gradients; biases are not rounded."""
    case = TINY
    inputs = case.tensors(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        got = fused(inputs, **case.options)
    half = fused([t.bfloat16() if t.ndim > 1 else t for t in inputs], **case.options)
    outputs = 1 + len(case.taps)
    for i, (ours, other) in enumerate(zip(got, half, strict=True)):
        assert ours.dtype == (torch.bfloat16 if i < outputs else torch.float32)
        assert torch.equal(ours.to(other.dtype), other)


def test_operator_passes_opcheck(device: torch.device) -> None:
    inputs = TINY.tensors(torch.float32, device)
    trunk = Trunk({0: POOL, 2: Window(2, 2)}, (1, 3), False)
    assert Trunk.of(trunk.integers) == trunk
    kept = torch.rand(1, SECOND.out_channels, device=device) < 0.5
    options = (kept, 2.0, TINY.trunk.integers, 0)
    x, *parameters = [t.requires_grad_() for t in inputs]
    forward = (x, parameters[::2], parameters[1::2], *options)
    torch.library.opcheck(ops.inception_trunk, forward)
    x, *parameters = [t.detach() for t in inputs]
    filters, biases = parameters[::2], parameters[1::2]
    y, tapped, saved = ops.inception_trunk(x, filters, biases, *options)
    needs = [True, *[i % 3 > 0 for i in range(24)]]
    backward = (
        torch.ones_like(y), [torch.ones_like(t) for t in tapped], x, tapped, saved, filters, biases,
        *options, needs,
    )  # fmt: skip
    # it has no gradient, so there is nothing to trace behind it
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.inception_trunk_backward, backward, test_utils=tests)


def test_fakes_have_the_strides_of_what_is_saved(device: torch.device) -> None:
    """Of every case, with pools and taps."""
    for case in CASES.values():
        x, *parameters = case.tensors(torch.bfloat16, device)
        parts = parameters[::2], parameters[1::2]
        options = (None, 1.0, case.trunk.integers, len(case.dims) // 2)
        real = ops.inception_trunk(x, *parts, *options)
        meta = [[t.to("meta") for t in part] for part in parts]
        fake = ops.inception_trunk(x.to("meta"), *meta, *options)
        for ours, theirs in zip([real[0], *real[1], *real[2]], [fake[0], *fake[1], *fake[2]],
                                strict=True):  # fmt: skip
            assert (ours.shape, ours.stride(), ours.dtype) == (
                theirs.shape, theirs.stride(), theirs.dtype,
            )  # fmt: skip


def test_compiles_as_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = TINY.tensors(torch.float32, device)
    compiled = torch.compile(functional.inception_trunk, fullgraph=True, backend="aot_eager")
    with fi.backend("triton"):
        got = results(compiled, inputs, **TINY.options)
    for ours, theirs in zip(got, fused(inputs, **TINY.options), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_double_backward_is_an_error(device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in TINY.tensors(torch.float32, device)]
    with fi.backend("triton"):
        y, _ = functional.inception_trunk(leaves[0], of_modules(leaves[1:]), **TINY.options)
    (gradient,) = torch.autograd.grad(y.sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_is_that_of_torch(p: float, device: torch.device) -> None:
    """The same seed drops the same; gradients too."""
    inputs = CASES["one-module"].tensors(torch.float32, device)
    found = []
    for function, backend in (
        (functional.inception_trunk, "triton"),
        (functional.inception_trunk, "torch"),
        (reference.inception_trunk, "torch"),
    ):
        torch.manual_seed(3)
        with fi.backend(backend):
            found.append(results(function, inputs, pools={}, global_pool=True, dropout=p))
    assert (found[0][0] == 0).any()
    for ours, aten, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aten, theirs, rtol=1e-4, atol=1e-5)


def test_a_tap_of_what_is_frozen(device: torch.device) -> None:
    """It can be differentiated, as any output of an operator, to no effect."""
    case = CASES["two-taps"]
    leaves = case.tensors(torch.float32, device)
    for t in leaves[25:]:
        t.requires_grad_()
    with fi.backend("triton"):
        y, taps = functional.inception_trunk(leaves[0], of_modules(leaves[1:]), **case.options)
        taps[0].sum().backward(retain_graph=True)
        assert all(t.grad is None for t in leaves)
        (y.sum() + taps[1].sum()).backward()
    want = [t.detach().requires_grad_(i >= 25) for i, t in enumerate(leaves)]
    y, _ = reference.inception_trunk(want[0], of_modules(want[1:]), **case.options)
    y.sum().backward()
    for ours, theirs in zip(leaves[25:], want[25:], strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)

"""The stem as one operator, in the interpreter or on a GPU: against fp64, against the five
operators that it stands for, and the operator around its kernels."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional, geometry, reference
from fused_inception.geometry import Window
from fused_inception.kernels.stem import ImageToPack, launch_stem_pack
from fused_inception.kernels.stem_conv import launch_stem_conv_fwd
from fused_inception.launches import Launch
from fused_inception.ops import pooling_triton, stem_triton
from fused_inception.ops import stem as ops
from fused_inception.ops.stages import Stem
from fused_inception.tuning import dispatch
from fused_inception.tuning.configs import MarchConfig, StemConvConfig, Tile, VectorConfig, WgradJob
from fused_inception.tuning.conv_heuristic import PACKED_POSITIONS
from fused_inception.tuning.targets import Target
from tests.tolerances import assert_within, assert_within_l2
from tests.tracing import SavedMemory

DGRAD = Tile(1024, 16, 16)
NAMES = ("x", "w1", "b1", "w2", "b2", "w3", "b3")
FORWARD = ["_stem_pack_kernel", "_stem_conv_fwd_kernel", "_max_pool_lrn_fwd_kernel",
           "_conv2d_fwd_kernel", "_conv2d_fwd_kernel", "_lrn_max_pool_fwd_kernel"]  # fmt: skip
BACKWARD = ["_lrn_max_pool_bwd_kernel", "_pack_kernel", "_conv2d_dgrad_kernel",
            "_conv2d_dgrad_kernel", "_max_pool_lrn_bwd_kernel", "_stem_wgrad_kernel",
            "_stem_finish_kernel"]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Images, filters, options."""

    image: tuple[int, int, int, int]
    widths: tuple[int, int, int] = (8, 16, 24)
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
        """x, then filter and bias of each convolution."""
        draw = torch.Generator().manual_seed(3)
        c0, (c1, c2, c3) = self.image[1], self.widths
        tensors = [torch.randn(self.image, generator=draw)]
        for shape in ((c1, c0, 7, 7), (c2, c1, 1, 1), (c3, c2, 3, 3)):
            std = (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
            tensors.append(torch.randn(shape, generator=draw) * std)
            tensors.append(torch.randn(shape[0], generator=draw) * 0.1)
        return [t.to(device, dtype) for t in tensors]


CASES = {
    "15x15": Case((2, 3, 15, 15)),
    "33x31": Case((1, 3, 33, 31)),
    "paper-widths": Case((1, 3, 17, 15), (64, 64, 192)),
    "one-pixel": Case(
        (5, 1, 1, 1), options={"pool1": Window(3, 2, 1, True), "pool2": Window(2, 1, 1)}
    ),
    "other-options": Case(
        (2, 2, 9, 12), (16, 8, 8),
        {"pool1": Window(2, 2), "norm1": (3, 0.5, 0.75, 2.0),
         "norm2": (4, 0.3, 0.6, 1.5), "pool2": Window(3, 1, 1)},
    ),
    "empty-batch": Case((0, 3, 15, 15)),
}  # fmt: skip
SMALL = CASES["15x15"]
# for the operator around the kernels: few pixels, and one channel a norm
TINY = Case(
    (1, 3, 7, 5), (8, 16, 24),
    {"pool1": Window(1, 2), "norm1": (1, 0.5, 0.75, 1.0),
     "norm2": (1, 0.5, 0.75, 1.0), "pool2": Window(1, 1)},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _few_large_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    if device.type == "cpu":
        largest = Target("interpreter", 2**40, 1, 1e40, 1e40, 1, 256 * 256)
        monkeypatch.setattr("fused_inception.ops.problem.target_of", lambda device: largest)
        image = stem_triton.image_conv_config
        vector, march = VectorConfig(512, 4), MarchConfig(2, 512, 4)
        for module, name, choose in (
            (stem_triton, "image_conv_config", lambda *p: replace(image(*p), dgrad=DGRAD)),
            (pooling_triton, "vector_config", lambda *p: vector),
            (pooling_triton, "march_config", lambda *p: march),
        ):
            monkeypatch.setattr(module, name, choose)


def results(function: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """y and all gradients of a fixed one of y."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient_of(y))]


def gradient_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)


def fused(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    with fi.backend("triton"):
        return results(functional.googlenet_stem, inputs, **options)


def one_by_one(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """The same by the operators of the layers."""
    with fi.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "why_not", lambda *_: "asked for")
        return results(functional.googlenet_stem, inputs, **options)


def check(name: str, dtype: torch.dtype, device: torch.device) -> list[Launch]:
    """Compare with fp64; the launches."""
    case = CASES[name]
    inputs = case.tensors(dtype, device)
    with fi.record_launches() as launches:
        got = fused(inputs, **case.options)
    finishes = {"_stem_finish_kernel", "_finish_kernel"}  # with conv1's filter and without
    assert sum(launch.kernel in finishes for launch in launches) == 1
    want = results(reference.googlenet_stem, [t.double() for t in inputs], **case.options)
    baseline = results(reference.googlenet_stem, inputs, **case.options)
    # rounding to 16 bits changes which element of a window wins, which breaks a maximum
    within = assert_within if dtype == torch.float32 else assert_within_l2
    for name, ours, exact, theirs in zip(("y", *NAMES), got, want, baseline, strict=True):
        within(name, ours, exact, theirs, slack=2.0 if name == "y" else 3.0)
    for ours in got[:2]:
        _, c, h, w = ours.shape
        assert ours.stride() == (h * w * c, 1, w * c, c)
    return list(launches)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *((name, torch.bfloat16) for name in ("15x15", "paper-widths")),
        ("15x15", torch.float16),
    ],
    ids=str,
)
def test_output_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    check(name, dtype, device)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("15x15", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        *((name, torch.float32) for name in ("other-options", "empty-batch")),
    ],
    ids=str,
)
def test_with_convolutions_of_the_library(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    with dispatch.forced(dispatch.CONV_PARTS):
        kernels = {launch.kernel for launch in check(name, dtype, device)}
    if name != "empty-batch":
        assert {"_epilogue_kernel", "_gate_kernel", "_stem_wgrad_kernel"} <= kernels
    ours = {"_image_conv_fwd_kernel", "_stem_conv_fwd_kernel", "_conv2d_fwd_kernel"}
    assert not kernels & (ours | {"_conv2d_dgrad_kernel"})


@pytest.mark.parametrize("part", dispatch.CONV_PARTS)
def test_each_part_by_the_library(part: str, device: torch.device) -> None:
    case = SMALL
    inputs = case.tensors(torch.float32, device)
    ours = fused(inputs, **case.options)
    with dispatch.forced([part]):
        theirs = fused(inputs, **case.options)
    for got, want in zip(theirs, ours, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("special", ["ties", "nan"])
def test_gates_are_those_of_the_layers(special: str, device: torch.device) -> None:
    """Sums of whole numbers are the same to the bit in any order; others are near."""
    inputs = SMALL.tensors(torch.float32, device)
    if special == "ties":
        # every map takes few values, many of them 0
        for t in inputs:
            t.copy_(t.mul(2).round().clamp(-1, 1))
    else:
        inputs[0][1, 2, 7, 5] = math.nan
    got = fused(inputs, **SMALL.options)
    want = one_by_one(inputs, **SMALL.options)
    for name, ours, theirs in zip(("y", *NAMES), got, want, strict=True):
        near = 0.0 if special == "ties" and name in ("y", "x") else 1e-4
        torch.testing.assert_close(
            ours, theirs, rtol=near, atol=near, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert got[0].isnan().any() == (special == "nan")
    assert not got[0].isnan().all()


@pytest.mark.usefixtures("nan_filled_empty")
def test_bitwise_the_same_again_and_for_any_strides(device: torch.device) -> None:
    case = SMALL
    x, *parameters = case.tensors(torch.float32, device)
    wide = nn.functional.pad(x, (1, 2, 3, 1), value=math.nan)
    cut = wide.contiguous(memory_format=torch.channels_last)[:, :, 3:-1, 1:-2]
    with fi.backend("triton"):
        runs = []
        for image in (x, x, cut):
            leaves = [t.detach().requires_grad_() for t in (image, *parameters)]
            y = functional.googlenet_stem(*leaves, **case.options)
            dy = torch.ones_like(y) if image is x else y.new_ones(()).expand(y.shape)
            runs.append([y, *torch.autograd.grad(y, leaves, dy)])
    for run in runs[1:]:
        for ours, first in zip(run, runs[0], strict=True):
            assert torch.equal(ours, first)


# what is differentiated -> launches of data gradients (and poolings behind them), of sums
SUBSETS = {
    "x": (2, ["_max_pool_lrn_bwd_kernel", "_image_conv_dgrad_kernel"]),
    "b1": (2, ["_max_pool_lrn_bwd_kernel", "_stem_wgrad_kernel", "_finish_kernel"]),
    "w2 b3": (1, ["_stem_wgrad_kernel", "_finish_kernel"]),
    "w3 b3": (0, ["_stem_wgrad_kernel", "_finish_kernel"]),
}


@pytest.mark.usefixtures("nan_filled_empty")
def test_what_is_frozen_costs_nothing(device: torch.device) -> None:
    case = TINY
    inputs = case.tensors(torch.float32, device)
    everything = dict(zip(NAMES, fused(inputs, **case.options)[1:], strict=True))
    for subset, (data_gradients, others) in SUBSETS.items():
        needed = subset.split()
        leaves = [
            t.detach().requires_grad_(n in needed) for n, t in zip(NAMES, inputs, strict=True)
        ]
        with fi.backend("triton"):
            y = functional.googlenet_stem(*leaves, **case.options)
        with fi.record_launches() as launches:
            y.backward(gradient_of(y))
        for name, leaf in zip(NAMES, leaves, strict=True):
            if name in needed:
                torch.testing.assert_close(leaf.grad, everything[name], rtol=1e-5, atol=1e-5)
            else:
                assert leaf.grad is None, (subset, name)
        want = ["_lrn_max_pool_bwd_kernel", *["_pack_kernel"] * (data_gradients > 0)]
        want += ["_conv2d_dgrad_kernel"] * data_gradients + others
        assert [launch.kernel for launch in launches] == want, subset


@pytest.mark.parametrize("stages", [False, True])
def test_splits_change_little(
    stages: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `stages` those of conv1 are added up by a launch of its own."""
    case = CASES["33x31"]
    inputs = case.tensors(torch.float32, device)
    want = fused(inputs, **case.options)
    choose = stem_triton.stem_wgrad_config

    def split(*problem: Any) -> Any:
        config = choose(*problem)
        jobs = {n: WgradJob(getattr(config, n).tile, 3) for n in ("conv1", "conv2", "conv3")}
        return replace(config, **jobs)

    monkeypatch.setattr(stem_triton, "stem_wgrad_config", split)
    monkeypatch.setattr(geometry, "MANY_PIXELS", 0 if stages else 2**16)
    with fi.record_launches() as launches:
        got = fused(inputs, **case.options)
    (grid,) = [launch.grid for launch in launches if launch.kernel == "_stem_wgrad_kernel"]
    assert grid[0] >= 3 * 3
    assert sum(launch.kernel == "_finish_kernel" for launch in launches) == stages
    for ours, other in zip(got, want, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_launches_and_saved_bytes(device: torch.device) -> None:
    """Training on images: 5 launches forward and 6 backward beside packing; no mask is kept."""
    inputs = CASES["15x15"].tensors(torch.bfloat16, device)
    for t in inputs[1:]:
        t.requires_grad_()
    memory = SavedMemory(nn.ParameterList(inputs[1:]))
    with fi.backend("triton"), fi.record_launches() as launches, memory.watch():
        y = functional.googlenet_stem(*inputs)
    assert [launch.kernel for launch in launches] == FORWARD
    # 15 -> 8 -> 4 -> 2 pixels a side; the packed image, z and pooled, r, y of conv3, two indices
    c1, c2, c3 = CASES["15x15"].widths
    maps = 16 * 11 * 11 + 4 * 4 * (2 * c1 + c2 + c3)
    want = 2 * (2 * maps + 4 * 4 * c1 + 2 * 2 * c3)
    assert memory.bytes == want
    with fi.record_launches() as launches:
        y.sum().backward()
    assert [launch.kernel for launch in launches] == BACKWARD
    # an image that needs a gradient is kept itself too
    memory = SavedMemory(nn.ParameterList(inputs[1:]))
    with fi.backend("triton"), memory.watch():
        functional.googlenet_stem(inputs[0].requires_grad_(), *inputs[1:])
    assert memory.bytes == want + 2 * 2 * 3 * 15 * 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "cut"])
def test_packed_image_and_filter(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    x, w1, b1, w2, b2, w3, b3 = Case((2, 3, 11, 8)).tensors(torch.float32, device)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "cut":
        x = x[:, 1:, 2:, 1:-2]
        w1 = w1[:, 1:]
    n, c, height, width = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    packed = launch_stem_pack(ImageToPack(x, w1, b1, rows, columns), w2, w3, [b2, b3], dtype)
    assert packed.image.shape == (n, rows + 3, columns + 3, 16)
    bottom, right = 2 * rows + 2 - height, 2 * columns + 2 - width
    wide = nn.functional.pad(x, (4, right, 4, bottom)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    # [N, C, U, dy, V, dx] -> [N, U, V, dx, dy, C]
    own = wide.permute(0, 2, 4, 5, 3, 1).to(dtype)
    rest = torch.zeros_like(packed.image).unflatten(3, (2, 8))
    rest[..., 0, 6] = 1
    rest[..., :6].unflatten(4, (2, 3))[..., :c] = own
    assert torch.equal(packed.image, rest.flatten(3))
    # the same of the filter, whose first row and column are not there
    taps = nn.functional.pad(w1, (1, 0, 1, 0)).unflatten(3, (4, 2)).unflatten(2, (4, 2))
    filters = torch.zeros(len(w1), 4, 4, 2, 8, dtype=dtype, device=device)
    filters[..., :6].unflatten(4, (2, 3))[..., :c] = taps.permute(0, 2, 4, 5, 3, 1).to(dtype)
    assert torch.equal(packed.w1, filters.view_as(packed.w1))
    assert packed.w1.shape[1] == PACKED_POSITIONS
    assert torch.equal(packed.b, torch.cat([b2, b3, b1]))


# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("step", [16, 64])
def test_nothing_reaches_a_window_from_outside(
    special: float, step: int, device: torch.device
) -> None:
    """What is not finite is seen by the windows of 7 x 7 that hold it and no other."""
    x, w1, b1, w2, b2, w3, b3 = Case((16, 3, 12, 13)).tensors(torch.float32, device)
    for i in range(len(x)):
        x[i, i % 3, 4 + i // 4, 4 + i % 4] = special
    packed = launch_stem_pack(ImageToPack(x, w1, b1, 6, 7), w2, w3, [b2, b3], torch.float32)
    y = torch.empty((16, 6, 7, 8), device=device).permute(0, 3, 1, 2)
    config = StemConvConfig(Tile(256, 16, step), 4, 2)
    launch_stem_conv_fwd(packed.image, packed.w1, packed.b[-8:], y, None, config, precision="ieee")
    want = nn.functional.conv2d(x.double(), w1.double(), b1.double(), 2, 3).relu().float()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert 0.1 < want.isfinite().float().mean() < 0.9


def test_inference_launches_five_times_and_keeps_nothing(device: torch.device) -> None:
    inputs = CASES["15x15"].tensors(torch.bfloat16, device)
    want = reference.googlenet_stem(*(t.double() for t in inputs))
    baseline = reference.googlenet_stem(*inputs)
    with fi.backend("triton"), torch.no_grad():
        functional.googlenet_stem(*inputs)
        with fi.record_launches() as launches:
            y = functional.googlenet_stem(*inputs)
        assert_within_l2("y", y, want, baseline)
        # the image is read as it is, packed filters stay until one changes
        assert [x.kernel for x in launches] == ["_image_conv_fwd_kernel", *FORWARD[2:]]
        inputs[3].mul_(2)
        assert not torch.equal(functional.googlenet_stem(*inputs), y)


def test_mixed_precision_and_layout_of_filter_gradients(device: torch.device) -> None:
    """Under autocast filters stay fp32, and so do their gradients, in the filters' own strides."""
    inputs = SMALL.tensors(torch.float32, device)
    for i in (1, 5):
        inputs[i] = inputs[i].contiguous(memory_format=torch.channels_last)
    inputs[3] = inputs[3].transpose(0, 1).contiguous().transpose(0, 1)
    with torch.autocast(device.type, torch.bfloat16):
        got = fused(inputs, **SMALL.options)
    half = fused([t.bfloat16().contiguous() for t in inputs], **SMALL.options)
    assert got[0].dtype == torch.bfloat16
    for ours, other, leaf in zip(got[1:], half[1:], inputs, strict=True):
        assert ours.dtype == torch.float32
        assert ours is got[1] or ours.stride() == torch.empty_like(leaf).stride()
        # biases are rounded in one of the two
        assert (ours - other).norm() <= 0.05 * other.float().norm()


def test_operator_passes_opcheck(device: torch.device) -> None:
    inputs = TINY.tensors(torch.float32, device)
    stem = Stem(2, 3, **TINY.options)
    options = (stem.integers, stem.constants)
    assert Stem.of(*options) == stem
    x, *parameters = [t.requires_grad_() for t in inputs]
    forward = (x, parameters[::2], parameters[1::2], *options, True)
    torch.library.opcheck(ops.googlenet_stem, forward)
    x, *parameters = [t.detach() for t in inputs]
    filters, biases = parameters[::2], parameters[1::2]
    y, saved = ops.googlenet_stem(x, filters, biases, *options, True)
    needs = [True, True, False, True, True, True, False]
    backward = (torch.ones_like(y), x, saved, filters, biases, *options, needs)
    # it has no gradient, so there is nothing to trace behind it
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.googlenet_stem_backward, backward, test_utils=tests)
    backward = (backward[0], None, *backward[2:-1], [False, *needs[1:]])
    torch.library.opcheck(ops.googlenet_stem_backward, backward, test_utils=tests)


def test_compiles_as_one_graph(device: torch.device) -> None:
    case = TINY
    torch._dynamo.reset()
    inputs = case.tensors(torch.float32, device)
    compiled = torch.compile(functional.googlenet_stem, fullgraph=True, backend="aot_eager")
    with fi.backend("triton"):
        got = results(compiled, inputs, **case.options)
    for ours, theirs in zip(got, fused(inputs, **case.options), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_double_backward_is_an_error(device: torch.device) -> None:
    leaves = [t.requires_grad_() for t in TINY.tensors(torch.float32, device)]
    with fi.backend("triton"):
        y = functional.googlenet_stem(*leaves, **TINY.options)
    (gradient,) = torch.autograd.grad(y.sum(), leaves[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()

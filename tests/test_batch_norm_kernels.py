"""BatchNorm's kernels through the operators' scripts, interpreted or on a GPU, against fp64."""

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from fused_inception import geometry, reference
from fused_inception.geometry import InceptionDims
from fused_inception.kernels.moments import Moments, merged_moments
from fused_inception.launches import Launch, record_launches
from fused_inception.ops import conv2d_bn_triton, inception_bn_triton
from fused_inception.ops.running import Running
from fused_inception.tuning import chosen
from fused_inception.tuning.configs import BranchesConfig, DgradConfig, StatisticsConfig, Tile
from tests.cases import INCEPTION_CASES, InceptionCase
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DIMS = InceptionDims(24, 16, 24, 32, 8, 16, 8)
EPS = 1e-3
# forward and backward without the packing of filters
MODULE_LAUNCHES = (
    "_pointwise _batch_statistics _normalise _branches _normalise",
    "_norm_sums _norm_grad _dgrad _reduce_norm_grad _gradients _finish",
)
CONV_LAUNCHES = (
    "_conv2d_fwd _batch_statistics _normalise",
    "_norm_sums _norm_grad _conv2d_dgrad _conv2d_wgrad _finish",
)
# where tiles are many
MODULE_STAGES = (
    "_pointwise _merge_moments _batch_statistics _normalise _branches _merge_moments _normalise",
    "_norm_sums _finish _norm_grad _dgrad _finish _reduce_norm_grad _gradients _finish",
)
CONV_STAGES = (
    "_conv2d_fwd _merge_moments _batch_statistics _normalise",
    "_norm_sums _finish _norm_grad _conv2d_dgrad _conv2d_wgrad _finish",
)
IMAGE_STAGES = (
    "_image_conv_fwd _merge_moments _batch_statistics _normalise",
    "_norm_sums _finish _norm_grad _image_conv_dgrad _image_conv_wgrad _finish _finish",
)
# conv1 of the network
PACKED_STAGES = (
    "_stem_pack _stem_conv_fwd _merge_moments _batch_statistics _normalise",
    "_norm_sums _finish _norm_grad _image_conv_dgrad _packed_wgrad _finish _stem_finish",
)


@dataclass
class Problem:
    """Data of a module (no window) or of one convolution with BatchNorm."""

    x: Tensor
    filters: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    dy: Tensor
    window: tuple[int, ...] = ()  # stride, padding
    momentum: float | None = 0.1
    skip: bool = False
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype, in memory of their own."""
        lists = {
            name: [t.to(dtype, copy=True) for t in getattr(self, name)]
            for name in ("filters", "gammas", "betas", "means", "variances")
        }
        batches = [t.clone() for t in self.batches]
        return replace(self, x=self.x.to(dtype), dy=self.dy.to(dtype), batches=batches, **lists)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, *self.filters, *self.gammas, *self.betas]


def with_norms(
    x: Tensor, filters: list[Tensor], dy: Tensor, window: tuple[int, ...] = ()
) -> Problem:
    """A problem whose BatchNorms have parameters and a past; statistics and parameters in fp32."""
    draw = torch.Generator().manual_seed(1)

    def vectors(centre: float, spread: float) -> list[Tensor]:
        return [
            (centre + spread * torch.randn(f.shape[0], generator=draw)).to(x.device)
            for f in filters
        ]

    means, variances = vectors(0.0, 1.0), [v.abs() for v in vectors(1.0, 0.2)]
    batches = [torch.tensor(3, device=x.device) for _ in filters]
    return Problem(
        x, filters, vectors(1.0, 0.3), vectors(0.0, 0.3), dy, window,
        means=means, variances=variances, batches=batches,
    )  # fmt: skip


def module(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    case: InceptionCase | None = None,
) -> Problem:
    p = (case or InceptionCase("", DIMS, 2, 4, 5)).tensors(dtype, device)
    return with_norms(p.x, p.filters, p.dy)


def convolution(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    shape: Sequence[int] = (2, 24, 5, 6),
    c_out: int = 20,
    kernel: int = 3,
    stride: int = 1,
) -> Problem:
    draw = torch.Generator().manual_seed(0)
    last = torch.channels_last
    x = torch.randn(shape, generator=draw).relu()
    w = torch.randn((c_out, shape[1], kernel, kernel), generator=draw)
    w *= (2 / (shape[1] * kernel**2)) ** 0.5
    window = stride, kernel // 2
    y = torch.nn.functional.conv2d(x, w, None, *window)
    dy = torch.randn(y.shape, generator=draw)
    return with_norms(
        x.to(device, dtype, memory_format=last), [w.to(device, dtype)],
        dy.to(device, dtype, memory_format=last), window,
    )  # fmt: skip


def run(p: Problem, needs: list[bool] | None = None) -> list[Tensor]:
    """y, the running statistics afterwards, and the gradients, by the kernels."""
    p = p.to(p.x.dtype)
    script = conv2d_bn_triton if p.window else inception_bn_triton
    running = Running(p.means, p.variances, p.batches, p.momentum, p.skip)
    running.advance()
    y, saved = script.forward(p.x, p.filters, p.gammas, p.betas, running, EPS, *p.window)
    needs = [True] * (1 + 3 * len(p.filters)) if needs is None else needs
    gradients = script.backward(p.dy, p.x, saved, p.filters, p.gammas, *p.window, needs)
    return [y, *p.means, *p.variances, *gradients]


def plain(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same by PyTorch's own operators and autograd."""
    p = p.to(dtype)
    leaves = [t.requires_grad_() for t in p.leaves]
    options = {"training": True, "momentum": p.momentum, "eps": EPS, "skip_nonfinite": p.skip}
    if p.window:
        stride, padding = p.window
        y = reference.conv2d_bn_relu(
            p.x, p.filters[0], p.means[0], p.variances[0], p.gammas[0], p.betas[0],
            stride=stride, padding=padding, batches_tracked=p.batches[0], **options,
        )  # fmt: skip
    else:
        y = reference.inception_bn(
            p.x, p.filters, p.means, p.variances, p.gammas, p.betas,
            batches_tracked=p.batches, **options,
        )  # fmt: skip
    return [y.detach(), *p.means, *p.variances, *torch.autograd.grad(y, leaves, p.dy)]


def check(p: Problem, got: list[Tensor]) -> None:
    """Each result as near to fp64 as PyTorch's in the dtype of x.

    In 16 bits the gradients all together, by relative L2: rounding flips gates around the mean, and
    one that it flips shows in the few pixels here.
    """
    layers = len(p.filters)
    names = ["y", *(f"{name}{i}" for name in ("mean", "var") for i in range(layers)), "dx"]
    names += [f"{name}{i}" for name in ("dw", "dgamma", "dbeta") for i in range(layers)]
    want, baseline = plain(p, torch.float64), plain(p, p.x.dtype)
    got = [ours.to(theirs.dtype) for ours, theirs in zip(got, baseline, strict=True)]
    together = 1 + 2 * layers if p.x.dtype != torch.float32 else len(names)
    for name, ours, exact, theirs in [*zip(names, got, want, baseline, strict=True)][:together]:
        assert_within(name, ours, exact, theirs, slack=3.0 if name.startswith("d") else 2.0)
    errors, yardsticks = (
        torch.tensor([(a.double() - b).norm() / b.norm() for a, b in zip(of, want, strict=True)])
        for of in (got, baseline)
    )
    assert errors.isfinite().all()
    assert errors.norm() <= 3 * yardsticks.norm() + 1e-5


@pytest.mark.usefixtures("nan_filled_empty")
def test_a_narrow_tail_behind_wide_tiles_of_the_3x3(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments and sums of wide tiles and of one tail lie side by side."""
    wide, other = Tile(32, 32, 16), Tile(32, 16, 16)
    branches = BranchesConfig(wide, 16, other, 4, 2)
    dgrad = DgradConfig(wide, 16, other, other, 4, 2)
    monkeypatch.setattr(chosen, "branches_config", lambda *_, **__: branches)
    monkeypatch.setattr(chosen, "dgrad_config", lambda *_, **__: dgrad)
    p = module(device, case=InceptionCase("", InceptionDims(16, 8, 48, 72, 8, 8, 8), 1, 5, 7))
    check(p, run(p))


# more than one value a channel, and some: BatchNorm of nothing is PyTorch's error or NaN
CASES = [
    *(c for c in INCEPTION_CASES if c.batch * c.height * c.width > 2),
    InceptionCase("three-values", InceptionDims(16, 8, 16, 24, 8, 16, 8), 3, 1, 1),
]
NARROW = ("batch-one", "prime-widths")  # in 16 bits


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        (dtype, case)
        for dtype, case in itertools.product(DTYPES, CASES)
        if dtype == torch.float32 or case.name in NARROW
    ],
    ids=lambda value: value.name if isinstance(value, InceptionCase) else str(value),
)
def test_module_and_all_gradients(
    case: InceptionCase, dtype: torch.dtype, device: torch.device
) -> None:
    p = module(device, dtype, case)
    check(p, run(p))


CONVOLUTIONS = {
    "1x1": {"kernel": 1},
    "3x3": {"kernel": 3},
    "5x5-of-odd-widths": {"shape": (1, 13, 4, 7), "c_out": 11, "kernel": 5},
    "image": {"shape": (2, 3, 15, 13), "c_out": 16, "kernel": 7, "stride": 2},
    "image-of-odd-widths": {"shape": (2, 1, 15, 16), "c_out": 9, "kernel": 3, "stride": 1},
    "more-than-one-tile": {"shape": (1, 16, 11, 17), "c_out": 72, "kernel": 1},
}


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_all_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    p = convolution(device, dtype, **CONVOLUTIONS[name])
    check(p, run(p))


def without_packing(launches: Sequence[Launch]) -> list[str]:
    return [launch.kernel for launch in launches if launch.kernel != "_pack_kernel"]


@pytest.mark.parametrize("kind", ["module", "convolution"])
def test_launches(kind: str, device: torch.device) -> None:
    """Five and seven for a module, three and five for a convolution, and a packing each way."""
    p = module(device) if kind == "module" else convolution(device)
    with record_launches() as launches:
        run(p)
    expected = " ".join(MODULE_LAUNCHES if kind == "module" else CONV_LAUNCHES).split()
    assert without_packing(launches) == [f"{name}_kernel" for name in expected]
    assert len(launches) == len(expected) + 2


@pytest.fixture
def in_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of any map are summed in groups, moments two tiles at a time."""
    monkeypatch.setattr(geometry, "MANY_PIXELS", 0)
    for of in (inception_bn_triton, conv2d_bn_triton):
        monkeypatch.setattr(of, "merge_config", lambda: StatisticsConfig(2, 16, 4))


@pytest.mark.usefixtures("nan_filled_empty", "in_stages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["module", "convolution", "images", "conv1"])
def test_sums_in_stages(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two launches more forward and two backward for a module, one each way for a convolution, one
    more for the filters of images."""
    if kind == "module":
        p = module(device, dtype, InceptionCase("", DIMS, 3, 9, 11))
        expected = " ".join(MODULE_STAGES).split()
    elif kind == "images":
        p = convolution(device, dtype, shape=(1, 3, 26, 30))
        expected = " ".join(IMAGE_STAGES).split()
    elif kind == "conv1":
        p = convolution(device, dtype, shape=(2, 3, 34, 32), c_out=12, kernel=7, stride=2)
        expected = " ".join(PACKED_STAGES).split()
    else:
        p = convolution(device, dtype, shape=(3, 24, 9, 11))
        expected = " ".join(CONV_STAGES).split()
    with record_launches() as launches:
        got = run(p)
    assert without_packing(launches) == [f"{name}_kernel" for name in expected]
    check(p, got)


def moments(z: Tensor, tile: int) -> Tensor:
    """[tiles, 3, C] of z [P, C] in fp64, as the convolutions leave them."""
    rows = []
    for part in z.double().split(tile):
        mean = part.mean(dim=0)
        rounded = mean.float().double()
        rows.append(torch.stack([rounded, mean - rounded, (part - mean).square().sum(dim=0)]))
    return torch.stack(rows)


@pytest.mark.usefixtures("nan_filled_empty")
def test_merged_moments(device: torch.device) -> None:
    """Of two convolutions, their tiles no multiple of each other, the last ones cut; far from 0,
    where a mean rounded to fp32 is 0.03 off."""
    z = 1e6 + torch.randn(90, 24, generator=torch.Generator().manual_seed(0)).double()
    given = [Moments(moments(z[:, :c], t).float().to(device), t) for c, t in ((24, 4), (8, 6))]
    merged = merged_moments(*given, len(z), StatisticsConfig(4, 16, 4))
    alone, _ = merged_moments(given[0], None, len(z), StatisticsConfig(4, 16, 4))
    assert torch.equal(alone.partial, merged[0].partial)
    for got, channels, tile in zip(merged, (24, 8), (16, 24), strict=True):
        assert got.tile == tile
        mean, rest, spread = got.partial.double().cpu().unbind(dim=1)
        want_mean, want_rest, want_spread = moments(z[:, :channels], tile).unbind(dim=1)
        assert (mean + rest - want_mean - want_rest).abs().max() < 1e-6
        assert (spread / want_spread - 1).abs().max() < 1e-5


@pytest.mark.usefixtures("nan_filled_empty", "in_stages")
def test_what_is_frozen_in_stages(device: torch.device) -> None:
    """Without gradients of one reduced map, or of both."""
    p = module(device)
    all_of_them = run(p)
    for wanted in ((1, 7 + 1), (3,), (0,), (2, 13 + 4)):
        some = run(p, [i in wanted for i in range(19)])
        for i in wanted:
            assert torch.equal(some[13 + i], all_of_them[13 + i])


@pytest.mark.parametrize("kind", ["module", "convolution"])
def test_runs_are_bitwise_repeatable(kind: str, device: torch.device) -> None:
    p = module(device) if kind == "module" else convolution(device)
    for first, second in zip(run(p), run(p), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("stages", [False, True], ids=["", "stages"])
def test_large_mean(stages: bool, device: torch.device, request: pytest.FixtureRequest) -> None:
    """At mean 1000 and variance 1 the statistics are as good as PyTorch's."""
    if stages:
        request.getfixturevalue("in_stages")
    p = convolution(device, shape=(4, 8, 12, 12), c_out=8, kernel=1)
    # every filter passes one channel on, far from 0
    p.filters[0] = torch.eye(8, device=device).reshape(8, 8, 1, 1)
    p.x = 1000.0 + torch.randn(p.x.shape, generator=torch.Generator().manual_seed(2)).to(device)
    p.x = p.x.contiguous(memory_format=torch.channels_last)
    got = run(p)
    check(p, got)
    # a new variance of about 1 after one step of 0.1 from 1 or so
    assert (got[2] - p.variances[0]).abs().max() < 0.2


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e25])
@pytest.mark.parametrize("stages", [False, True], ids=["", "stages"])
def test_statistics_that_are_not_finite(
    stages: bool, value: float, skip: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """With `skip` the channels that they are of keep their running statistics; of 1e25 the mean is
    finite, but the variance is not."""
    if stages:
        request.getfixturevalue("in_stages")
    p = convolution(device, shape=(2, 8, 4, 4), c_out=8, kernel=1)
    p.filters[0][3, 0] = value
    p.skip = skip
    with warnings.catch_warnings():
        # the interpreter computes with NumPy, which speaks of infinities
        warnings.simplefilter("ignore", RuntimeWarning)
        y, mean, var, *_ = run(p)
    finite = torch.isfinite(mean) & torch.isfinite(var)
    if not math.isfinite(value):
        assert y[:, 3].isnan().all()
    assert y[:, :3].isfinite().all()
    if skip:
        assert finite.all()
        assert (mean != p.means[0]).tolist() == [c != 3 for c in range(8)]
        assert var[3] == p.variances[0][3]
    else:
        assert finite.tolist() == [c != 3 for c in range(8)]


def test_cumulative_average(device: torch.device) -> None:
    """Without a momentum the new batch weighs as much as each of those before."""
    p = replace(module(device), momentum=None)
    check(p, run(p))
    p = replace(convolution(device), momentum=None)
    check(p, run(p))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    "wanted",
    [("dw2",), ("dw4", "dgamma1"), ("dbeta3",), ("dgamma0", "dbeta5"), ("dx",), ("dw5",)],
    ids="-".join,
)
def test_only_what_is_needed(wanted: tuple[str, ...], device: torch.device) -> None:
    """The gradients asked for are those of a full backward, the others have no elements."""
    p = module(device, case=InceptionCase("", DIMS, 1, 4, 4))
    names = ["dx", *(f"{name}{i}" for name in ("dw", "dgamma", "dbeta") for i in range(6))]
    everything = run(p)[13:]
    some = run(p, [name in wanted for name in names])[13:]
    for name, full, part in zip(names, everything, some, strict=True):
        if name in wanted:
            torch.testing.assert_close(part, full)
        else:
            assert part.numel() == 0


@pytest.mark.usefixtures("nan_filled_empty")
def test_strides_of_gradients_and_inputs(device: torch.device) -> None:
    """A slice of a larger map, a contiguous one; an expanded and a contiguous gradient."""
    p = module(device)
    wide = torch.full((2, 40, 4, 5), math.nan, device=device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    part = wide[:, 8:32]
    part.copy_(p.x)
    dy = torch.randn((), device=device).expand(p.dy.shape)
    for x, gradient in ((part, p.dy.contiguous()), (p.x.contiguous(), dy)):
        q = replace(p, x=x, dy=gradient)
        got = run(q)
        check(q, got)


def test_parameters_in_the_dtype_of_the_maps(device: torch.device) -> None:
    """A module that was cast whole: gammas, betas and running statistics in 16 bits."""
    case = InceptionCase("", DIMS, 1, 12, 13)
    p = module(device, torch.bfloat16, case).to(torch.bfloat16)
    check(p, run(p))

"""Pooling and normalisation through their launchers, in the interpreter or on a GPU, against
fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import LARGEST_WINDOW, Window
from fused_inception.launches import record_launches
from fused_inception.ops import pooling_triton
from fused_inception.tuning.configs import MarchConfig, VectorConfig
from tests.cases import LAYOUTS, slice_of_wider
from tests.conftest import INTERPRETED
from tests.pooling_cases import OPS, POOLING_CASES, PoolingCase
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNEL_CASES = [case for case in POOLING_CASES if case.window.kernel <= LARGEST_WINDOW]
BY_NAME = {case.name: case for case in KERNEL_CASES}
ops = pytest.mark.parametrize("op", OPS)
# where the time of a program is the same for any tile, tiles are large
TILE = VectorConfig(512, 4) if INTERPRETED else VectorConfig(128, 4)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, TILE, rows=2)


def choose(monkeypatch: pytest.MonkeyPatch, tile: VectorConfig, rows: int) -> None:
    march = MarchConfig(rows, tile.block_v, tile.num_warps)
    monkeypatch.setattr(pooling_triton, "vector_config", lambda *problem: tile)
    monkeypatch.setattr(pooling_triton, "march_config", lambda *problem: march)


def arguments(case: PoolingCase, op: str) -> list[Any]:
    norm: list[Any] = [case.norm] * (op != "max_pool2d")
    return norm + [case.window] * (op != "local_response_norm")


def run(case: PoolingCase, op: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and the gradient of x by the kernels."""
    y, saved = getattr(pooling_triton, op)(x, *arguments(case, op), True)
    of = tuple(x.shape) if op in ("max_pool2d", "max_pool2d_lrn") else x
    dx = getattr(pooling_triton, f"{op}_backward")(dy, of, *saved, *arguments(case, op))
    return [y, dx]


def check(case: PoolingCase, op: str, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The results, each as near to fp64 as PyTorch's in the dtype of x."""
    got = run(case, op, x, dy)
    want = case.plain(op, x.double(), dy.double())
    baseline = case.plain(op, x, dy)
    for name, ours, exact, theirs in zip(("y", "dx"), got, want, baseline, strict=True):
        _, c, h, w = ours.shape
        assert ours.stride() == (h * w * c, 1, w * c, c), name
        assert_within(name, ours, exact, theirs, slack=2.0 if name == "y" else 3.0)
    return got


@pytest.mark.usefixtures("nan_filled_empty")
@ops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_output_and_gradient(
    case: PoolingCase, op: str, dtype: torch.dtype, device: torch.device
) -> None:
    check(case, op, *case.tensors(op, dtype, device))


@pytest.mark.usefixtures("nan_filled_empty")
@ops
def test_inference_gives_the_same_and_keeps_nothing(op: str, device: torch.device) -> None:
    case = BY_NAME["odd-map"]
    x, dy = case.tensors(op, torch.float32, device)
    y, saved = getattr(pooling_triton, op)(x, *arguments(case, op), False)
    assert saved == []
    assert torch.equal(y, run(case, op, x, dy)[0])


@ops
@pytest.mark.parametrize(
    ("tile", "rows"),
    [(VectorConfig(64, 1), 1), (VectorConfig(1024, 8), 9)],
    ids=["short", "one-strip"],
)
def test_tiles_change_nothing(
    op: str, tile: VectorConfig, rows: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = PoolingCase("", (2, 8, 7, 8), Window(3, 2, 1, True))
    x, dy = case.tensors(op, torch.float32, device)
    want = run(case, op, x, dy)
    choose(monkeypatch, tile, rows)
    for ours, other in zip(run(case, op, x, dy), want, strict=True):
        assert torch.equal(ours, other)


@ops
def test_one_launch_a_direction(op: str, device: torch.device) -> None:
    case = BY_NAME["stride-1"]
    x, dy = case.tensors(op, torch.float32, device)
    with record_launches() as launches:
        run(case, op, x, dy)
    name = {"local_response_norm": "lrn"}.get(op, op.replace("2d", ""))
    assert [x.kernel for x in launches] == [f"_{name}_fwd_kernel", f"_{name}_bwd_kernel"]


def special_values(device: torch.device) -> Tensor:
    """[1, 8, 6, 6]: ties, NaN alone and in pairs, -inf alone and filling a window, +inf."""
    x = torch.randint(0, 3, (1, 8, 6, 6), generator=torch.Generator().manual_seed(3)).float()
    x[0, 0] = 1.0
    x[0, 1, 2, 2] = math.nan
    x[0, 2, 1, 1] = x[0, 2, 2, 3] = x[0, 2, 2, 2] = math.nan
    x[0, 3] = -math.inf
    x[0, 4, :5, :5] = -math.inf
    x[0, 5, 0, 0] = math.inf
    x[0, 6] -= 5
    return x.to(device).contiguous(memory_format=torch.channels_last)


def pool_by_torch(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Maximum and winning tap."""
    sizes = window.kernel, window.stride, window.padding, 1, window.ceil_mode
    y, flat = torch.nn.functional.max_pool2d(x, *sizes, return_indices=True)
    height, width = y.shape[2:]
    row = torch.arange(height, device=x.device)[:, None] * window.stride - window.padding
    column = torch.arange(width, device=x.device)[None, :] * window.stride - window.padding
    side = x.shape[3]
    return y, (flat // side - row) * window.kernel + (flat % side - column)


WINDOWS = [
    Window(3, 1, 1),
    Window(3, 2, 1, True),
    Window(3, 2),
    Window(2, 2, 1),
    Window(2, 1),
    Window(2, 3),
    Window(1, 2),
]


# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("window", "dtype"),
    [*((window, torch.float32) for window in WINDOWS), *((WINDOWS[1], t) for t in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("op", [op for op in OPS if op != "local_response_norm"])
def test_winners_follow_torch_with_ties_nan_and_infinity(
    op: str, window: Window, dtype: torch.dtype, device: torch.device
) -> None:
    # a norm that changes no finite number, and makes infinity NaN
    case = PoolingCase("", (1, 8, 6, 6), window, (1, 0.0, 0.75, 1.0))
    x = special_values(device).to(dtype)
    y, saved = getattr(pooling_triton, op)(x, *arguments(case, op), True)
    pooled = case.call(reference, "local_response_norm")(x) if op == "lrn_max_pool2d" else x
    want, tap = pool_by_torch(pooled, window)
    assert torch.equal(saved[-1].long(), tap)
    if op == "max_pool2d_lrn":
        torch.testing.assert_close(saved[0], want, rtol=0, atol=0, equal_nan=True)
        want = case.call(reference, "local_response_norm")(want)
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_windows_that_a_norm_makes_infinite(device: torch.device) -> None:
    """A negative power: every normalised value is -inf, the first tap inside the map wins."""
    case = PoolingCase("", (1, 8, 5, 6), Window(3, 2, 1), (1, 1.0, -1.0, 1.0))
    x = torch.full(case.shape, -3e38, device=device).contiguous(memory_format=torch.channels_last)
    y, (index,) = pooling_triton.lrn_max_pool2d(x, *arguments(case, "lrn_max_pool2d"), True)
    want, tap = pool_by_torch(torch.full_like(x, -math.inf), case.window)
    assert torch.equal(y, want)
    assert torch.equal(index.long(), tap)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@ops
@pytest.mark.parametrize("k", [0.0, 1.0])
def test_not_a_number_spreads_as_in_torch(op: str, k: float, device: torch.device) -> None:
    """NaN, infinity, and with k = 0 silent channels, divided by a power of 0."""
    case = PoolingCase("", (1, 13, 6, 6), Window(3, 2, 1), (5, 0.5, 0.75, k))
    x, dy = case.tensors(op, torch.float32, device)
    x[0, 2, 0, 0] = math.nan
    x[0, 11, 1, 3] = math.inf
    x[0, 12, 4, 4] = -math.inf
    x[0, 7:, 5, 5] = 0
    x[0, 9, 5, 5] = 2
    got, want = run(case, op, x, dy), case.plain(op, x, dy)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("nan_filled_empty")
@ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_input_and_gradient_strides(op: str, layout: str, device: torch.device) -> None:
    case = PoolingCase("", (2, 24, 4, 5), Window(2, 2, 1))
    x, dy = case.tensors(op, torch.float32, device)
    want = run(case, op, x, dy)
    if layout == "nchw":
        x, dy = x.contiguous(), dy.contiguous()
    elif layout == "expanded":
        dy = dy[:1, :, :1, :1].expand(dy.shape)
        want = run(case, op, x, dy.contiguous())
    else:
        x, dy = (slice_of_wider(t, layout) for t in (x, dy))
    for ours, dense in zip(run(case, op, x, dy), want, strict=True):
        assert torch.equal(ours, dense)


@pytest.mark.parametrize("op", ["max_pool2d_lrn", "lrn_max_pool2d", "local_response_norm"])
def test_pixels_beyond_two_to_the_31_elements(op: str, device: torch.device) -> None:
    """x as a slice of a tensor so large that element offsets of late pixels leave int32."""
    stride, pixels = 2**22, 2**9 + 8
    storage = torch.empty(stride * pixels, dtype=torch.float16, device=device)
    x = storage.as_strided(
        (1, 8, 8, pixels // 8), (stride * pixels, 1, stride * (pixels // 8), stride)
    )
    case = PoolingCase("", tuple(x.shape), Window(3, 2, 1))
    dense, dy = case.tensors(op, torch.float16, device)
    x.copy_(dense)
    for ours, want in zip(run(case, op, x, dy), run(case, op, dense, dy), strict=True):
        assert torch.equal(ours, want)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize(
    ("beta", "k"), [(0.0, 1.0), (0.0, 0.0), (1.0, -30.0), (1.0, 1.0), (0.5, 1.0)]
)
def test_powers_that_need_no_logarithm(beta: float, k: float, device: torch.device) -> None:
    """Infinite windows, windows of zeros, sums below 0."""
    values = [math.inf, 1.0, 2.0, 0.0, 0.0, 0.0, -3.0, 1e9]
    x = torch.tensor(values, device=device).reshape(1, 8, 1, 1).requires_grad_()
    results = []
    for library, backend in ((functional, "triton"), (reference, "torch")):
        with fi.backend(backend):
            y = library.local_response_norm(x, 1, 0.5, beta, k)
        results.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    (y, dx), (want, want_dx) = results
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-6, atol=1e-9)
    # with beta = 0 torch multiplies infinity by 0 in the gradient of the infinite one
    first = 1 if beta == 0 else 0
    torch.testing.assert_close(
        dx[:, first:], want_dx[:, first:], equal_nan=True, rtol=1e-6, atol=1e-9
    )


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("beta", [2.0, 3.0, -1.0, 0.6])
def test_whole_powers_of_sums_below_zero(beta: float, device: torch.device) -> None:
    """They are numbers; of others torch has none either."""
    x = torch.linspace(-3, 3, 16, device=device).reshape(1, 8, 1, 2).requires_grad_()
    found = []
    for library, backend in ((functional, "triton"), (reference, "torch")):
        with fi.backend(backend):
            y = library.local_response_norm(x, 3, 0.5, beta, -1.0)
        found.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    torch.testing.assert_close(*found, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert found[0][0].isnan().any() == (beta == 0.6)

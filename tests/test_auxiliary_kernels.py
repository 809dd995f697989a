"""Pool and convolution of an auxiliary classifier through the launchers, against fp64."""

import math

import pytest
import torch
from torch import Tensor

from fused_inception.launches import record_launches
from fused_inception.ops import avg_pool_project_triton
from fused_inception.tuning.configs import AvgPoolProjectConfig, Tile, WgradJob
from tests.auxiliary_cases import AUXILIARY_CASES, BY_NAME, AuxiliaryCase
from tests.cases import LAYOUTS, slice_of_wider
from tests.tolerances import assert_within

# every case in fp32, what differs between types in each
TYPED = ("paper", "odd-widths", "images-of-225", "channels-beyond-a-tile", "adaptive-uneven")
PROBLEMS = [
    *((case, torch.float32) for case in AUXILIARY_CASES),
    *((BY_NAME[name], dtype) for name in TYPED for dtype in (torch.float16, torch.bfloat16)),
]
ALL = [True, True, True]
NAMES = ("dx", "dw", "db")


def run(
    case: AuxiliaryCase, inputs: list[Tensor], dy: Tensor, needs: list[bool] = ALL
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the pooled map and the gradients of x, weight, bias by the kernels."""
    x, weight, bias = inputs
    y, (pooled,) = avg_pool_project_triton.forward(x, weight, bias, case.window, True)
    gradients = avg_pool_project_triton.backward(
        dy, y, pooled, weight, bias, tuple(x.shape), case.window, needs
    )
    return y, pooled, gradients


def plain_gradients(case: AuxiliaryCase, inputs: list[Tensor], dz: Tensor) -> list[Tensor]:
    """By torch, of what stands in front of the ReLU: no gate flips with the rounding of y."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    return list(torch.autograd.grad(case.linear(*leaves), leaves, dz))


def check(case: AuxiliaryCase, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The results, each as near to fp64 as PyTorch's in the dtype of x."""
    y, pooled, gradients = run(case, inputs, dy)
    x = inputs[0]
    _, c, h, w = x.shape
    exact = [t.double() for t in inputs]
    assert_within("y", y, case.linear(*exact).relu(), case.linear(*inputs).relu())
    assert_within("pooled", pooled[:, :c], case.pool(x.double()), case.pool(x))
    dz = torch.where(y > 0, dy, 0)
    want = plain_gradients(case, exact, dz.double())
    baseline = plain_gradients(case, inputs, dz)
    for name, ours, good, theirs in zip(NAMES, gradients, want, baseline, strict=True):
        assert_within(name, ours, good, theirs, slack=3.0)
    assert y.is_contiguous()
    assert gradients[0].stride() == (h * w * c, 1, w * c, c)
    return [y, *gradients]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("case", "dtype"), PROBLEMS, ids=[f"{case.name}-{dtype}" for case, dtype in PROBLEMS]
)
def test_output_and_gradients(
    case: AuxiliaryCase, dtype: torch.dtype, device: torch.device
) -> None:
    check(case, *case.tensors(dtype, device))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("name", ["images-of-299", "adaptive-uneven"])
def test_small_tiles(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, steps and splits of everything; the same bits in a second run."""
    tile = Tile(16, 16, 16)
    config = AvgPoolProjectConfig(tile, 3, WgradJob(tile, 2), tile, 64, 4, 4)
    monkeypatch.setattr(avg_pool_project_triton, "avg_pool_project_config", lambda *p: config)
    case = AuxiliaryCase("", (2, 24, 9, 8), 24, BY_NAME[name].window)
    inputs, dy = case.tensors(torch.float32, device)
    first, second = check(case, inputs, dy), check(case, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("need", range(3), ids=NAMES)
def test_each_gradient_alone(need: int, device: torch.device) -> None:
    """The same as together; what is frozen costs no launch and no memory."""
    case = BY_NAME["paper"]
    inputs, dy = case.tensors(torch.float32, device)
    _, _, together = run(case, inputs, dy)
    with record_launches() as launches:
        _, _, alone = run(case, inputs, dy, [i == need for i in range(3)])
    for i, gradient in enumerate(alone):
        assert torch.equal(gradient, together[i]) if i == need else not gradient.numel()
    names = [launch.kernel for launch in launches]
    forward = ["_pack_kernel", "_avg_pool_project_fwd_kernel"]
    pack, finish = ["_pack_kernel"] * (need == 0), ["_finish_kernel"] * (need > 0)
    assert names == [*forward, *pack, "_avg_pool_project_bwd_kernel", *finish]


@pytest.mark.usefixtures("nan_filled_empty")
def test_inference_gives_the_same_and_keeps_nothing(device: torch.device) -> None:
    case = BY_NAME["odd-widths"]
    inputs, dy = case.tensors(torch.float32, device)
    with torch.no_grad():
        y, saved = avg_pool_project_triton.forward(*inputs, case.window, False)
    assert saved == []
    assert torch.equal(y, run(case, inputs, dy)[0])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", ["paper", "adaptive-uneven", "more-windows-than-a-tile"])
def test_not_a_number_spreads_as_in_torch(name: str, device: torch.device) -> None:
    """In x to the windows around it, in dy to the pixels of its window, through open gates only."""
    case = BY_NAME[name]
    inputs, dy = case.tensors(torch.float32, device)
    x = inputs[0]
    x[0, 3, 4, 5], x[0, 1, 0, 0] = math.nan, math.inf
    y, _, _ = run(case, inputs, dy)
    want = case.linear(*inputs).relu()
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    x[0, 3, 4, 5] = x[0, 1, 0, 0] = 0
    y, _, _ = run(case, inputs, dy)
    open_, closed = (mask[0].nonzero()[:, 0] for mask in (y > 0, y <= 0))
    dy[0, open_[0]], dy[0, open_[-1]], dy[0, closed[0]] = math.nan, math.inf, math.nan
    _, _, gradients = run(case, inputs, dy)
    dz = torch.where(y > 0, dy, 0)
    for ours, theirs in zip(gradients, plain_gradients(case, inputs, dz), strict=True):
        assert not ours.isfinite().all()
        assert torch.equal(ours.isfinite(), theirs.isfinite())
        finite = ours.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, device: torch.device) -> None:
    case = AuxiliaryCase("", (2, 24, 6, 7), 8, BY_NAME["paper"].window)
    (x, *parameters), dy = case.tensors(torch.float32, device)
    if layout == "expanded":
        dy = dy[:1, :1].expand(dy.shape)
    y, _, want = run(case, [x, *parameters], dy.contiguous())
    if layout == "nchw":
        x, dy = x.contiguous(), dy.t().contiguous().t()
    elif layout != "expanded":
        x = slice_of_wider(x, layout)
    ours, _, gradients = run(case, [x, *parameters], dy)
    assert torch.equal(ours, y)
    for a, b in zip(gradients, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_parameters_of_another_type(memory: torch.memory_format, device: torch.device) -> None:
    """Mixed precision: the filter stays fp32, and so does its gradient."""
    case = BY_NAME["odd-widths"]
    (x, weight, bias), dy = case.tensors(torch.bfloat16, device)
    weight = weight.float().contiguous(memory_format=memory)
    y, _, (dx, dw, db) = run(case, [x, weight, bias.float()], dy)
    half = run(case, [x, weight.bfloat16(), bias], dy)
    assert torch.equal(y, half[0])
    assert torch.equal(dx, half[2][0])
    assert (dw.dtype, db.dtype, dw.stride()) == (torch.float32, torch.float32, weight.stride())
    assert torch.equal(dw.bfloat16(), half[2][1])


def test_pixels_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """x as a slice of a tensor so large that element offsets of late pixels leave int32."""
    stride, width = 2**22, 2**6 + 1
    storage = torch.empty(stride * width * 8, dtype=torch.float16, device=device)
    strides = (stride * width * 8, 1, stride * width, stride)
    x = storage.as_strided((1, 8, 8, width), strides)
    case = AuxiliaryCase("", (1, 8, 8, width), 8, BY_NAME["paper"].window)
    (dense, *parameters), dy = case.tensors(torch.float16, device)
    x.copy_(dense)
    got, want = (run(case, [t, *parameters], dy) for t in (x, dense))
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(a, b) for a, b in zip(got[2], want[2], strict=True))

"""The module's kernels through their launchers, in the interpreter or on a GPU, against fp64."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused_inception import reference
from fused_inception.geometry import InceptionDims
from fused_inception.kernels.conv import launch_branches
from fused_inception.kernels.pack import launch_pack, module_packing
from fused_inception.kernels.pointwise import launch_pointwise
from fused_inception.launches import record_launches
from fused_inception.ops import inception_triton
from fused_inception.ops.problem import problem_of
from fused_inception.tuning import chosen, heuristic
from fused_inception.tuning.configs import BranchesConfig, DgradConfig, PointwiseConfig, Tile
from tests import tf32
from tests.cases import INCEPTION_CASES, LAYOUTS, InceptionCase, InceptionTensors
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["y", "x", "w1", "w3r", "w3", "w5r", "w5", "wp", "b1", "b3r", "b3", "b5r", "b5", "bp"]
DIMS = InceptionDims(24, 16, 24, 32, 8, 16, 8)
EIGHTS = InceptionDims(8, 8, 8, 8, 8, 8, 8)
TAILS = InceptionDims(16, 8, 48, 72, 8, 8, 8)
ALL = [True] * 13


def problem(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    dims: InceptionDims = DIMS,
    batch: int = 2,
    height: int = 4,
    width: int = 5,
) -> InceptionTensors:
    return InceptionCase("", dims, batch, height, width).tensors(dtype, device)


def far_from_gates(p: InceptionTensors) -> InceptionTensors:
    """With biases that no rounding of a product outweighs: every other channel is closed."""
    scale = [6.0, 6.0, 60.0, 6.0, 60.0, 6.0]
    signs = [1 - 2 * (torch.arange(len(b), device=b.device) % 2) for b in p.biases]
    biases = [(k * sign).to(b) for k, sign, b in zip(scale, signs, p.biases, strict=True)]
    return p._replace(biases=biases)


def run(p: InceptionTensors, needs: list[bool] = ALL) -> list[Tensor]:
    """y and the gradients by the kernels."""
    y, saved = inception_triton.forward(p.x, p.filters, p.biases, True)
    dtypes = [b.dtype for b in p.biases]
    return [y, *inception_triton.backward(p.dy, p.x, saved, p.filters, dtypes, needs)]


def plain(p: InceptionTensors) -> list[Tensor]:
    """y and the gradients by PyTorch's own operators and autograd."""
    leaves = [t.detach().requires_grad_() for t in (p.x, *p.filters, *p.biases)]
    interleaved = [t for pair in zip(leaves[1:7], leaves[7:], strict=True) for t in pair]
    y = reference.inception(leaves[0], *interleaved)
    return [y.detach(), *torch.autograd.grad(y, leaves, p.dy)]


def check(p: InceptionTensors, got: list[Tensor], baseline: list[Tensor] | None = None) -> None:
    """Each result as near to fp64 as PyTorch's in the dtype of x, and in its parameter's dtype."""
    want, baseline = plain(p.to(torch.float64)), baseline or plain(p.to(p.x.dtype))
    like = [p.dy, p.x, *p.filters, *p.biases]
    for name, ours, exact, theirs, source in zip(NAMES, got, want, baseline, like, strict=True):
        assert ours.dtype == source.dtype, name
        slack = 2.0 if name == "y" else 3.0
        assert_within(name, ours.to(theirs.dtype), exact, theirs, slack=slack)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INCEPTION_CASES, ids=lambda case: case.name)
def test_output_and_all_gradients(
    case: InceptionCase, dtype: torch.dtype, device: torch.device
) -> None:
    p = case.tensors(dtype, device)
    check(p, run(p))


@pytest.mark.usefixtures("nan_filled_empty")
def test_tf32_is_used_only_where_torch_allows_it(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU its products are as near to fp64 as those of operands cut to TF32."""
    p = far_from_gates(problem(device, height=9, width=11))
    with tf32.Products():
        cut = plain(p)
    for allow in (True, False):
        with monkeypatch.context() as patch, record_launches() as launches:
            patch.setattr(torch.backends.cudnn, "allow_tf32", allow)
            got = run(p)
        precisions = {x.config["PRECISION"] for x in launches if "PRECISION" in x.config}
        assert precisions == {"tf32" if allow else "ieee"}
        check(p, got, cut if allow else None)
    # a yardstick of its own: IEEE is a hundred times nearer, bf16 is out of its reach
    check(p, cut, cut)
    with pytest.raises(AssertionError, match="allowed"):
        check(p, cut)
    with pytest.raises(AssertionError, match="allowed"):
        check(p, [t.float() for t in plain(p.to(torch.bfloat16))], cut)


@pytest.mark.usefixtures("nan_filled_empty")
def test_filters_in_channels_last_memory(device: torch.device) -> None:
    p = problem(device)
    last = torch.channels_last
    p = p._replace(filters=[w.contiguous(memory_format=last) for w in p.filters])
    got = run(p)
    check(p, got)
    for gradient, weight in zip(got[2:8], p.filters, strict=True):
        assert gradient.stride() == weight.stride()


@pytest.mark.usefixtures("nan_filled_empty")
def test_filters_in_their_own_dtype(device: torch.device) -> None:
    """Mixed precision: 16-bit activations, fp32 parameters, gradients in fp32."""
    p = problem(device, torch.bfloat16)
    full = [w.float() for w in p.filters], [b.float() for b in p.biases]
    p = p._replace(filters=full[0], biases=full[1])
    check(p, run(p))


def test_empty_batch(device: torch.device) -> None:
    p = problem(device, batch=0)
    y, dx, *gradients = run(p)
    assert y.shape == (0, DIMS.out_channels, 4, 5)
    assert dx.shape == p.x.shape
    assert all(not g.any() for g in gradients)


def test_runs_are_bitwise_repeatable(device: torch.device) -> None:
    p = problem(device, height=12, width=13)
    for first, second in zip(run(p), run(p), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("position", range(13), ids=NAMES[1:])
def test_each_gradient_alone(position: int, device: torch.device) -> None:
    """What is not needed comes back empty, what is needed comes back the same."""
    p = problem(device)
    everything = run(p)[1:]
    needs = [i == position for i in range(13)]
    with record_launches() as some:
        got = run(p, needs)[1:]
    for i, (ours, full) in enumerate(zip(got, everything, strict=True)):
        if i == position:
            assert torch.equal(ours, full)
        else:
            assert ours.numel() == 0
    kernels = {x.kernel for x in some}
    # launches L2 and L3 are one kernel
    gradients = [x.config for x in some if x.kernel == "_gradients_kernel"]
    assert [x["INPUT"] for x in gradients] == ([position == 0] if position <= 6 else [])
    assert [x["FILTERS"] for x in gradients] == ([position > 0] if position <= 6 else [])
    assert ("_finish_kernel" in kernels) == (position > 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_launches_of_a_module(training: bool, device: torch.device) -> None:
    p = problem(device)
    with record_launches() as forward:
        _, saved = inception_triton.forward(p.x, p.filters, p.biases, training)
    names = [x.kernel for x in forward]
    assert names.count("_pack_kernel") == 1
    assert len(names) - 1 <= 3
    if training:
        with record_launches() as backward:
            inception_triton.backward(p.dy, p.x, saved, p.filters, [torch.float32] * 6, ALL)
        names = [x.kernel for x in backward]
        assert names.count("_pack_kernel") == 1
        assert len(names) - 1 == 4
    else:
        assert saved == []


def test_inference_makes_nothing_for_a_backward(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither indices, a byte a pooled element, nor bits of the output."""
    made = []
    monkeypatch.setattr(inception_triton, "saved_like", lambda *args: made.append(args))
    p = problem(device)
    y, saved = inception_triton.forward(p.x, p.filters, p.biases, False)
    assert saved == made == []
    assert_within("y", y, plain(p.to(torch.float64))[0], plain(p)[0])


@pytest.mark.usefixtures("nan_filled_empty")
def test_slices_end_where_they_should(device: torch.device) -> None:
    """Each launch fills its slices of the concatenation and of the mask, and nothing beside
    them."""
    dims, n, height, width = InceptionDims(13, 7, 11, 17, 5, 3, 19), 2, 3, 7
    p = problem(device, torch.float32, dims, n, height, width)
    ops, target, pixels = problem_of(p.x)
    ((w, b),) = launch_pack([module_packing(dims)], p.filters, p.biases, torch.float32)
    x = inception_triton.for_kernels(p.x)
    y = torch.full((n, height, width, dims.out_channels), math.nan, device=device)
    y = y.permute(0, 3, 1, 2)
    r, index, mask = inception_triton.saved_like(p.x, dims)
    mask.fill_(170)
    launch_pointwise(
        dims, x, w, b, y, r, index, mask,
        heuristic.pointwise_config(dims, pixels, ops, target, True),
        save=True, precision="ieee",
    )  # fmt: skip
    o1, o3, _o5, op = dims.offsets
    _s1, s3, _s5, sp = dims.slots
    assert not y[:, o1:o3].isnan().any()
    assert y[:, o3:op].isnan().all()
    assert not y[:, op:].isnan().any()
    assert (mask[:, s3 // 8 : sp // 8] == 170).all()
    pointwise = y.clone()
    launch_branches(
        dims, r, w, b, y, mask,
        heuristic.branches_config(dims, pixels, ops, target),
        save=True, precision="ieee",
    )  # fmt: skip
    assert torch.equal(y[:, :o3], pointwise[:, :o3])
    assert torch.equal(y[:, op:], pointwise[:, op:])
    assert not y.isnan().any()


@pytest.mark.parametrize(
    "config",
    [
        PointwiseConfig(Tile(16, 32, 16), 16, Tile(32, 16, 16), True, 4, 2, 4),
        PointwiseConfig(Tile(64, 16, 32), 0, Tile(16, 64, 32), False, 4, 3, 4),
        PointwiseConfig(Tile(32, 64, 64), 32, Tile(64, 32, 16), False, 8, 1, 8),
    ],
    ids=["tail-16-together", "uniform-apart", "tail-32-apart"],
)
def test_pointwise_tilings(config: PointwiseConfig, device: torch.device) -> None:
    """Every way to cover the width gives the same result: mixed tiles, pool inside or behind."""
    dims = InceptionDims(24, 40, 24, 16, 16, 16, 24)
    p = problem(device, torch.float32, dims, 1, 5, 7)
    ((w, b),) = launch_pack([module_packing(dims)], p.filters, p.biases, torch.float32)
    y = torch.full((1, 5, 7, dims.out_channels), math.nan, device=device).permute(0, 3, 1, 2)
    r, index, mask = inception_triton.saved_like(p.x, dims)
    launch_pointwise(dims, p.x, w, b, y, r, index, mask, config, save=True, precision="ieee")
    tiles = BranchesConfig(Tile(16, 16, 16), 0, Tile(32, 16, 32), 4, 2)
    launch_branches(dims, r, w, b, y, mask, tiles, save=True, precision="ieee")
    want, baseline = plain(p.to(torch.float64))[0], plain(p)[0]
    assert_within("y", y, want, baseline)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dims", [TAILS, replace(TAILS, ch3x3=24, ch3x3red=16)], ids=str)
def test_a_narrow_tail_behind_wide_tiles_of_the_3x3(
    dims: InceptionDims, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide tiles and one tail, where the tail is full, cut, and the last channels' own."""
    wide, other = Tile(32, 32, 16), Tile(32, 16, 16)
    branches = BranchesConfig(wide, 16, other, 4, 2)
    dgrad = DgradConfig(wide, 16, other, other, 4, 2)
    monkeypatch.setattr(chosen, "branches_config", lambda *_: branches)
    monkeypatch.setattr(chosen, "dgrad_config", lambda *_: dgrad)
    p = problem(device, torch.float32, dims, 1, 5, 7)
    check(p, run(p))


def special_values(device: torch.device) -> Tensor:
    """[1, 8, 6, 6]: ties, NaN alone and in pairs, -inf alone and filling a window, +inf."""
    x = torch.randint(0, 3, (1, 8, 6, 6), generator=torch.Generator().manual_seed(3)).float()
    x[0, 0] = 1.0
    x[0, 1, 2, 2] = math.nan
    x[0, 2, 1, 1] = x[0, 2, 2, 3] = math.nan
    x[0, 3] = -math.inf
    x[0, 4, :4, :4] = -math.inf
    x[0, 5, 0, 0] = math.inf
    return x.to(device).contiguous(memory_format=torch.channels_last)


# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pooling_follows_torch_with_ties_nan_and_infinity(device: torch.device) -> None:
    x = special_values(device)
    p = problem(device, torch.float32, EIGHTS, 1, 6, 6)
    _, (_, index, _) = inception_triton.forward(x, p.filters, p.biases, True)
    _, flat = torch.nn.functional.max_pool2d(x, 3, 1, 1, return_indices=True)
    row = torch.arange(6, device=device)[:, None]
    column = torch.arange(6, device=device)[None, :]
    tap = (flat // 6 - row + 1) * 3 + (flat % 6 - column + 1)
    assert torch.equal(index.long(), tap)
    # the projection of the pooled map, so its NaN too, is the same where no index is kept
    for training in (True, False):
        y, _ = inception_triton.forward(x, p.filters, p.biases, training)
        assert torch.equal(y.isnan(), plain(p._replace(x=x))[0].isnan())


def test_nan_passes_relu_forward_and_backward(device: torch.device) -> None:
    """A NaN output lets its gradient through; a closed gate stops even a NaN gradient."""
    p = problem(device, torch.float32, EIGHTS, 1, 4, 4)
    biases = [b.clone() for b in p.biases]
    biases[0][:4] = math.nan  # output NaN
    biases[0][4:] = -1e6  # output 0
    dy = p.dy.clone()
    dy[:, 4:8] = math.nan
    y, saved = inception_triton.forward(p.x, p.filters, biases, True)
    assert y[:, :4].isnan().all()
    assert not y[:, 4:8].any()
    gradients = inception_triton.backward(dy, p.x, saved, p.filters, [torch.float32] * 6, ALL)
    db1 = gradients[7]
    torch.testing.assert_close(db1[:4], dy[:, :4].sum((0, 2, 3)))
    assert not db1[4:].any()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_infinity_does_not_turn_to_nan_in_padding(device: torch.device) -> None:
    """Widths that are no multiple of 8 are padded with zero filters; infinity times zero is NaN."""
    p = problem(device, torch.float32, InceptionDims(8, 7, 11, 17, 5, 3, 19), 1, 3, 7)
    p = p._replace(filters=[w.abs() for w in p.filters], biases=[b.abs() for b in p.biases])
    p.x[0, 2, 1, 3] = math.inf
    p.dy[0, :, 0, 1] = math.inf
    y, dx, *_ = run(p)
    want_y, want_dx, *_ = plain(p)
    assert torch.equal(y.isinf(), want_y.isinf())
    assert not y.isnan().any()
    assert torch.equal(dx.isnan(), want_dx.isnan())
    assert torch.equal(dx.isinf(), want_dx.isinf())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_input_and_gradient_strides(layout: str, device: torch.device) -> None:
    p = problem(device).laid_out(layout)
    check(p, run(p))


def test_pixels_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """x as a slice of a tensor so large that element offsets of late pixels leave int32."""
    stride, pixels = 2**22, 2**9 + 8
    # narrow: of wide rows offsets that are masked would overflow, those of taps beyond the filter
    height, width = pixels // 8, 8
    storage = torch.empty(stride * pixels, dtype=torch.float16, device=device)
    x = storage.as_strided((1, 8, height, width), (stride * pixels, 1, stride * width, stride))
    dims = replace(EIGHTS, kernel_5x5=3)
    p = problem(device, torch.float16, dims, 1, height, width)
    x.copy_(p.x)
    q = p._replace(x=x)
    dense = run(p)
    for ours, want in zip(run(q), dense, strict=True):
        assert torch.equal(ours, want)


@pytest.mark.parametrize(
    ("setting", "value", "precision"),
    [
        ("cudnn.allow_tf32", True, "tf32"),
        ("cudnn.allow_tf32", False, "ieee"),
        ("cudnn.conv.fp32_precision", "tf32", "tf32"),
        ("cudnn.conv.fp32_precision", "ieee", "ieee"),
        # of recurrent networks: convolutions stay as they are
        ("cudnn.rnn.fp32_precision", "ieee", "tf32"),
    ],
)
@pytest.mark.usefixtures("launches_do_nothing")
def test_every_way_of_pytorch_to_allow_tf32(
    setting: str, value: object, precision: str, device: torch.device
) -> None:
    """The newer settings make the older one raise where somebody reads it."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32
    cudnn.allow_tf32 = True
    *path, name = setting.split(".")
    setattr(functools.reduce(getattr, path, torch.backends), name, value)
    try:
        with record_launches() as launches:
            run(problem(device, height=3, width=3))
    finally:
        # setting the older one sets them all
        cudnn.allow_tf32 = before
    precisions = {x.config["PRECISION"] for x in launches if "PRECISION" in x.config}
    assert precisions == {precision}

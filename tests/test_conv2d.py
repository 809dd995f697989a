"""One convolution with bias and ReLU: kernels against fp64, and the operator around them."""

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception import functional, geometry, reference
from fused_inception.ops import conv2d as ops
from fused_inception.ops import conv2d_bn_triton, conv2d_triton
from fused_inception.tuning.configs import ConvConfig, Tile, WgradJob
from tests import test_batch_norm_kernels as norms
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# C_in, C_out, kernel, stride, padding, N, H, W
CASES = {
    "first-layer": (3, 64, 7, 2, 3, 1, 19, 16),
    "image-odd-widths": (1, 5, 3, 1, 0, 2, 6, 7),
    "image-4-channels-even-filter": (4, 8, 4, 3, 1, 2, 9, 8),
    "image-smaller-than-filter": (3, 16, 7, 2, 3, 2, 2, 3),
    "1x1": (64, 64, 1, 1, 0, 2, 5, 6),
    "1x1-odd-widths": (13, 7, 1, 1, 0, 2, 3, 5),
    "3x3": (16, 72, 3, 1, 1, 2, 5, 13),
    "3x3-33-filters": (9, 33, 3, 1, 1, 1, 5, 4),
    "5x5-odd-widths": (9, 17, 5, 1, 2, 1, 4, 4),
    "empty-batch": (16, 8, 3, 1, 1, 0, 5, 5),
}


def data(name: str, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x, weight, bias] and the gradient of the output."""
    c_in, c_out, k, stride, padding, n, height, width = CASES[name]
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(n, c_in, height, width, generator=draw)
    weight = torch.randn(c_out, c_in, k, k, generator=draw) * (2 / (c_in * k * k)) ** 0.5
    bias = torch.randn(c_out, generator=draw) * 0.1
    dy = torch.randn(reference.conv2d_relu(x, weight, bias, stride, padding).shape, generator=draw)
    return [t.to(device, dtype) for t in (x, weight, bias)], dy.to(device, dtype)


def results(function, inputs: list[Tensor], dy: Tensor, *options: int) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, *options)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check(
    inputs: list[Tensor],
    dy: Tensor,
    got: list[Tensor],
    *options: int,
    yardstick=reference.conv2d_relu,
) -> None:
    want = results(reference.conv2d_relu, [t.double() for t in inputs], dy.double(), *options)
    dtype = inputs[0].dtype
    baseline = results(yardstick, [t.to(dtype) for t in inputs], dy, *options)
    for name, ours, exact, theirs in zip(("y", "dx", "dw", "db"), got, want, baseline, strict=True):
        slack = 2.0 if name == "y" else 3.0
        assert_within(name, ours.to(theirs.dtype), exact, theirs, slack=slack)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, dy = data(name, dtype, device)
    options = CASES[name][3:5]
    with fi.backend("triton"), fi.record_launches() as launches:
        got = results(functional.conv2d_relu, inputs, dy, *options)
    assert bool(launches) == (dy.numel() > 0) or name == "empty-batch"
    check(inputs, dy, got, *options)
    _, c, h, w = got[0].shape
    assert got[0].stride() == (h * w * c, 1, w * c, c)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_conv1_reads_a_packed_image_where_pixels_are_many(
    channels: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in inference, images of any strides and dtype, 33 filters."""
    monkeypatch.setattr(geometry, "MANY_PIXELS", 0)
    inputs, dy = data("first-layer", dtype, device)
    inputs = [inputs[0][:, :channels].flip(3), inputs[1][:33, :channels], inputs[2][:33]]
    dy = dy[:, :33]
    with fi.backend("triton"), fi.record_launches() as launches:
        got = results(functional.conv2d_relu, inputs, dy, 2, 3)
    check(inputs, dy, got, 2, 3)
    kernels = [launch.kernel for launch in launches]
    assert kernels[:2] == ["_stem_pack_kernel", "_stem_conv_fwd_kernel"]
    assert kernels[-3:] == ["_image_conv_wgrad_kernel", "_finish_kernel", "_finish_kernel"]
    with fi.backend("triton"), torch.no_grad():
        assert torch.equal(functional.conv2d_relu(*inputs, 2, 3), got[0])


@pytest.mark.usefixtures("nan_filled_empty")
def test_a_narrower_last_tile_of_filters(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 columns, 32 and 16, for 33 filters; with a bias, and ahead of a BatchNorm."""
    job = WgradJob(Tile(32, 32, 32), 1)
    config = ConvConfig(Tile(16, 32, 16), 16, Tile(16, 16, 16), job, 4, 2)
    for script in (conv2d_triton, conv2d_bn_triton):
        monkeypatch.setattr(script, "conv_config", lambda *_, **__: config)
    inputs, dy = data("3x3-33-filters", torch.float32, device)
    with fi.backend("triton"), fi.record_launches() as launches:
        check(inputs, dy, results(functional.conv2d_relu, inputs, dy, 1, 1), 1, 1)
    tiles = [x.config for x in launches if x.kernel == "_conv2d_fwd_kernel"]
    assert [(x["TILES"], x["TAIL"]) for x in tiles] == [(1, 16)]
    p = norms.convolution(device, shape=(2, 9, 4, 5), c_out=33)
    norms.check(p, norms.run(p))


@pytest.mark.parametrize("name", ["first-layer", "3x3"])
@pytest.mark.parametrize("position", range(3), ids=["x", "weight", "bias"])
def test_each_gradient_alone(name: str, position: int, device: torch.device) -> None:
    """What is frozen costs no launch, and what is not comes out the same."""
    inputs, dy = data(name, torch.float32, device)
    options = CASES[name][3:5]
    with fi.backend("triton"):
        everything = results(functional.conv2d_relu, inputs, dy, *options)[1:]
        leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(inputs)]
        y = functional.conv2d_relu(*leaves, *options)
    with fi.record_launches() as launches:
        y.backward(dy)
    torch.testing.assert_close(leaves[position].grad, everything[position], rtol=1e-5, atol=1e-5)
    kernels = [launch.kernel for launch in launches]
    assert any("dgrad" in k for k in kernels) == (position == 0)
    assert any("wgrad" in k for k in kernels) == (position == 1)


@pytest.mark.usefixtures("nan_filled_empty")
def test_images_are_read_in_any_layout(device: torch.device) -> None:
    inputs, dy = data("image-odd-widths", torch.float32, device)
    last = inputs[0].contiguous(memory_format=torch.channels_last)
    cut = torch.nn.functional.pad(inputs[0], (1, 2, 3, 1))[:, :, 3:-1, 1:-2]
    with fi.backend("triton"):
        for x in (last, cut, inputs[0].flip(3).flip(3)):
            q = [x, *inputs[1:]]
            check(q, dy, results(functional.conv2d_relu, q, dy))


def test_pixels_beyond_two_to_the_31_elements(device: torch.device) -> None:
    """x as a slice of a tensor so large that element offsets of late pixels leave int32."""
    apart, pixels = 2**22, 2**9 + 8
    storage = torch.empty(apart * pixels, dtype=torch.float16, device=device)
    x = storage.as_strided((1, 8, 8, 65), (apart * pixels, 1, apart * 65, apart))
    draw = torch.Generator().manual_seed(3)
    x.copy_(torch.randn(x.shape, generator=draw))
    weight = torch.randn(16, 8, 3, 3, generator=draw).to(device, torch.float16)
    bias = torch.randn(16, generator=draw).to(device, torch.float16)
    dy = torch.randn(1, 16, 8, 65, generator=draw).to(device, torch.float16)
    dense = x.contiguous(memory_format=torch.channels_last)
    with fi.backend("triton"):
        got = results(functional.conv2d_relu, [x, weight, bias], dy, 1, 1)
        want = results(functional.conv2d_relu, [dense, weight, bias], dy, 1, 1)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["first-layer", "3x3"])
def test_filter_gradients_take_the_filters_strides_and_dtype(
    name: str, memory: torch.memory_format, device: torch.device
) -> None:
    """Mixed precision: the filter stays fp32 under autocast, and so does its gradient."""
    inputs, dy = data(name, torch.float32, device)
    inputs[1] = inputs[1].contiguous(memory_format=memory)
    with fi.backend("triton"), torch.autocast(device.type, torch.bfloat16):
        got = results(functional.conv2d_relu, inputs, dy.bfloat16(), *CASES[name][3:5])
    assert got[0].dtype == torch.bfloat16
    assert got[2].dtype == torch.float32
    assert got[2].stride() == inputs[1].stride()
    half = [t.bfloat16() for t in inputs]
    check(half, dy.bfloat16(), got, *CASES[name][3:5])


@pytest.mark.parametrize("name", ["image-odd-widths", "1x1-odd-widths"])
def test_operator_passes_opcheck(name: str, device: torch.device) -> None:
    inputs, dy = data(name, torch.float32, device)
    stride, padding = CASES[name][3:5]
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(ops.conv2d_relu, (*leaves, stride, padding, True))
    with torch.no_grad():
        _, saved = ops.conv2d_relu(*inputs, stride, padding, True)
    x, weight, bias = (t.detach() for t in inputs)
    torch.library.opcheck(
        ops.conv2d_relu_backward,
        (dy, x, saved, weight, bias, stride, padding, [True, True, False]),
    )


@pytest.mark.parametrize("name", ["image-odd-widths", "1x1-odd-widths"])
def test_gradcheck_in_fp64(name: str) -> None:
    inputs, _ = data(name, torch.float64, torch.device("cpu"))
    leaves = [t.requires_grad_() for t in inputs]
    options = CASES[name][3:5]
    assert torch.autograd.gradcheck(
        lambda *t: functional.conv2d_relu(*t, *options), leaves, fast_mode=True
    )


def test_double_backward_is_an_error(device: torch.device) -> None:
    inputs, _ = data("3x3", torch.float32, device)
    leaves = [t.requires_grad_() for t in inputs]
    y = functional.conv2d_relu(*leaves, 1, 1)
    (dx,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()


def test_convolutions_without_a_kernel(device: torch.device) -> None:
    x, weight, bias = (
        t.to(device) for t in (torch.randn(1, 8, 9, 9), torch.randn(8, 8, 3, 3), torch.randn(8))
    )
    want = reference.conv2d_relu(x, weight, bias, 2, 1)
    torch.testing.assert_close(functional.conv2d_relu(x, weight, bias, 2, 1), want)
    with fi.backend("triton"), pytest.raises(fi.BackendError, match="stride 2"):
        functional.conv2d_relu(x, weight, bias, 2, 1)


def test_parallel_1x1_is_one_product(device: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, 4, 5, generator=draw).to(device)
    weights = [torch.randn(c, 24, 1, 1, generator=draw).to(device) for c in (16, 9, 3)]
    biases = [torch.randn(c, generator=draw).to(device) for c in (16, 9, 3)]
    with fi.backend("triton"), fi.record_launches() as launches:
        got = functional.parallel_conv1x1_relu(x, weights, biases)
    assert [launch.kernel for launch in launches] == ["_pack_kernel", "_conv2d_fwd_kernel"]
    assert len({y.untyped_storage().data_ptr() for y in got}) == 1
    for ours, theirs in zip(got, reference.parallel_conv1x1_relu(x, weights, biases), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="got 3 and 2"):
        functional.parallel_conv1x1_relu(x, weights, biases[:2])
    with pytest.raises(ValueError, match=r"bias must be of shape \[16\], got \[3\]"):
        functional.parallel_conv1x1_relu(x, weights, biases[::-1])
    with pytest.raises(ValueError, match=r"weight must be of shape \[C_out, 24, 1, 1\]"):
        functional.parallel_conv1x1_relu(x, [w.expand(-1, -1, 3, 3) for w in weights], biases)
    with pytest.raises(TypeError, match="weight must be float32, got bfloat16"):
        functional.parallel_conv1x1_relu(x, [weights[0], weights[1].bfloat16(), weights[2]], biases)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": (8, 5, 3, 3)}, ValueError, r"weight must be of shape \[C_out, 6, K, K\]"),
        ({"weight": (8, 6, 3, 1)}, ValueError, "weight must be of shape"),
        ({"bias": (7,)}, ValueError, r"bias must be of shape \[8\]"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"dtype": torch.float64}, TypeError, "weight must be float32, got float64"),
    ],
    ids=["channels", "not-square", "bias", "stride", "padding", "dtype"],
)
def test_wrong_arguments(change: dict, error: type[Exception], message: str) -> None:
    weight = torch.randn(change.get("weight", (8, 6, 3, 3)), dtype=change.get("dtype"))
    bias = torch.randn(change.get("bias", (8,)))
    with pytest.raises(error, match=message):
        functional.conv2d_relu(
            torch.randn(1, 6, 5, 5), weight, bias, change.get("stride", 1), change.get("padding", 1)
        )

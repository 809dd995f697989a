"""The reference functions and blocks against definitions written out, and against each other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import reference
from fused_inception.geometry import InceptionDims
from tests.cases import InceptionCase
from tests.facts import MODULES

DIMS = InceptionDims(5, 2, 3, 4, 2, 3, 2)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def case(kernel_5x5: int = 5) -> InceptionCase:
    dims = InceptionDims(*DIMS.widths, kernel_5x5=kernel_5x5)
    return InceptionCase("tiny", dims, 2, 4, 3)


def conv_by_hand(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """relu(conv(x) + bias), one output number at a time."""
    images, _, height, width = x.shape
    c_out, _, side, _ = weight.shape
    padded = torch.zeros(images, x.shape[1], height + 2 * padding, width + 2 * padding).to(x)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows = range((height + 2 * padding - side) // stride + 1)
    columns = range((width + 2 * padding - side) // stride + 1)
    y = torch.empty(images, c_out, len(rows), len(columns)).to(x)
    for n, c, i, j in itertools.product(range(images), range(c_out), rows, columns):
        top, left = i * stride, j * stride
        window = padded[n, :, top : top + side, left : left + side]
        y[n, c, i, j] = max(0.0, ((window * weight[c]).sum() + bias[c]).item())
    return y


def pool_by_hand(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 1 that keeps the size."""
    height, width = x.shape[2:]
    y = torch.empty_like(x)
    for i, j in itertools.product(range(height), range(width)):
        window = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        y[:, :, i, j] = window.amax(dim=(2, 3))
    return y


def interleave(filters: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [tensor for pair in zip(filters, biases, strict=True) for tensor in pair]


@pytest.mark.parametrize("kernel_5x5", [3, 5])
def test_inception_is_its_definition(kernel_5x5: int) -> None:
    x, filters, biases, _ = case(kernel_5x5).tensors(torch.float64)

    def conv(index: int, x: Tensor) -> Tensor:
        weight = filters[index]
        return conv_by_hand(x, weight, biases[index], 1, weight.shape[-1] // 2)

    want = [conv(0, x), conv(2, conv(1, x)), conv(4, conv(3, x)), conv(5, pool_by_hand(x))]
    got = reference.inception(x, *interleave(filters, biases))
    torch.testing.assert_close(got, torch.cat(want, dim=1))


def test_inception_naive_is_its_definition() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    weights = [torch.randn(4, 3, k, k, dtype=torch.float64) for k in (1, 3, 5)]
    biases = list(torch.randn(3, 4, dtype=torch.float64))
    want = [
        conv_by_hand(x, weight, bias, 1, weight.shape[-1] // 2)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    got = reference.inception_naive(x, *interleave(weights, biases))
    torch.testing.assert_close(got, torch.cat([*want, pool_by_hand(x)], dim=1))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(7, 2, 3), (3, 1, 1), (1, 1, 0)])
def test_conv2d_relu_is_its_definition(kernel: int, stride: int, padding: int) -> None:
    x = torch.randn(1, 3, 8, 7, dtype=torch.float64)
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    got = reference.conv2d_relu(x, weight, bias, stride, padding)
    torch.testing.assert_close(got, conv_by_hand(x, weight, bias, stride, padding))


def test_parallel_convolutions_are_slices_of_one_buffer() -> None:
    x = torch.randn(2, 5, 3, 4)
    weights = [torch.randn(c, 5, 1, 1) for c in (2, 3, 4)]
    biases = [torch.randn(c) for c in (2, 3, 4)]
    outputs = reference.parallel_conv1x1_relu(x, weights, biases)
    assert len({y.untyped_storage().data_ptr() for y in outputs}) == 1
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, bias)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_response_norm_is_its_definition(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 7, 3, 2) * 10).to(dtype)
    size, alpha, beta, k = 5, 0.1, 0.75, 2.0
    want = torch.empty_like(x, dtype=torch.float64)
    for c in range(7):
        window = x[:, max(0, c - 2) : c + 3].double()
        want[:, c] = x[:, c] / (k + alpha / size * window.square().sum(1)) ** beta
    got = reference.local_response_norm(x, size, alpha, beta, k)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))


def test_fused_pairs_are_their_parts_in_order() -> None:
    # an even side with one pixel of padding: floor and ceil differ
    x = torch.randn(2, 8, 8, 6) * 10
    options = {"alpha": 0.5, "beta": 0.5, "k": 1.5}
    pool = {"padding": 1, "ceil_mode": True}
    normed = reference.local_response_norm(x, 5, **options)
    pooled = reference.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    torch.testing.assert_close(
        reference.lrn_max_pool2d(x, 5, 3, 2, **options, **pool),
        reference.max_pool2d(normed, 3, 2, 1, ceil_mode=True),
    )
    torch.testing.assert_close(
        reference.max_pool2d_lrn(x, 5, 3, 2, **options, **pool),
        reference.local_response_norm(pooled, 5, **options),
    )


def test_global_average() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(reference.global_avg_pool2d(x), x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("training", [True, False])
def test_conv2d_bn_relu_is_its_definition(training: bool) -> None:
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    mean, var, gamma, beta = torch.rand(4, 2, dtype=torch.float64) + 0.5
    y = F.conv2d(x, weight, padding=1)
    columns = y.transpose(0, 1).flatten(1)
    used_mean, used_var = (
        (columns.mean(1), columns.var(1, correction=0)) if training else (mean, var)
    )
    scale = gamma / (used_var + 1e-3).sqrt()
    want = F.relu((y - used_mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + beta.view(-1, 1, 1))
    new_mean = 0.9 * mean + 0.1 * columns.mean(1) if training else mean.clone()
    new_var = 0.9 * var + 0.1 * columns.var(1) if training else var.clone()
    got = reference.conv2d_bn_relu(
        x, weight, mean, var, gamma, beta, padding=1, training=training, momentum=0.1, eps=1e-3
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mean, new_mean)
    torch.testing.assert_close(var, new_var)


def convolutions(block: reference.Inception) -> list[reference.ConvBlock]:
    return [
        block.branch1,
        *block.branch2,
        *block.branch3,
        block.branch4[1],
    ]


@pytest.mark.parametrize("kernel_5x5", [3, 5])
def test_inception_block_is_the_function(kernel_5x5: int) -> None:
    block = reference.Inception(*DIMS.widths, kernel_5x5=kernel_5x5)
    x = torch.randn(2, 5, 6, 4)
    parameters = [p for conv in convolutions(block) for p in (conv.conv.weight, conv.conv.bias)]
    torch.testing.assert_close(block(x), reference.inception(x, *parameters))


@pytest.mark.parametrize("training", [True, False])
def test_inception_bn_block_is_the_function(training: bool) -> None:
    block = reference.Inception(*DIMS.widths, norm="batch").train(training)
    x = torch.randn(3, 5, 6, 4)
    convs = convolutions(block)
    means, variances = ([stat.clone() for stat in stats] for stats in _running(convs))
    got = reference.inception_bn(
        x,
        [conv.conv.weight for conv in convs],
        means,
        variances,
        [conv.bn.weight for conv in convs],
        [conv.bn.bias for conv in convs],
        training=training,
    )
    torch.testing.assert_close(got, block(x))
    for updated, stats in zip((means, variances), _running(convs), strict=True):
        torch.testing.assert_close(updated, stats)


def _running(convs: list[reference.ConvBlock]) -> tuple[list[Tensor], list[Tensor]]:
    return [conv.bn.running_mean for conv in convs], [conv.bn.running_var for conv in convs]


def test_naive_block_is_the_function() -> None:
    block = reference.InceptionNaive(3, 4, 5, 6)
    x = torch.randn(2, 3, 5, 5)
    branches = (block.branch1, block.branch2, block.branch3)
    parameters = [p for conv in branches for p in (conv.conv.weight, conv.conv.bias)]
    torch.testing.assert_close(block(x), reference.inception_naive(x, *parameters))
    assert block(x).shape[1] == 4 + 5 + 6 + 3


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("kernel_5x5", [3, 5])
@pytest.mark.parametrize("name", MODULES)
def test_parameters_of_a_module(name: str, kernel_5x5: int, norm: str | None) -> None:
    fact = MODULES[name]
    columns = ("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj")
    widths = [fact[column] for column in columns]
    block = reference.Inception(*widths, kernel_5x5=kernel_5x5, norm=norm, device="meta")
    # BatchNorm has a scale and a shift in place of each bias
    beside_weights = fact["biases"] * (1 if norm is None else 2)
    want = fact[f"weights_{kernel_5x5}x{kernel_5x5}"] + beside_weights
    assert sum(p.numel() for p in block.parameters()) == want


def test_aux_pool_follows_caffes_ceil_rule() -> None:
    head = reference.InceptionAux(6, 10, map_size=7).eval()
    head.conv = nn.Identity()
    seen = []
    head.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    head.fc1 = nn.Linear(6 * 2 * 2, 1024)
    x = torch.randn(2, 6, 7, 7)
    assert head(x).shape == (2, 10)
    # windows start at 0 and 3; the second ends with the map and averages what is there
    rows = (slice(0, 5), slice(3, 7))
    want = [[x[:, :, i, j].mean((2, 3)) for j in rows] for i in rows]
    torch.testing.assert_close(seen[0], torch.stack([torch.stack(r, -1) for r in want], -2))


def test_aux_heads_have_their_inputs() -> None:
    assert reference.InceptionAux(512, 10).fc1.in_features == 2048
    assert reference.InceptionAux(512, 10, map_size=3).fc1.in_features == 128
    assert reference.InceptionAux(512, 10, pool="adaptive").fc1.in_features == 2048


def test_unknown_options_are_errors() -> None:
    with pytest.raises(ValueError, match=r'norm must be None or "batch", got \'layer\''):
        reference.ConvBlock(3, 4, kernel_size=1, norm="layer")
    with pytest.raises(ValueError, match=r'pool must be "paper" or "adaptive", got \'max\''):
        reference.InceptionAux(3, 4, pool="max")
    with pytest.raises(ValueError, match="does not fit"):
        reference.InceptionAux(3, 4, map_size=2)


def test_batch_norm_that_skips_batches_has_gradients() -> None:
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1, requires_grad=True)
    running = torch.zeros(5), torch.ones(5)
    options = {"training": True, "skip_nonfinite": True}
    reference.conv2d_bn_relu(x, weight, *running, **options).sum().backward()
    assert weight.grad is not None
    assert running[0].abs().sum() > 0


def test_an_average_over_all_batches_is_of_no_use_in_eval() -> None:
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 1, 1)
    running = torch.zeros(5), torch.ones(5)
    none = torch.tensor(0)
    got = reference.conv2d_bn_relu(x, weight, *running, momentum=None, batches_tracked=none)
    torch.testing.assert_close(got, reference.conv2d_bn_relu(x, weight, *running))

"""The library's convolutions behind our epilogues, in the place of our kernels, against fp64."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception import functional
from fused_inception.launches import record_launches
from fused_inception.tuning import chosen, dispatch
from fused_inception.tuning.configs import BranchesConfig
from fused_inception.tuning.dispatch import CONV_PARTS, MODULE_PARTS, PARTS
from tests import test_batch_norm_kernels as norms
from tests import test_batch_norm_ops, test_ops
from tests import test_conv2d as convolutions
from tests import test_inception_kernels as modules
from tests.cases import INCEPTION_CASES, InceptionCase

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INCEPTION_CASES, ids=lambda case: case.name)
def test_module(case: InceptionCase, dtype: torch.dtype, device: torch.device) -> None:
    p = case.tensors(dtype, device)
    with dispatch.forced(MODULE_PARTS):
        modules.check(p, modules.run(p))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("part", MODULE_PARTS)
def test_each_part_of_a_module_alone(part: str, device: torch.device) -> None:
    p = modules.problem(device)
    with dispatch.forced([part]), record_launches() as launches:
        modules.check(p, modules.run(p))
    kernels = [launch.kernel for launch in launches]
    assert ("_epilogue_kernel" in kernels) == part.endswith(".forward")
    assert ("_gate_kernel" in kernels) == part.endswith(".dgrad")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INCEPTION_CASES[2:7:4], ids=lambda case: case.name)
def test_module_with_norms(case: InceptionCase, dtype: torch.dtype, device: torch.device) -> None:
    p = norms.module(device, dtype, case)
    with dispatch.forced(MODULE_PARTS):
        norms.check(p, norms.run(p))


@pytest.mark.usefixtures("nan_filled_empty")
def test_moments_are_of_as_many_pixels_as_ours(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = chosen.branches_config

    def low(*args: object, **options: object) -> BranchesConfig:
        config = choose(*args, **options)
        return replace(config, conv3=replace(config.conv3, block_m=16))

    monkeypatch.setattr(chosen, "branches_config", low)
    p = norms.module(device, torch.float32, INCEPTION_CASES[2])
    for parts in ([], ["conv3.forward"], MODULE_PARTS):
        with dispatch.forced(parts):
            norms.check(p, norms.run(p))


def rounded_first(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """PyTorch's convolution as it is on a GPU: rounded before the bias is added."""
    return (torch.conv2d(x, weight, None, stride, padding) + bias[:, None, None]).relu()


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", convolutions.CASES)
def test_convolution(name: str, dtype: torch.dtype, device: torch.device) -> None:
    inputs, dy = convolutions.data(name, dtype, device)
    options = convolutions.CASES[name][3:5]
    with dispatch.forced(CONV_PARTS), fi.backend("triton"):
        got = convolutions.results(functional.conv2d_relu, inputs, dy, *options)
    convolutions.check(inputs, dy, got, *options, yardstick=rounded_first)
    for ours in got[:2]:
        _, c, h, w = ours.shape
        assert ours.stride() == (h * w * c, 1, w * c, c)


@pytest.mark.usefixtures("nan_filled_empty")
def test_convolution_of_a_channel_slice(device: torch.device) -> None:
    (x, weight, bias), dy = convolutions.data("3x3", torch.float32, device)
    wide = torch.full((x.shape[0], 40, *x.shape[2:]), math.nan, device=device)
    inputs = [wide.contiguous(memory_format=torch.channels_last)[:, 8:24].copy_(x), weight, bias]
    with dispatch.forced(CONV_PARTS), fi.backend("triton"):
        got = convolutions.results(functional.conv2d_relu, inputs, dy, 1, 1)
    convolutions.check(inputs, dy, got, 1, 1, yardstick=rounded_first)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("part", CONV_PARTS)
@pytest.mark.parametrize("name", ["first-layer", "3x3"])
def test_each_part_of_a_convolution_alone(name: str, part: str, device: torch.device) -> None:
    inputs, dy = convolutions.data(name, torch.float32, device)
    options = convolutions.CASES[name][3:5]
    with dispatch.forced([part]), fi.backend("triton"), record_launches() as launches:
        got = convolutions.results(functional.conv2d_relu, inputs, dy, *options)
    convolutions.check(inputs, dy, got, *options)
    kernels = " ".join(launch.kernel for launch in launches)
    for kind, name_of_part in (("fwd", "forward"), ("dgrad", "dgrad"), ("wgrad", "wgrad")):
        assert (f"_{kind}_kernel" in kernels) == (part != f"conv.{name_of_part}")


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "c_out", "kernel", "stride"),
    [((2, 24, 5, 6), 24, 3, 1), ((2, 13, 4, 5), 11, 1, 1), ((2, 3, 11, 8), 20, 7, 2)],
    ids=["3x3", "odd-widths", "image"],
)
def test_convolution_with_norm(
    shape: tuple[int, ...],
    c_out: int,
    kernel: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    p = norms.convolution(device, dtype, shape, c_out, kernel, stride)
    with dispatch.forced(CONV_PARTS):
        norms.check(p, norms.run(p))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", ["inception_bn", "conv2d_bn_relu"])
def test_opcheck_with_norms(name: str) -> None:
    with dispatch.forced(PARTS):
        test_batch_norm_ops.test_opcheck(name)


def test_opcheck(device: torch.device) -> None:
    with dispatch.forced(PARTS):
        test_ops.test_opcheck_inception(2, True, device)
        test_ops.test_opcheck_inception_backward(1, device)
        convolutions.test_operator_passes_opcheck("1x1-odd-widths", device)

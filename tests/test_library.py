"""The library's convolutions behind our epilogues, in the place of our kernels, against fp64."""

import pytest
import torch

from fused_inception.launches import record_launches
from fused_inception.tuning import dispatch
from fused_inception.tuning.dispatch import MODULE_PARTS
from tests import test_batch_norm_kernels as norms
from tests import test_inception_kernels as modules
from tests.cases import INCEPTION_CASES, InceptionCase

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.usefixtures("nan_filled_empty", "ieee_fp32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INCEPTION_CASES, ids=lambda case: case.name)
def test_module(case: InceptionCase, dtype: torch.dtype, device: torch.device) -> None:
    p = case.tensors(dtype, device)
    with dispatch.forced(MODULE_PARTS):
        modules.check(p, modules.run(p))


@pytest.mark.usefixtures("nan_filled_empty", "ieee_fp32")
@pytest.mark.parametrize("part", MODULE_PARTS)
def test_each_part_of_a_module_alone(part: str, device: torch.device) -> None:
    p = modules.problem(device)
    with dispatch.forced([part]), record_launches() as launches:
        modules.check(p, modules.run(p))
    kernels = [launch.kernel for launch in launches]
    assert ("_epilogue_kernel" in kernels) == part.endswith(".forward")
    assert ("_gate_kernel" in kernels) == part.endswith(".dgrad")


@pytest.mark.usefixtures("nan_filled_empty", "ieee_fp32")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", INCEPTION_CASES[2:7:4], ids=lambda case: case.name)
def test_module_with_norms(case: InceptionCase, dtype: torch.dtype, device: torch.device) -> None:
    p = norms.module(device, dtype, case)
    with dispatch.forced(MODULE_PARTS):
        norms.check(p, norms.run(p))

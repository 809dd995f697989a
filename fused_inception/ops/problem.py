"""How the launch heuristics see a problem: its widths, its operands, its GPU, its pixels.

Descriptions that are equal are one object: what is cached by them is found by identity, without
comparing field by field.
"""

import functools
from collections.abc import Sequence

import torch

from fused_inception.geometry import InceptionDims, power_of_two
from fused_inception.ops import layout
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import Target, target_of


def problem_of(t: torch.Tensor) -> tuple[Operands, Target, int]:
    """Operands, target and pixels of a map [N, C, H, W] that is read or written.

    Pixels are rounded up to a power of two, so that neighbouring batches share their kernels.
    """
    n, _, height, width = t.shape
    exact = t.dtype == torch.float32 and not allows_tf32()
    operands = _operands(t.element_size(), "ieee" if exact else "tf32")
    return operands, target_of(t.device), power_of_two(n * height * width)


def allows_tf32() -> bool:
    """Whether PyTorch lets convolutions in fp32 multiply in TF32.

    `cudnn.allow_tf32` raises where the setting of convolutions is not that of recurrent networks.
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def dims_of(filters: Sequence[torch.Tensor]) -> InceptionDims:
    """`layout.dims_of`, for filters whose widths are numbers and no symbols of a compiler."""
    return _same_dims(layout.dims_of(filters))


_operands = functools.cache(Operands)


@functools.lru_cache(maxsize=1024)
def _same_dims(dims: InceptionDims) -> InceptionDims:
    return dims

"""How the launch heuristics see a problem: its operands, its GPU, its pixels."""

import torch

from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import Target, target_of


def problem_of(t: torch.Tensor) -> tuple[Operands, Target, int]:
    """Operands, target and pixels of a map [N, C, H, W] that is read or written.

    Pixels are rounded up to a power of two, so that neighbouring batches share their kernels.
    """
    n, _, height, width = t.shape
    exact = t.dtype == torch.float32 and not torch.backends.cudnn.allow_tf32
    pixels = n * height * width
    operands = Operands(t.element_size(), "ieee" if exact else "tf32")
    return operands, target_of(t.device), power_of_two(pixels)


def power_of_two(n: int) -> int:
    """The bucket of a number that grows with the batch: the next power of two, 1 for none."""
    return 1 << max(0, n - 1).bit_length()

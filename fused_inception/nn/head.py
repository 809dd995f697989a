"""What follows the last Inception module."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.nn.conv_block import change_of, global_hook


class GlobalAvgPool2d(nn.Module):
    """Mean over height and width, `functional.global_avg_pool2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        return functional.global_avg_pool2d(x)

    def extra_repr(self) -> str:
        """Path, for `print`."""
        return "one fused operator"


def pool_then_dropout(x: Tensor, pool: nn.Module, dropout: nn.Module) -> Tensor:
    """`dropout(flatten(pool(x)))`, in one kernel where both are as they were made and nothing looks
    in between."""
    changes = global_hook() or change_of(pool, GlobalAvgPool2d) or change_of(dropout, nn.Dropout)
    if changes is None:
        options: dict[str, Any] = {"p": dropout.p, "training": dropout.training}
        return functional.global_avg_pool2d_dropout(x, **options)
    return dropout(torch.flatten(pool(x), 1))

"""What follows the last Inception module."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.nn.conv_block import FUSED, change_of, global_hook


class GlobalAvgPool2d(nn.Module):
    """Mean over height and width, `functional.global_avg_pool2d`.

    One that `fuse_` has made of torch's layer runs as that where another `output_size` has been set
    since.
    """

    output_size: Any = 1

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        if self._obstacle() is not None:
            return F.adaptive_avg_pool2d(x, self.output_size)
        return functional.global_avg_pool2d(x)

    def extra_repr(self) -> str:
        """Path, for `print`."""
        return self._obstacle() or FUSED

    def _obstacle(self) -> str | None:
        change = change_of_mean(self)
        return change and f"plain PyTorch: {change}"


def change_of_mean(pool: Any) -> str | None:
    """What keeps an adaptive average pool from being the mean over a map."""
    size = pool.output_size
    return None if size in (1, (1, 1), [1, 1]) else f"has output_size {size}"


def pool_then_dropout(x: Tensor, pool: nn.Module, dropout: nn.Module) -> Tensor:
    """`dropout(flatten(pool(x)))`, in one kernel where both are as they were made and nothing looks
    in between."""
    changes = global_hook() or change_of(pool, GlobalAvgPool2d) or change_of(dropout, nn.Dropout)
    if changes is None and change_of_mean(pool) is None:
        options: dict[str, Any] = {"p": dropout.p, "training": dropout.training}
        return functional.global_avg_pool2d_dropout(x, **options)
    return dropout(torch.flatten(pool(x), 1))

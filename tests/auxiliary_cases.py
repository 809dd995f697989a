"""Named problems of an auxiliary classifier's pool and convolution."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.geometry import AvgWindow

PAPER = AvgWindow(5, 3, True)


def adaptive(side: int) -> AvgWindow:
    return AvgWindow(0, 0, False, side)


@dataclass(frozen=True)
class AuxiliaryCase:
    """The shape of the input, the filters, the windows."""

    name: str
    shape: tuple[int, int, int, int]
    c_out: int
    window: AvgWindow

    @property
    def options(self) -> tuple[int, int, bool, int]:
        """What the operator takes behind the bias."""
        return self.window.kernel, self.window.stride, self.window.ceil_mode, self.window.grid

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[list[Tensor], Tensor]:
        """[x, channels last, weight, bias] and dy."""
        n, c_in, h, w = self.shape
        draw = torch.Generator().manual_seed(11)
        x = torch.randn(self.shape, generator=draw)
        weight = torch.randn(self.c_out, c_in, 1, 1, generator=draw) * (8 / c_in) ** 0.5
        bias = torch.randn(self.c_out, generator=draw) * 0.1
        windows = self.window.out(h) * self.window.out(w)
        dy = torch.randn(n, self.c_out * windows, generator=draw)
        x = x.to(device, dtype, memory_format=torch.channels_last)
        return [x, *(t.to(device, dtype) for t in (weight, bias))], dy.to(device, dtype)

    def pool(self, x: Tensor) -> Tensor:
        """By torch."""
        if self.window.grid:
            return F.adaptive_avg_pool2d(x, self.window.grid)
        window = self.window
        return F.avg_pool2d(x, window.kernel, window.stride, ceil_mode=window.ceil_mode)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """What stands in front of the ReLU, by torch."""
        return F.conv2d(self.pool(x), weight, bias).flatten(1)

    def call(self, module: Any, *inputs: Tensor) -> Tensor:
        """The function of `functional` or of `reference`."""
        window = self.window
        if window.grid:
            return module.adaptive_avg_pool2d_conv1x1_relu(*inputs, window.grid)
        options = window.kernel, window.stride, window.ceil_mode
        return module.avg_pool2d_conv1x1_relu(*inputs, *options)


AUXILIARY_CASES = (
    AuxiliaryCase("paper", (2, 24, 14, 14), 16, PAPER),
    AuxiliaryCase("one-window", (3, 8, 3, 3), 8, PAPER),
    AuxiliaryCase("odd-widths", (1, 13, 7, 7), 5, PAPER),
    AuxiliaryCase("images-of-225", (1, 16, 15, 15), 24, PAPER),
    AuxiliaryCase("images-of-299", (1, 8, 18, 18), 16, PAPER),
    AuxiliaryCase("oblong-and-filters-beyond-a-tile", (1, 24, 5, 11), 130, PAPER),
    AuxiliaryCase("channels-beyond-a-tile", (2, 72, 6, 6), 16, PAPER),
    AuxiliaryCase("floor", (2, 16, 9, 10), 8, AvgWindow(5, 3, False)),
    AuxiliaryCase("windows-apart", (1, 16, 8, 9), 8, AvgWindow(2, 3, False)),
    AuxiliaryCase("one-pixel", (2, 16, 1, 1), 8, AvgWindow(1, 1, False)),
    AuxiliaryCase("large-windows", (1, 8, 13, 14), 8, AvgWindow(9, 4, True)),
    AuxiliaryCase("empty-batch", (0, 16, 7, 7), 8, PAPER),
    AuxiliaryCase("adaptive", (2, 24, 14, 14), 16, adaptive(4)),
    AuxiliaryCase("adaptive-uneven", (1, 16, 15, 13), 8, adaptive(4)),
    AuxiliaryCase("adaptive-of-one-pixel", (2, 16, 1, 1), 8, adaptive(4)),
    AuxiliaryCase("adaptive-of-few-pixels", (1, 16, 3, 2), 8, adaptive(4)),
    AuxiliaryCase("more-windows-than-a-tile", (1, 8, 10, 9), 8, adaptive(9)),
)
BY_NAME = {case.name: case for case in AUXILIARY_CASES}

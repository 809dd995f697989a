"""Named Inception problems; each name says which regime it stands for."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fused_inception.geometry import InceptionDims, NaiveDims


class InceptionTensors(NamedTuple):
    """One problem's data; filters and biases: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, projection;
    of a naive module 1x1, 3x3, 5x5."""

    x: Tensor  # [N, C_IN, H, W], at least 0 and with ties at 0, as behind a ReLU
    filters: list[Tensor]
    biases: list[Tensor]
    dy: Tensor  # [N, C_OUT, H, W]

    def to(self, dtype: torch.dtype) -> "InceptionTensors":
        """The same numbers in another dtype: `.to(torch.float64)` feeds the oracle."""
        return InceptionTensors(
            self.x.to(dtype),
            [w.to(dtype) for w in self.filters],
            [b.to(dtype) for b in self.biases],
            self.dy.to(dtype),
        )

    def laid_out(self, layout: str) -> "InceptionTensors":
        """x and dy in other strides, one of LAYOUTS; "expanded" has one number for dy."""
        if layout == "nchw":
            return self._replace(x=self.x.contiguous(), dy=self.dy.contiguous())
        if layout == "expanded":
            return self._replace(dy=self.dy.new_full((1, 1, 1, 1), 0.5).expand(self.dy.shape))
        return self._replace(x=slice_of_wider(self.x, layout), dy=slice_of_wider(self.dy, layout))


LAYOUTS = ("nchw", "slice", "odd-slice", "expanded")


def slice_of_wider(t: Tensor, layout: str) -> Tensor:
    """`t` as channels of a channels-last tensor, NaN beside them: an aligned "slice", or an
    "odd-slice", where 16-byte loads are impossible."""
    n, c, h, w = t.shape
    start = {"slice": 8, "odd-slice": 3}[layout]
    wide = torch.full((n, h, w, c + 24), math.nan, device=t.device).permute(0, 3, 1, 2)
    wide[:, start : start + c] = t
    return wide[:, start : start + c]


@dataclass(frozen=True)
class InceptionCase:
    """A module's widths and the shape of its input."""

    name: str
    dims: InceptionDims | NaiveDims
    batch: int
    height: int
    width: int

    def tensors(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> InceptionTensors:
        """Random data of this shape: channels last, outputs of about deviation 1."""
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=draw) * std

        shape = (self.batch, self.dims.in_channels, self.height, self.width)
        x = normal(*shape).relu()
        filters = [
            normal(*size, std=(2 / (size[1] * size[2] * size[3])) ** 0.5)
            for size in self.dims.filter_shapes
        ]
        biases = [normal(size[0], std=0.1) for size in self.dims.filter_shapes]
        dy = normal(self.batch, self.dims.out_channels, self.height, self.width)
        return InceptionTensors(
            x.to(device, dtype, memory_format=torch.channels_last),
            [w.to(device, dtype) for w in filters],
            [b.to(device, dtype) for b in biases],
            dy.to(device, dtype, memory_format=torch.channels_last),
        )


SMALL = InceptionDims(16, 8, 16, 24, 8, 16, 8)

INCEPTION_CASES = (
    InceptionCase("one-pixel", SMALL, 2, 1, 1),
    InceptionCase("empty-batch", SMALL, 0, 5, 6),
    InceptionCase("batch-one", InceptionDims(24, 16, 24, 32, 16, 16, 24), 1, 7, 9),
    InceptionCase("map-inside-the-filter", SMALL, 3, 2, 2),
    InceptionCase("single-row", SMALL, 1, 1, 37),
    InceptionCase("single-column", SMALL, 2, 19, 1),
    InceptionCase("prime-widths", InceptionDims(13, 7, 5, 11, 3, 17, 19), 2, 5, 7),
    InceptionCase("widths-24-and-208", InceptionDims(48, 24, 24, 208, 24, 48, 24), 2, 4, 4),
    InceptionCase("one-over-a-tile", InceptionDims(65, 65, 17, 65, 9, 33, 33), 1, 5, 13),
    InceptionCase("3x3-for-the-5x5", InceptionDims(16, 16, 8, 16, 24, 16, 8, 3), 2, 6, 5),
)

NAIVE_CASES = (
    InceptionCase("one-pixel", NaiveDims(16, 8, 16, 8), 2, 1, 1),
    InceptionCase("empty-batch", NaiveDims(16, 8, 16, 8), 0, 5, 6),
    InceptionCase("batch-one", NaiveDims(24, 16, 32, 8), 1, 7, 6),
    InceptionCase("map-inside-the-filter", NaiveDims(8, 8, 16, 8), 3, 2, 2),
    InceptionCase("single-row", NaiveDims(16, 8, 8, 16), 1, 1, 37),
    InceptionCase("single-column", NaiveDims(16, 8, 8, 16), 2, 19, 1),
    InceptionCase("prime-widths", NaiveDims(13, 7, 11, 5), 2, 5, 7),
    InceptionCase("pool-slice-at-an-odd-channel", NaiveDims(16, 7, 8, 8), 2, 4, 3),
    InceptionCase("one-over-a-tile", NaiveDims(9, 65, 17, 9), 1, 5, 13),
    InceptionCase("half-slots", NaiveDims(12, 4, 20, 12), 2, 5, 4),
)

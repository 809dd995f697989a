"""Two forms of the 3x3's main loop beside the library: the library's pointers, as launch B and the
stem have them, and tensor descriptors.

With descriptors nothing is masked: in memory a column of zeros is behind each row and a row of
zeros behind each image, with which the next one begins, so that a tap is a shift of the whole tile.
Their products are the price, 15 % at 14 x 14 and 7 % at 28 x 28. That a map comes to lie so is not
timed: what makes it would have to store it so.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.ceilings import close, measured
from benchmarks.gpu.parts import Item, Turn
from benchmarks.harness import settings
from benchmarks.providers import captured
from fused_inception.tools.timing import Work

GRAPH_CALLS = 20  # so that the start of a graph does not count


@dataclass(frozen=True)
class Tile:
    """Of the descriptors' form."""

    pixels: int
    filters: int
    channels: int
    stages: int
    num_warps: int = 8

    def __str__(self) -> str:
        return f"{self.pixels}x{self.filters}x{self.channels}"

    def constants(self) -> dict[str, int]:
        """The tile's part of the kernel's."""
        return dict(
            BLOCK_P=self.pixels, BLOCK_CO=self.filters, BLOCK_CI=self.channels,
            NUM_STAGES=self.stages,
        )  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A 3x3 of stride 1 on a square map, and the tiles that suit it."""

    side: int
    c_in: int
    c_out: int
    tiles: tuple[Tile, ...]


# of 4b to 4d, and of 3b
SHAPES = (
    Shape(14, 96, 208, (Tile(128, 256, 32, 4), Tile(256, 128, 32, 4))),
    Shape(28, 128, 192, (Tile(256, 128, 64, 3), Tile(128, 128, 64, 4))),
)
BATCHES = (256, 32)


@dataclass(frozen=True)
class Convolution:
    """relu(conv(x) + bias) in the three ways."""

    shape: Shape
    x: Tensor  # [N, C_IN, H, W] channels last
    weight: Tensor  # [C_OUT, C_IN, 3, 3] channels last
    bias: Tensor

    @classmethod
    def draw(
        cls, shape: Shape, batch: int, dtype: torch.dtype, device: torch.device
    ) -> "Convolution":
        """Seeded."""
        draw = torch.Generator(device).manual_seed(0)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=draw, device=device)

        x = normal(batch, shape.c_in, shape.side, shape.side)
        weight = normal(shape.c_out, shape.c_in, 3, 3) / (9 * shape.c_in) ** 0.5
        x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, weight))
        return cls(shape, x, weight, normal(shape.c_out))

    @property
    def flops(self) -> int:
        """Without what is computed in vain."""
        n, c_in, height, width = self.x.shape
        return 2 * n * height * width * 9 * c_in * self.shape.c_out

    def output(self) -> Tensor:
        """To be filled, channels last."""
        n, _, height, width = self.x.shape
        return self.x.new_empty((n, height, width, self.shape.c_out)).permute(0, 3, 1, 2)

    def check(self, y: Tensor) -> None:
        """Against fp32 of the same numbers."""
        close(y, F.conv2d(self.x.float(), self.weight.float(), self.bias, padding=1).relu())

    def by_library(self) -> Work:
        """Without bias and ReLU."""
        return Work(None, lambda _: F.conv2d(self.x, self.weight, padding=1))

    def by_pointers(self) -> Work:
        """The launch of `fused_inception`, as its heuristic or tables have it."""
        from fused_inception.kernels.conv2d import launch_conv2d_fwd
        from fused_inception.ops.problem import problem_of
        from fused_inception.tuning.chosen import conv_config

        y, packed = self.output(), self._taps().view(self.shape.c_out, 9, self.shape.c_in)
        ops, target, pixels = problem_of(y)
        config = conv_config(self.shape.c_in, self.shape.c_out, 3, pixels, ops, target)
        mask = y.new_empty(0, dtype=torch.uint8)

        def run(_: None) -> Tensor:
            launch_conv2d_fwd(
                self.x, packed, self.bias, y, mask, config,
                kernel=3, save=False, precision=ops.precision,
            )  # fmt: skip
            return y

        self.check(run(None))
        return Work(None, run)

    def by_descriptors(self, tile: Tile) -> Work:
        """On the padded map."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        from benchmarks.gpu.ceiling_kernels import _descriptor_conv_kernel

        _, c_in, height, width = self.x.shape
        c_out = self.shape.c_out
        # zeros behind each row and each image
        padded = F.pad(self.x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)).reshape(-1, c_in)
        y = self.output()
        x_desc = TensorDescriptor.from_tensor(padded, [tile.pixels, tile.channels])
        w_desc = TensorDescriptor.from_tensor(self._taps(), [tile.filters, tile.channels])
        grid = (-(-padded.shape[0] // tile.pixels) * -(-c_out // tile.filters),)

        def run(_: None) -> Tensor:
            _descriptor_conv_kernel[grid](
                x_desc, w_desc, self.bias, y, padded.shape[0], height, width,
                9 * c_in // tile.channels, C_IN=c_in, C_OUT=c_out, **tile.constants(),
                num_warps=tile.num_warps,
            )  # fmt: skip
            return y

        self.check(run(None))
        return Work(None, run)

    def _taps(self) -> Tensor:
        """The filters as rows (tap, channel)."""
        return self.weight.permute(0, 2, 3, 1).reshape(self.shape.c_out, -1)


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """One for each shape, batch and form."""

    def item(shape: Shape, batch: int, form: str, tile: Tile | None) -> Item:
        name = form if tile is None else f"{form} {tile}"
        what = f"3x3 {shape.side}x{shape.side} {shape.c_in} to {shape.c_out}, N = {batch}"

        def run(_: Turn) -> dict[str, Any]:
            conv = Convolution.draw(shape, batch, torch.bfloat16, device)
            return speed(conv, form, tile, device, options["seconds"])

        return Item(f"{what}, {name}", run)

    return [
        item(shape, batch, *form)
        for shape, batch in itertools.product(SHAPES, BATCHES)
        for form in (
            ("library", None), ("pointers", None), *(("descriptors", t) for t in shape.tiles)
        )
    ]  # fmt: skip


def speed(
    conv: Convolution, form: str, tile: Tile | None, device: torch.device, seconds: float
) -> dict[str, Any]:
    """FLOP/s, on a GPU of calls in a CUDA graph."""
    with settings("bf16"):
        if tile is not None:
            piece = conv.by_descriptors(tile)
        else:
            piece = conv.by_library() if form == "library" else conv.by_pointers()
        once = piece

        def many(_: None) -> Tensor:
            outputs = [once.run(None) for _i in range(GRAPH_CALLS)]
            return outputs[-1]

        calls = 1
        if device.type == "cuda":
            calls = GRAPH_CALLS
            piece, _ = captured(Work(None, many))
        return measured(piece, device, seconds, conv.flops * calls, "FLOP/s")

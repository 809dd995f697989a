"""Two forms of the 3x3's main loop beside the library: the library's pointers, as launch B and the
stem have them, and tensor descriptors.

With descriptors nothing is masked: in memory a column of zeros is behind each row and a row of
zeros behind each image, with which the next one begins, so that a tap is a shift of the whole tile.
Their products are the price, 15 % at 14 x 14 and 7 % at 28 x 28. That a map comes to lie so is not
timed: what makes it would have to store it so.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.ceilings import close, measured
from benchmarks.gpu.parts import Item, Turn
from benchmarks.harness import settings
from benchmarks.providers import captured
from fused_inception.ops.problem import problem_of
from fused_inception.tools.timing import Work
from fused_inception.tuning.chosen import conv_config
from fused_inception.tuning.configs import Tile
from fused_inception.tuning.heuristic import Operands, stages, warps
from fused_inception.tuning.targets import Target

GRAPH_CALLS = 20  # so that the start of a graph does not count


@dataclass(frozen=True)
class Shape:
    """A 3x3 of stride 1 on a square map, and the tiles that suit it."""

    side: int
    c_in: int
    c_out: int
    tiles: tuple[Tile, ...]


# of 4b to 4d, and of 3b
SHAPES = (
    Shape(14, 96, 208, (Tile(128, 256, 32), Tile(256, 128, 32))),
    Shape(28, 128, 192, (Tile(256, 128, 64), Tile(128, 128, 64))),
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
        from fused_inception.kernels.conv2d import launch_conv2d_fwd, pack_filter

        y = self.output()
        packed, bias = pack_filter(self.weight, self.bias, y.dtype)
        ops, target, pixels = problem_of(y)
        config = conv_config(self.shape.c_in, self.shape.c_out, 3, pixels, ops, target)
        mask = y.new_empty(0, dtype=torch.uint8)

        def run(_: None) -> Tensor:
            launch_conv2d_fwd(
                self.x, packed, bias, y, mask, config,
                kernel=3, save=False, precision=ops.precision,
            )  # fmt: skip
            return y

        self.check(run(None))
        return Work(None, run)

    def by_descriptors(self, tile: Tile) -> Work:
        """On the padded map."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        from benchmarks.gpu.ceiling_kernels import _descriptor_conv_kernel
        from fused_inception.kernels.conv2d import pack_filter

        _, c_in, height, width = self.x.shape
        # zeros behind each row and each image
        padded = F.pad(self.x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1)).reshape(-1, c_in)
        y = self.output()
        packed, bias = pack_filter(self.weight, self.bias, y.dtype)
        w = packed.flatten(1)
        constants = tile_constants(tile, *problem_of(y)[:2])
        x_desc = TensorDescriptor.from_tensor(padded, [tile.block_m, tile.block_k])
        w_desc = TensorDescriptor.from_tensor(w, [tile.block_n, tile.block_k])
        grid = (-(-padded.shape[0] // tile.block_m) * -(-w.shape[0] // tile.block_n),)

        def run(_: None) -> Tensor:
            _descriptor_conv_kernel[grid](
                x_desc, w_desc, bias, y, padded.shape[0], height, width,
                w.shape[1] // tile.block_k, C_IN=c_in, C_OUT=w.shape[0], **constants,
            )  # fmt: skip
            return y

        self.check(run(None))
        return Work(None, run)


def tile_constants(tile: Tile, ops: Operands, target: Target) -> dict[str, int]:
    """The descriptor kernel's part of them."""
    return dict(
        BLOCK_P=tile.block_m, BLOCK_CO=tile.block_n, BLOCK_CI=tile.block_k,
        NUM_STAGES=stages([tile], ops, target), num_warps=warps([tile]),
    )  # fmt: skip


Form = Callable[[Convolution], Work]


def forms_of(shape: Shape) -> dict[str, Form]:
    """The ways by their names."""
    by_descriptors: dict[str, Form] = {
        f"descriptors {tile.block_m}x{tile.block_n}x{tile.block_k}": functools.partial(
            Convolution.by_descriptors, tile=tile
        )
        for tile in shape.tiles
    }
    return {
        "library": Convolution.by_library,
        "pointers": Convolution.by_pointers,
        **by_descriptors,
    }


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """One for each shape, batch and form."""

    def item(shape: Shape, batch: int, name: str, form: Form) -> Item:
        def run(_: Turn) -> dict[str, Any]:
            conv = Convolution.draw(shape, batch, torch.bfloat16, device)
            return speed(conv, form, device, options["seconds"])

        what = f"3x3 {shape.side}x{shape.side} {shape.c_in} to {shape.c_out}, N = {batch}"
        return Item(f"{what}, {name}", run)

    return [
        item(shape, batch, *form)
        for shape, batch in itertools.product(SHAPES, BATCHES)
        for form in forms_of(shape).items()
    ]


def speed(conv: Convolution, form: Form, device: torch.device, seconds: float) -> dict[str, Any]:
    """FLOP/s, on a GPU of calls in a CUDA graph."""
    with settings("bf16"):
        once = form(conv)
        if device.type != "cuda":
            return measured(once, device, seconds, conv.flops, "FLOP/s")
        many = Work(None, lambda _: [once.run(None) for _i in range(GRAPH_CALLS)][-1])
        return measured(captured(many)[0], device, seconds, GRAPH_CALLS * conv.flops, "FLOP/s")

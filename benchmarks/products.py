"""The products of launches from geometry alone: what their results need, what their tiles multiply.

A tile multiplies all of its rows, columns and steps, whether the map, the filters or the channels
of a tap fill them or not. Configurations are the heuristics', asked as the operators' scripts ask.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.ops.problem import power_of_two
from fused_inception.tuning import conv_heuristic, heuristic, wgrad_heuristic
from fused_inception.tuning.configs import Tile, WgradJob, split_width
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS


@dataclass(frozen=True)
class Product:
    """m x n sums over k products for each of `taps`, and what its tiles multiply."""

    m: int
    n: int
    k: int
    taps: int
    rows: int  # that the tiles cover, of m
    columns: int  # likewise, of n
    depth: int  # likewise, of k for each tap

    @property
    def useful(self) -> int:
        """Multiply-adds that the result needs."""
        return self.m * self.n * self.k * self.taps

    @property
    def issued(self) -> int:
        """Multiply-adds of the tiles."""
        return self.rows * self.columns * self.depth * self.taps


def _tiled(m: int, n: int, k: int, tile: Tile, taps: int = 1, tail: int = 0) -> Product:
    wide, tail = split_width(n, tile.block_n, tail)
    return Product(
        *(m, n, k, taps),
        rows=align_up(m, tile.block_m),
        columns=wide * tile.block_n + tail,
        depth=align_up(k, tile.block_k),
    )


def _split(m: int, n: int, pixels: int, job: WgradJob) -> Product:
    chunk, splits = job.chunks(pixels)
    tile = job.tile
    rows, columns = align_up(m, tile.block_m), align_up(n, tile.block_n)
    return Product(m, n, pixels, 1, rows, columns, chunk * splits)


def launches(
    dims: InceptionDims,
    pixels: int,
    ops: Operands,
    target_name: str,
    *,
    training: bool = True,
    norm: bool = False,
) -> Iterator[tuple[str, list[Product]]]:
    """The products of a module's launches A, B, L1, L2 and L3; with `norm` of BatchNorm in
    training."""
    target = TARGETS[target_name]
    rounded = power_of_two(pixels)
    d, taps5 = dims, dims.kernel_5x5**2
    c_in = d.in_channels
    a = heuristic.pointwise_config(d, rounded, ops, target, training, norm)
    width = align_up(d.ch1x1) + d.reduced_channels
    gemm = _tiled(pixels, width, c_in, a.gemm, tail=a.tail_n)
    yield "A", [gemm, _tiled(pixels, d.pool_proj, c_in, a.pool)]
    b = heuristic.branches_config(d, rounded, ops, target, norm)
    yield "B 3x3", [_tiled(pixels, d.ch3x3, d.ch3x3red, b.conv3, 9, b.tail_n)]
    yield "B 5x5", [_tiled(pixels, d.ch5x5, d.ch5x5red, b.conv5, taps5)]
    one = heuristic.dgrad_config(d, rounded, ops, target, norm)
    yield "L1 3x3", [_tiled(pixels, d.ch3x3red, d.ch3x3, one.conv3, 9, one.tail_n)]
    yield "L1 5x5", [_tiled(pixels, d.ch5x5red, d.ch5x5, one.conv5, taps5)]
    yield "L1 pool", [_tiled(pixels, c_in, d.pool_proj, one.pool)]
    two = heuristic.input_grad_config(d, rounded, ops, target).gemm
    yield "L2", [_tiled(pixels, c_in, n, two) for n in (d.ch1x1, d.reduced_channels)]
    three = wgrad_heuristic.wgrad_config(d, rounded, ops, target)
    yield "L3 3x3", [_split(9 * d.ch3x3red, d.ch3x3, pixels, three.conv3)]
    yield "L3 5x5", [_split(taps5 * d.ch5x5red, d.ch5x5, pixels, three.conv5)]
    yield "L3 1x1", [_split(c_in, d.ch1x1, pixels, three.branch1)]
    yield "L3 reduces", [_split(c_in, d.reduced_channels, pixels, three.reduces)]
    yield "L3 pool", [_split(c_in, d.pool_proj, pixels, three.projection)]


def convolution(
    c_in: int, c_out: int, kernel: int, pixels: int, ops: Operands, target: str, *, norm: bool
) -> dict[str, Product]:
    """The products of a convolution that is an operator of its own, by direction."""
    config = conv_heuristic.conv_config(
        c_in, c_out, kernel, power_of_two(pixels), ops, TARGETS[target], norm
    )
    taps = kernel * kernel
    return {
        "fwd": _tiled(pixels, c_out, c_in, config.forward, taps, config.tail_n),
        "dgrad": _tiled(pixels, c_in, c_out, config.dgrad, taps),
        "wgrad": _split(taps * c_in, c_out, pixels, config.wgrad),
    }

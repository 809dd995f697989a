"""The products of launches from geometry alone: what their results need, what their tiles multiply.

A tile multiplies all of its rows, columns and steps, whether the map, the filters or the channels
of a tap fill them or not. Configurations are the heuristics', asked as the operators' scripts ask.

Not needed is also what is multiplied again, what a mask leaves of a tap or a window that belongs to
no result, and the row of ones that gives the gradient of conv1's bias: a sum needs no products.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fused_inception.geometry import (
    STEM_POOL,
    AvgWindow,
    InceptionDims,
    NaiveDims,
    align_up,
    conv_out,
    power_of_two,
)
from fused_inception.tuning import conv_heuristic, heuristic, naive_heuristic, wgrad_heuristic
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
    # splits are of whole steps, and the last one ends with the pixels
    return _tiled(m, n, pixels, job.tile)


def _image_split(positions: int, c_out: int, pixels: int, job: WgradJob) -> Product:
    """Of the filter of a convolution of images, output channels x positions and the bias."""
    return replace(_split(c_out, positions + 1, pixels, job), n=positions)


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
) -> dict[str, list[Product]]:
    """The products of a convolution that is an operator of its own, by launch."""
    config = conv_heuristic.conv_config(
        c_in, c_out, kernel, power_of_two(pixels), ops, TARGETS[target], norm
    )
    taps = kernel * kernel
    return {
        "conv2d_fwd": [_tiled(pixels, c_out, c_in, config.forward, taps, config.tail_n)],
        "conv2d_dgrad": [_tiled(pixels, c_in, c_out, config.dgrad, taps)],
        "conv2d_wgrad": [_split(taps * c_in, c_out, pixels, config.wgrad)],
    }


def image_convolution(
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int,
    batch: int,
    side: int,
    ops: Operands,
    target: str,
) -> dict[str, list[Product]]:
    """The same of a convolution of images of `side` pixels a side."""
    taps = kernel * kernel
    positions = taps * c_in
    pixels = batch * conv_out(side, kernel, stride, kernel // 2) ** 2
    config = conv_heuristic.image_conv_config(
        positions, c_out, power_of_two(pixels), ops, TARGETS[target]
    )
    # every tap of every pixel of the image, of which the stride steps over most
    dgrad = _tiled(batch * side**2, c_in, c_out, config.dgrad, taps)
    return {
        "image_conv_fwd": [_tiled(pixels, c_out, positions, config.forward)],
        "image_conv_dgrad": [replace(dgrad, m=pixels)],
        "image_conv_wgrad": [_image_split(positions, c_out, pixels, config.wgrad)],
    }


def packed_convolution(
    c_in: int, c_out: int, batch: int, side: int, ops: Operands, target: str
) -> dict[str, list[Product]]:
    """The same of conv1 of the network alone, of packed images of `side` pixels a side."""
    rounded = power_of_two(batch * conv_out(side, 7, 2, 3) ** 2)
    job = conv_heuristic.packed_wgrad_config(c_out, rounded, ops, TARGETS[target]).wgrad
    forward, wgrad = _packed(c_in, c_out, batch, side, job, ops, target)
    return {"stem_conv_fwd": [forward], "packed_wgrad": [wgrad]}


def _packed(
    c_in: int, c_out: int, batch: int, side: int, job: WgradJob, ops: Operands, target: str
) -> tuple[Product, Product]:
    """conv1 of a packed image, and its filter's gradient.

    It multiplies DEPTH elements for the positions of its filter, and its gradient also the windows
    that belong to no output pixel.
    """
    # they are the kernels', whose modules need Triton
    from fused_inception.kernels.stem_conv import DEPTH, windows_until_last

    positions, side = 7 * 7 * c_in, conv_out(side, 7, 2, 3)
    pixels = batch * side**2
    tile = conv_heuristic.stem_conv_config(c_out, power_of_two(pixels), ops, TARGETS[target])
    wgrad = _split(DEPTH, c_out, windows_until_last(pixels, side, side), job)
    forward = replace(_tiled(pixels, c_out, DEPTH, tile.forward), k=positions)
    return forward, replace(wgrad, m=positions, k=pixels)


def stem(
    c_in: int, widths: tuple[int, int, int], batch: int, side: int, ops: Operands, target: str
) -> dict[str, list[Product]]:
    """The products of the launches that the stem alone has: conv1 of a packed image, the gradients
    of its three filters. Images are of `side` pixels a side.
    """
    c1, c2, c3 = widths
    side1 = conv_out(side, 7, 2, 3)
    pixels1, pixels = batch * side1**2, batch * STEM_POOL.out(side1) ** 2
    rounded1, rounded = power_of_two(pixels1), power_of_two(pixels)
    config = conv_heuristic.stem_wgrad_config(widths, rounded1, rounded, ops, TARGETS[target])
    second = _split(c1, c2, pixels, config.conv2)
    third = _split(9 * c2, c3, pixels, config.conv3)
    forward, first = _packed(c_in, c1, batch, side, config.conv1, ops, target)
    return {"stem_conv_fwd": [forward], "stem_wgrad": [first, second, third]}


def naive(dims: NaiveDims, pixels: int, ops: Operands, target: str) -> dict[str, list[Product]]:
    """The products of the naive module's launches: of the 1x1, the 3x3 and the 5x5 filters."""
    problem = dims, power_of_two(pixels), ops, TARGETS[target]
    c_in = dims.in_channels
    filters = list(zip(dims.conv_widths, naive_heuristic.TAPS, strict=True))
    forward = naive_heuristic.naive_config(*problem)
    tiles = forward.conv1, forward.conv3, forward.conv5
    gemm = naive_heuristic.naive_input_grad_config(*problem).gemm
    wgrad = naive_heuristic.naive_wgrad_config(*problem)
    jobs = wgrad.conv1, wgrad.conv3, wgrad.conv5
    return {
        "naive_conv": [
            _tiled(pixels, width, c_in, tile, taps)
            for (width, taps), tile in zip(filters, tiles, strict=True)
        ],
        "naive_input_grad": [_tiled(pixels, c_in, width, gemm, taps) for width, taps in filters],
        "naive_wgrad": [
            _split(taps * c_in, width, pixels, job)
            for (width, taps), job in zip(filters, jobs, strict=True)
        ],
    }


def auxiliary(
    c_in: int, c_out: int, batch: int, side: int, window: AvgWindow, ops: Operands, target: str
) -> dict[str, list[Product]]:
    """The products of an auxiliary classifier's pool and convolution, of a map of `side` pixels a
    side."""
    of_image, extent = window.out(side) ** 2, window.extent(side) ** 2
    windows = batch * of_image
    config = conv_heuristic.avg_pool_project_config(
        c_in, c_out, of_image, extent, power_of_two(windows), ops, TARGETS[target]
    )
    # each tile of pixels multiplies all windows of its image again
    again = -(-side * side // config.block_pixel)
    dgrad = _tiled(c_in, of_image, c_out, config.dgrad)
    return {
        "avg_pool_project_fwd": [_tiled(c_out, windows, c_in, config.forward)],
        "avg_pool_project_bwd": [
            _split(c_in, c_out, windows, config.wgrad),
            replace(dgrad, n=windows, columns=batch * again * dgrad.columns),
        ],
    }

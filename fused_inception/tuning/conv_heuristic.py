"""Launch configurations of single convolutions, by the same estimate as those of the modules."""

import functools
import math

from fused_inception.geometry import align_up
from fused_inception.tuning.configs import ConvConfig, ImageConvConfig, Tile, WgradJob
from fused_inception.tuning.heuristic import (
    Operands,
    conv_tile,
    gated_tile,
    stages,
    warps,
    wgrad_job,
)
from fused_inception.tuning.targets import Target


@functools.lru_cache(maxsize=4096)
def conv_config(
    c_in: int, c_out: int, kernel: int, n_pixels: int, ops: Operands, target: Target
) -> ConvConfig:
    """One "same" convolution."""
    taps = kernel * kernel
    forward = conv_tile(n_pixels, c_out, align_up(c_in), taps, ops, target)
    dgrad = gated_tile(n_pixels, c_in, align_up(c_out), taps, ops, target)
    wgrad = wgrad_job(taps * align_up(c_in), align_up(c_out), n_pixels, ops, target)
    tiles = [forward, dgrad, wgrad.tile]
    return ConvConfig(forward, dgrad, wgrad, warps(tiles), stages(tiles, ops, target))


@functools.lru_cache(maxsize=4096)
def image_conv_config(
    positions: int, c_out: int, n_pixels: int, ops: Operands, target: Target
) -> ImageConvConfig:
    """A convolution of images: bound by its gathers, so tiles are tall and no wider than the
    filters."""
    width = min(64, max(16, 1 << (c_out - 1).bit_length()))
    step = 32 if ops.itemsize == 2 else 16
    rows = 128 if n_pixels >= 128 * target.processors else 64
    # 64 positions a tile: the gathered window is read once, dz once per 64 positions
    wgrad = Tile(64, 64, step * 2)
    splits = max(1, min(4 * target.processors, math.ceil(n_pixels / (8 * wgrad.block_k))))
    return ImageConvConfig(
        forward=Tile(rows, width, step),
        wgrad=WgradJob(wgrad, splits),
        dgrad=Tile(64, 16, min(64, width)),
        # 16 gathered elements a thread: their addresses and masks would spill with more
        num_warps=8 if rows == 128 else 4,
    )

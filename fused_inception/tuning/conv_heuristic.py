"""Launch configurations of single convolutions and of the stem, by the same estimate as those of
the modules."""

import functools
import math
from dataclasses import replace

from fused_inception.geometry import align_up, power_of_two
from fused_inception.tuning.configs import (
    AvgPoolProjectConfig,
    ConvConfig,
    EpilogueConfig,
    ImageConvConfig,
    PackedWgradConfig,
    StemConvConfig,
    StemWgradConfig,
    Tile,
    WgradJob,
)
from fused_inception.tuning.heuristic import (
    Operands,
    conv_split,
    conv_tile,
    gated_tile,
    mask_config,
    stages,
    warps,
)
from fused_inception.tuning.targets import Target
from fused_inception.tuning.wgrad_heuristic import FilterGradient, wgrad_job, wgrad_jobs

PACKED_POSITIONS = 256  # of a packed filter of the stem's first convolution: `stem_conv.DEPTH`


@functools.lru_cache(maxsize=4096)
def conv_config(
    c_in: int,
    c_out: int,
    kernel: int,
    n_pixels: int,
    ops: Operands,
    target: Target,
    norm: bool = False,
) -> ConvConfig:
    """One "same" convolution; with `norm` ahead of a BatchNorm in training."""
    taps = kernel * kernel
    largest = dict(max_width=128, max_elements=target.max_moments_tile) if norm else {}
    forward, tail = conv_split(n_pixels, c_out, align_up(c_in), taps, ops, target, **largest)
    dgrad = gated_tile(n_pixels, c_in, align_up(c_out), taps, ops, target)
    wgrad = wgrad_job(taps * align_up(c_in), align_up(c_out), n_pixels, ops, target)
    tiles = [forward, dgrad, wgrad.tile]
    num_stages = stages(tiles, ops, target)
    if tail and num_stages == 1 and ops.short_of_registers(target):
        # without a pipeline a step waits in registers: one of 32 would spill where ptxas makes room
        # for two programs a processor
        forward = replace(forward, block_k=16)
    return ConvConfig(forward, tail, dgrad, wgrad, warps(tiles), num_stages)


@functools.lru_cache(maxsize=4096)
def image_conv_config(
    positions: int, c_out: int, n_pixels: int, ops: Operands, target: Target
) -> ImageConvConfig:
    """A convolution of images: bound by its gathers, so tiles are tall and no wider than the
    filters."""
    width = min(64, max(16, power_of_two(c_out)))
    step = 32 if ops.itemsize == 2 else 16
    rows = 128 if n_pixels >= 128 * target.processors else 64
    # 64 positions a tile: the gathered window is read once, dz once per 64 positions
    wgrad = Tile(64, 64, step * 2)
    tiles = math.ceil(c_out / 64) * math.ceil((positions + 1) / 64)
    programs = math.ceil(4 * target.processors / tiles)
    splits = max(1, min(programs, math.ceil(n_pixels / (8 * wgrad.block_k))))
    return ImageConvConfig(
        forward=Tile(rows, width, step),
        wgrad=WgradJob(wgrad, splits),
        dgrad=Tile(64, 16, min(64, width)),
        # 16 gathered elements a thread: their addresses and masks would spill with more
        num_warps=8 if rows == 128 else 4,
    )


@functools.lru_cache(maxsize=4096)
def stem_conv_config(c_out: int, n_pixels: int, ops: Operands, target: Target) -> StemConvConfig:
    """The stem's first convolution of a packed image, four steps of 64 in 16 bits.

    So short a program does not fill a pipeline of its own: three should fit a processor, each with
    two stages and the row that waits in registers.
    """
    tile = conv_tile(n_pixels, c_out, 64, 4, ops, target, max_elements=128 * 64)
    return StemConvConfig(tile, warps([tile]), min(2, stages([tile], ops, target)))


@functools.lru_cache(maxsize=4096)
def packed_wgrad_config(
    slots: int, n_pixels: int, ops: Operands, target: Target
) -> PackedWgradConfig:
    """Its filter gradient alone: two programs a processor, which have all the same to do."""
    tile = wgrad_job(PACKED_POSITIONS, slots, n_pixels, ops, target, max_elements=128 * 128).tile
    programs = math.ceil(PACKED_POSITIONS / tile.block_m) * math.ceil(slots / tile.block_n)
    steps = math.ceil(n_pixels / (8 * tile.block_k))
    job = WgradJob(tile, max(1, min(2 * target.processors // programs, steps)))
    return PackedWgradConfig(job, warps([tile]), stages([tile], ops, _half_of(target)))


def _half_of(target: Target) -> Target:
    """With so much shared memory that what `stages` makes fits twice: it leaves a quarter."""
    return replace(target, shared_bytes=target.shared_bytes * 2 // 3)


@functools.lru_cache(maxsize=4096)
def stem_wgrad_config(
    widths: tuple[int, int, int], n_pixels1: int, n_pixels: int, ops: Operands, target: Target
) -> StemWgradConfig:
    """Filter gradients of the stem: `n_pixels1` behind conv1, `n_pixels` behind conv2 and conv3.

    Two programs should fit a processor, so accumulators are of 128 x 128 at the most, with half of
    the shared memory.
    """
    c1, c2, c3 = widths
    largest = 128 * 128
    gradients = [
        FilterGradient(PACKED_POSITIONS, c1, max_elements=largest, pixels=n_pixels1),
        FilterGradient(9 * c2, c3, max_elements=largest),
        FilterGradient(c1, c2),
    ]
    conv1, conv3, conv2 = wgrad_jobs(gradients, n_pixels, ops, target)
    tiles = [conv1.tile, conv2.tile, conv3.tile]
    return StemWgradConfig(
        conv1=conv1,
        conv2=conv2,
        conv3=conv3,
        sums=mask_config(c3, n_pixels, target),
        num_warps=warps(tiles),
        num_stages=stages(tiles, ops, _half_of(target)),
    )


@functools.lru_cache(maxsize=4096)
def avg_pool_project_config(
    c_in: int,
    c_out: int,
    image_windows: int,
    window_pixels: int,
    n_windows: int,
    ops: Operands,
    target: Target,
) -> AvgPoolProjectConfig:
    """An auxiliary classifier's pool and convolution: bound by reading the map and writing its
    gradient, so tiles are small and programs many."""
    rows = min(128, max(64, power_of_two(c_out)))
    step = 64 if ops.itemsize == 2 else 32
    return AvgPoolProjectConfig(
        # 16 windows, one image of the paper's: 16 bytes a thread and pixel
        forward=Tile(rows, 16, step),
        taps=min(25, window_pixels),
        wgrad=wgrad_job(
            align_up(c_in), align_up(c_out), n_windows, ops, target, max_elements=64 * 128
        ),
        dgrad=Tile(64, min(64, max(16, power_of_two(image_windows))), step),
        block_pixel=128,
        forward_warps=4,
        num_warps=8,
    )


def epilogue_config(channels: int, block_p: int = 64) -> EpilogueConfig:
    """A pass behind a library's convolution, bound by memory: 128 bytes of a pixel in 16 bits where
    there are as many, half of that beside 256 pixels, whose moments need registers."""
    block_c = min(64 if block_p <= 128 else 32, max(16, power_of_two(channels)))
    return EpilogueConfig(block_p, block_c, 8 if block_p * block_c > 64 * 64 else 4)

"""Launch configurations without a measurement: pure functions of problem, operand type and target.

Every choice minimises one estimate: tiles are dealt to the processors in waves, and a tile takes as
long as its tensor-core work or its operand stream from L2, whichever is slower, plus a fixed
prologue and epilogue.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from fused_inception.geometry import InceptionDims, align_up, power_of_two
from fused_inception.tuning.configs import (
    BranchesConfig,
    DgradConfig,
    FinishConfig,
    GlobalPoolConfig,
    InputGradConfig,
    MaskConfig,
    PointwiseConfig,
    Tile,
    split_width,
)
from fused_inception.tuning.targets import Target

# prologue and epilogue of a tile that the pipeline does not hide, seconds
TILE_SECONDS = 0.4e-6
# share of the peak that an instruction of this width reaches: below 64 columns the left operand's
# reads bind
WIDTH_EFFICIENCY = {16: 0.25, 32: 0.5, 64: 0.92, 128: 0.98, 256: 1.0}
# what a second width of tiles in one launch must save: it is one more range of programs
TAIL_GAIN = 0.02


@dataclass(frozen=True)
class Operands:
    """How a GEMM sees its operands."""

    itemsize: int  # bytes of one element
    precision: str  # "tf32" or "ieee", of fp32

    @property
    def tensor_cores(self) -> bool:
        """Exact fp32 products run on the ordinary units."""
        return self.itemsize == 2 or self.precision == "tf32"

    def short_of_registers(self, target: Target) -> bool:
        """Whether these are TF32 on a target where it spills first."""
        return self.itemsize == 4 and self.tensor_cores and target.tf32_spills

    def flops(self, target: Target) -> float:
        """Peak of these operands."""
        if self.itemsize == 2:
            return target.tensor_flops
        return target.tensor_flops / (2 if self.precision == "tf32" else 14)

    def max_elements(self, target: Target) -> int:
        """Largest tile whose accumulators leave registers for everything else."""
        if self.itemsize == 2:
            return target.max_tile
        return min(128 * 128, target.max_tile) if self.tensor_cores else 64 * 64


def tile_seconds(bm: int, bn: int, k: int, ops: Operands, target: Target) -> float:
    """Of one tile of bm x bn and a reduction over k."""
    rate = ops.flops(target) / target.processors * WIDTH_EFFICIENCY[bn]
    stream = target.stream_bytes / target.processors
    return max(2 * bm * bn * k / rate, (bm + bn) * k * ops.itemsize / stream) + TILE_SECONDS


def _block_k(k: int, ops: Operands) -> int:
    """Step of a reduction over the k channels of each tap.

    64 in 16 bits (one swizzled row of shared memory) unless that pads by over a seventh, then 32;
    16 costs as many instructions a step as 32 and pays only where the channels are no more than
    that.
    """
    steps = (64, 32, 16) if ops.itemsize == 2 else (32, 16, 16)
    if k <= steps[2]:
        return steps[2]
    return steps[0] if align_up(k, steps[0]) * 7 <= k * 8 else steps[1]


def _heights(ops: Operands, largest: int = 256) -> tuple[int, ...]:
    return tuple(h for h in ((64, 128, 256) if ops.tensor_cores else (64,)) if h <= largest)


def best_tile(
    m: int,
    n: int,
    k: int,
    ops: Operands,
    target: Target,
    *,
    max_elements: int | None = None,
    max_width: int = 256,
    max_height: int = 256,
    splits_free: bool = False,
) -> tuple[int, int]:
    """(rows, columns) of the cheapest tile for one m x n x k product; with `splits_free` waves do
    not count."""
    largest = ops.max_elements(target)
    limit = min(max_elements or largest, largest)

    def seconds(shape: tuple[int, int]) -> tuple[float, int, int]:
        bm, bn = shape
        tiles = math.ceil(m / bm) * math.ceil(n / bn)
        waves = tiles / target.processors if splits_free else math.ceil(tiles / target.processors)
        return waves * tile_seconds(bm, bn, k, ops, target), bm * bn, bm

    widths = [bn for bn in WIDTH_EFFICIENCY if bn <= max_width]
    heights = _heights(ops, max_height)
    shapes = [(bm, bn) for bm in heights for bn in widths if bm * bn <= limit]
    return min(shapes, key=seconds)


def _split_seconds(
    m: int, n: int, k: int, shape: tuple[int, int, int], ops: Operands, target: Target
) -> tuple[float, float]:
    """(seconds, seconds of all tiles one after another) of one m x n x k product in tiles of (rows,
    columns, columns of the tail or 0).

    Wide tiles run in waves; tails fill what is left of the last one, then waves of their own.
    """
    bm, bn, tail = shape
    columns, _ = split_width(n, bn, tail)
    rows = math.ceil(m / bm)
    wide = rows * columns
    each = tile_seconds(bm, bn, k, ops, target)
    seconds = math.ceil(wide / target.processors) * each
    if tail == 0:
        return seconds, wide * each
    each_tail = tile_seconds(bm, tail, k, ops, target)
    idle = seconds * target.processors - wide * each
    left = max(0, rows - int(idle / each_tail))
    seconds += math.ceil(left / target.processors) * each_tail
    return seconds, wide * each + rows * each_tail


def warps(tiles: Iterable[Tile]) -> int:
    # 8 warps halve the accumulators of a thread; a small tile would leave each of them too little
    # work
    return 8 if max(t.block_m * t.block_n for t in tiles) > 128 * 64 else 4


def stages(tiles: Iterable[Tile], ops: Operands, target: Target) -> int:
    """As many pipeline stages as fit, with room left for the epilogue's exchange of layouts."""
    step = max((t.block_m + t.block_n) * t.block_k * ops.itemsize for t in tiles)
    most = target.max_stages if ops.tensor_cores else target.exact_stages
    return max(1, min(most, target.shared_bytes * 3 // 4 // step))


@functools.lru_cache(maxsize=4096)
def pointwise_config(
    dims: InceptionDims,
    n_pixels: int,
    ops: Operands,
    target: Target,
    save: bool,
    norm: bool = False,
) -> PointwiseConfig:
    """Launch A; with `norm` ahead of a BatchNorm in training."""
    k = align_up(dims.in_channels)
    width = align_up(dims.ch1x1) + dims.reduced_channels

    def seconds(shape: tuple[int, int, int]) -> tuple[float, float, int]:
        return *_split_seconds(n_pixels, width, k, shape, ops, target), -shape[1]

    # one launch where launches are what it costs: inference, and less than a few waves of training
    together = not save or norm or launches_together(n_pixels, target)
    # the bits of 256 rows, and those of 128 x 256 beside the pool's registers, would spill
    largest = ops.max_elements(target)
    if save and together:
        largest = min(largest, 128 * 128)
    widths = list(WIDTH_EFFICIENCY)
    shapes = [
        (bm, bn, tail)
        for bm in _heights(ops, 128 if save else 256)
        for bn in widths
        if bn >= 32 and bm * bn <= largest
        for tail in [0, *(t for t in widths if 32 <= t < bn and width > t)]
    ]
    bm, bn, tail = min(shapes, key=seconds)
    gemm = Tile(bm, bn, _block_k(k, ops))
    # nine loads a channel: a narrow step keeps maximum and winner of a tile in registers
    pool_rows = 128 if ops.itemsize == 2 and n_pixels >= 128 * target.processors else 64
    # four warps would spill beside the moments of 64 x 128 sums (sm_89)
    widest = 64 if norm and warps([gemm]) == 4 else 128
    pool = Tile(pool_rows, min(widest, max(32, power_of_two(dims.pool_proj))), 32)
    if not ops.tensor_cores:
        pool = Tile(64, 64, 16)
    num_warps = warps([gemm])
    if save and together and pool.block_n == 128:
        # its gather is the longest program, and with 64 sums a thread one value spilled (sm_89)
        num_warps = 8
    return PointwiseConfig(
        gemm,
        tail,
        pool,
        together,
        num_warps,
        stages([gemm], ops, target),
        8 if pool.block_m == 128 else 4,
    )


@functools.lru_cache(maxsize=4096)
def branches_config(
    dims: InceptionDims, n_pixels: int, ops: Operands, target: Target, norm: bool = False
) -> BranchesConfig:
    """Launch B; with `norm` ahead of a BatchNorm in training."""
    c3, c5 = align_up(dims.ch3x3red), align_up(dims.ch5x5red)
    # with moments of its results a tile of 256 columns would spill in fp16
    largest = dict(max_width=128, max_elements=target.max_moments_tile) if norm else {}
    conv3, tail = conv_split(n_pixels, dims.ch3x3, c3, 9, ops, target, **largest)
    conv5 = conv_tile(n_pixels, dims.ch5x5, c5, dims.kernel_5x5**2, ops, target, **largest)
    tiles = [conv3, conv5]
    return BranchesConfig(conv3, tail, conv5, warps(tiles), stages(tiles, ops, target))


def conv_tile(
    m: int,
    n: int,
    channels: int,
    taps: int,
    ops: Operands,
    target: Target,
    max_width: int = 256,
    max_elements: int | None = None,
) -> Tile:
    step = _block_k(channels, ops)
    depth = taps * align_up(channels, step)
    shape = best_tile(m, n, depth, ops, target, max_width=max_width, max_elements=max_elements)
    return Tile(*shape, step)


def conv_split(
    m: int,
    n: int,
    channels: int,
    taps: int,
    ops: Operands,
    target: Target,
    max_width: int = 256,
    max_elements: int | None = None,
) -> tuple[Tile, int]:
    """`conv_tile` and 0, or a tile and the width of one narrower tile behind it where that takes
    no longer and saves TAIL_GAIN of time or work: 288 = 2 * 128 + 32."""
    uniform = conv_tile(m, n, channels, taps, ops, target, max_width, max_elements)
    depth = taps * align_up(channels, uniform.block_k)
    largest = ops.max_elements(target)
    limit = min(max_elements or largest, largest)
    without = (uniform.block_m, uniform.block_n, 0)
    shapes = [
        (bm, bn, tail)
        for bm in _heights(ops)
        for bn in WIDTH_EFFICIENCY
        if bn <= max_width and bm * bn <= limit
        for tail in WIDTH_EFFICIENCY
        if tail < bn and 0 < split_width(n, bn, tail)[0] * bn < n
    ]

    def seconds(shape: tuple[int, int, int]) -> tuple[float, float]:
        return _split_seconds(m, n, depth, shape, ops, target)

    bm, bn, tail = min([without, *shapes], key=seconds)
    gains = (
        mixed < (1 - TAIL_GAIN) * alone
        for mixed, alone in zip(seconds((bm, bn, tail)), seconds(without), strict=True)
    )
    if not any(gains):
        return uniform, 0
    return Tile(bm, bn, uniform.block_k), tail


def gated_tile(
    m: int, n: int, channels: int, taps: int, ops: Operands, target: Target, norm: bool = False
) -> Tile:
    """The tile of a data gradient that a ReLU masks; with `norm` that of a BatchNorm.

    The mask of 128 x 256 would spill beside its accumulators, so would that of 256 x 128 with the
    addresses of a long step, or with BatchNorm's second sum.
    """
    largest = 128 * 128 if norm else None
    return _gated(conv_tile(m, n, channels, taps, ops, target, max_width=128, max_elements=largest))


def _gated(tile: Tile) -> Tile:
    if tile.block_m * tile.block_n <= 128 * 128:
        return tile
    return replace(tile, block_k=min(tile.block_k, 32))


@functools.lru_cache(maxsize=4096)
def mask_config(slots: int, n_pixels: int, target: Target) -> MaskConfig:
    """Launch M: about four programs a processor, each walking whole tiles of pixels."""
    block_c = min(128, max(16, power_of_two(slots)))
    columns = math.ceil(slots / block_c)
    pixels = math.ceil(n_pixels * columns / (4 * target.processors))
    return MaskConfig(32, block_c, max(32, align_up(pixels, 32)), 4)


@functools.lru_cache(maxsize=4096)
def dgrad_config(
    dims: InceptionDims, n_pixels: int, ops: Operands, target: Target, norm: bool = False
) -> DgradConfig:
    """Launch L1; with `norm` between BatchNorms in training."""
    taps5 = dims.kernel_5x5**2
    s3, s5 = align_up(dims.ch3x3), align_up(dims.ch5x5)
    largest = 128 * 128 if norm else None
    conv3, tail = conv_split(
        n_pixels, dims.ch3x3red, s3, 9, ops, target, max_width=128, max_elements=largest
    )
    conv3 = _gated(conv3)
    conv5 = gated_tile(n_pixels, dims.ch5x5red, s5, taps5, ops, target, norm)
    pool = conv_tile(n_pixels, dims.in_channels, align_up(dims.pool_proj), 1, ops, target)
    tiles = [conv3, conv5, pool]
    return DgradConfig(conv3, tail, conv5, pool, warps(tiles), stages(tiles, ops, target))


@functools.lru_cache(maxsize=4096)
def input_grad_config(
    dims: InceptionDims, n_pixels: int, ops: Operands, target: Target
) -> InputGradConfig:
    """Launch L2."""
    k = align_up(dims.ch1x1) + dims.reduced_channels
    config = gathered_config(n_pixels, dims.in_channels, k, ops, target)
    if ops.short_of_registers(target):
        # at three stages a short reduction is unrolled whole, and spills beside what others add
        return replace(config, num_stages=min(2, config.num_stages))
    return config


def gathered_config(
    m: int,
    n: int,
    depth: int,
    ops: Operands,
    target: Target,
    max_elements: int = 128 * 128,
) -> InputGradConfig:
    """Products behind the pool's gather, which needs registers: tiles of at most 128 x 128."""
    # all reductions are walked with one step; 32 pads odd widths least
    step = 32 if ops.itemsize == 2 else 16
    tile = Tile(*best_tile(m, n, depth, ops, target, max_elements=max_elements), step)
    return InputGradConfig(tile, warps([tile]), stages([tile], ops, target))


def launches_together(n_pixels: int, target: Target) -> bool:
    """Whether A's parts in training, and L2 and L3, are one launch: where none fills the processors
    they share them, and a launch is a good part of their time."""
    return n_pixels <= 64 * target.processors


def finish_config() -> FinishConfig:
    """Launch F: reads of 128 bytes along the output channels, writes of as much along the filter
    positions."""
    return FinishConfig(32, 32, 4)


def global_pool_config(channels: int, n_pixels: int) -> GlobalPoolConfig:
    """Global average pooling: 128 bytes or more of a pixel, and few enough pixels for registers."""
    block_c = min(128, max(16, power_of_two(channels)))
    return GlobalPoolConfig(min(32, power_of_two(n_pixels)), block_c, 4)

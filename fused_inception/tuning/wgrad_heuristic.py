"""Launch configurations of filter gradients without a measurement: tiles, and into how many parts
the pixels of each are split.

A launch lasts until its last program ends, so programs should be short; but each split writes
partial sums that the next launch reads. Both are estimated together for the whole launch.
"""

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.tuning.configs import Tile, WgradConfig, WgradJob
from fused_inception.tuning.heuristic import Operands, best_tile, stages, tile_seconds, warps
from fused_inception.tuning.limits import MAX_SPLITS
from fused_inception.tuning.targets import Target

# how long a program may take, seconds: below the first it drowns in its prologue
PROGRAM_SECONDS = tuple(us * 1e-6 for us in (6, 8, 12, 16, 20, 25, 30, 38, 45, 55, 65, 80, 100))
# of an element of a 3x3 maximum: 22 instructions of sm_90's compiled loop, 128 lanes a cycle, 1.755
# GHz
POOL_SECONDS = 22 / 128 / 1.755e9
PARTIAL_BYTES = 2 * 4  # of a partial sum: fp32, written and read


@dataclass(frozen=True)
class FilterGradient:
    """One product of a launch: filter positions (tap, channel) x output channels, summed over the
    pixels."""

    rows: int
    columns: int
    pooled: bool = False  # its rows are maxima of 3x3 windows
    window: bool = False  # of more than one tap
    max_elements: int | None = None
    pixels: int | None = None  # where they are not those of the launch

    def tile(self, n_pixels: int, ops: Operands, target: Target) -> Tile:
        """The cheapest, of however many splits."""
        shape = best_tile(
            self.rows, self.columns, n_pixels, ops, target,
            max_elements=64 * 128 if self.pooled else self.max_elements,
            # in fp32 the taps of 256 rows would spill (sm_80)
            max_height=128 if self.window and ops.itemsize == 4 else 256,
            splits_free=True,
        )  # fmt: skip
        # in exact fp32 products and addresses of 32 pixels would spill (sm_100), but for maxima
        step = 64 if ops.itemsize == 2 else 32 if ops.tensor_cores or self.pooled else 16
        if self.pooled:
            # three taps of 64 x 256 in 16 bits, loaded at once, would spill (sm_120)
            step = min(step, 2**14 // (shape[0] * ops.itemsize))
        return Tile(*shape, step)

    def seconds(self, tile: Tile, n_pixels: int, ops: Operands, target: Target) -> float:
        """Of one program for so many pixels: its products and operands, or the instructions of its
        maxima."""
        products = tile_seconds(tile.block_m, tile.block_n, n_pixels, ops, target)
        return max(products, tile.block_m * n_pixels * POOL_SECONDS) if self.pooled else products


def wgrad_jobs(
    gradients: Sequence[FilterGradient], n_pixels: int, ops: Operands, target: Target
) -> list[WgradJob]:
    """Tile and splits of each of `gradients`, which one launch computes in this order."""
    pixels = [n_pixels if gradient.pixels is None else gradient.pixels for gradient in gradients]
    tiles = [g.tile(n, ops, target) for g, n in zip(gradients, pixels, strict=True)]

    def jobs(limit: float) -> list[WgradJob]:
        found = []
        for gradient, n, tile in zip(gradients, pixels, tiles, strict=True):
            splits = math.ceil(gradient.seconds(tile, n, ops, target) / limit)
            most = min(MAX_SPLITS, n // (4 * tile.block_k))
            found.append(WgradJob(tile, max(1, min(splits, most))))
        return found

    def seconds(jobs: list[WgradJob]) -> float:
        programs, partials = [], 0
        for gradient, n, job in zip(gradients, pixels, jobs, strict=True):
            chunk, splits = job.chunks(n)
            tiles = math.ceil(gradient.rows / job.tile.block_m)
            tiles *= math.ceil(gradient.columns / job.tile.block_n)
            programs.append((tiles * splits, gradient.seconds(job.tile, chunk, ops, target)))
            partials += gradient.rows * gradient.columns * splits
        return _makespan(programs, target) + partials * PARTIAL_BYTES / target.memory_bytes

    # of equals the one that splits least
    return min((jobs(limit) for limit in reversed(PROGRAM_SECONDS)), key=seconds)


def _makespan(programs: Sequence[tuple[int, float]], target: Target) -> float:
    """Seconds until the last of (how many, seconds of each) has run: each processor takes the next
    one when it is free."""
    busy = [0.0] * target.processors  # until when, a heap
    for count, each in programs:
        last = max(busy)
        while count and busy[0] + each <= last:
            heapq.heapreplace(busy, busy[0] + each)
            count -= 1
        # now all end within one program of each other, and go on in rounds
        rounds, count = divmod(count, target.processors)
        busy = [end + rounds * each for end in busy]
        for _ in range(count):
            heapq.heapreplace(busy, busy[0] + each)
    return max(busy)


def wgrad_job(
    rows: int,
    columns: int,
    n_pixels: int,
    ops: Operands,
    target: Target,
    max_elements: int | None = None,
) -> WgradJob:
    """The same of a launch of one gradient."""
    gradient = FilterGradient(rows, columns, max_elements=max_elements)
    return wgrad_jobs([gradient], n_pixels, ops, target)[0]


@functools.lru_cache(maxsize=4096)
def wgrad_config(dims: InceptionDims, n_pixels: int, ops: Operands, target: Target) -> WgradConfig:
    """Launch L3."""
    s_in = align_up(dims.in_channels)
    s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
    taps5 = dims.kernel_5x5**2
    # as the kernel has its programs
    gradients = dict(
        projection=FilterGradient(s_in, sp, pooled=True),
        conv3=FilterGradient(9 * align_up(dims.ch3x3red), s3, window=True),
        branch1=FilterGradient(s_in, s1),
        reduces=FilterGradient(s_in, dims.reduced_channels),
        conv5=FilterGradient(taps5 * align_up(dims.ch5x5red), s5, window=True),
    )
    found = wgrad_jobs([*gradients.values()], n_pixels, ops, target)
    tiles = [job.tile for job in found]
    return WgradConfig(
        **dict(zip(gradients, found, strict=True)),
        num_warps=warps(tiles),
        num_stages=stages(tiles, ops, target),
    )

"""Launch configurations of pooling and normalisation without a measurement.

These kernels stream: one vector a thread, and enough programs for every processor, is all there is
to choose. Results do not depend on the choice.
"""

import functools
import math

from fused_inception.geometry import Window, align_up, power_of_two
from fused_inception.tuning.configs import MarchConfig, MaskConfig, VectorConfig
from fused_inception.tuning.targets import Target

# threads of a processor that run at a time, at about 100 registers each
RESIDENT_THREADS = 640


@functools.lru_cache(maxsize=4096)
def vector_config(n_vectors: int, target: Target) -> VectorConfig:
    """Four warps a program; fewer where that leaves processors without one."""
    warp = 64 if target.name.startswith("gfx") else 32
    num_warps = 4
    while num_warps > 1 and n_vectors < target.processors * num_warps * warp:
        num_warps //= 2
    return VectorConfig(num_warps * warp, num_warps)


@functools.lru_cache(maxsize=4096)
def masked_pool_config(channels: int, lanes: int, n_cells: int, target: Target) -> MaskConfig:
    """The gradient of a max pool behind a ReLU: 128 channels of some cells, a vector a thread, and
    about eight programs a processor, so that column sums have a few hundred rows at the most."""
    block_c = min(128, max(16, power_of_two(channels)))
    num_warps = 4
    cells = num_warps * 32 * lanes // block_c
    chunk = math.ceil(n_cells * math.ceil(channels / block_c) / (8 * target.processors))
    return MaskConfig(cells, block_c, max(cells, align_up(chunk, cells)), num_warps)


@functools.lru_cache(maxsize=4096)
def march_config(
    columns: int, height: int, vectors: int, window: Window, target: Target
) -> MarchConfig:
    """`columns` (of all images) of `height` windows or cells, of `vectors` vectors a pixel.

    Long columns save the rows that two strips share, short ones occupy the GPU.
    """
    resident = target.processors * RESIDENT_THREADS

    def cost(rows: int) -> tuple[int, int]:
        threads = columns * math.ceil(height / rows) * vectors
        rows_read = (rows - 1) * window.stride + max(window.kernel, window.stride)
        return math.ceil(threads / resident) * rows_read, rows

    rows = min(range(1, max(1, height) + 1), key=cost)
    config = vector_config(columns * math.ceil(height / rows) * vectors, target)
    return MarchConfig(rows, config.block_v, config.num_warps)

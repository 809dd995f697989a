"""Launch configurations of BatchNorm's own kernels, which are bound by the memory they stream."""

import functools
import math

from fused_inception.geometry import align_up, power_of_two
from fused_inception.tuning.configs import NormConfig, StatisticsConfig
from fused_inception.tuning.targets import Target


def statistics_config() -> StatisticsConfig:
    """Reads of 128 bytes along the channels, 64 tiles at a time; four warps spill on sm_89."""
    return StatisticsConfig(64, 32, 8)


def merge_config() -> StatisticsConfig:
    """All that a program merges is in registers at once."""
    return StatisticsConfig(128, 32, 8)


@functools.lru_cache(maxsize=4096)
def norm_config(slots: int, n_pixels: int, target: Target) -> NormConfig:
    """About four programs a processor, each of 64 channels at the most.

    Every program of a gradient adds up the partial sums of its channels again, which saves a launch
    and stays small: 64 channels of about as many rows as a column has programs; above
    `geometry.MANY_PIXELS` a launch adds them up first.
    """
    block_c = min(64, max(16, power_of_two(slots)))
    columns = math.ceil(slots / block_c)
    pixels = math.ceil(n_pixels * columns / (4 * target.processors))
    return NormConfig(32, block_c, max(32, align_up(pixels, 32)), 4)

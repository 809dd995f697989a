"""Launch configurations of the naive module, by the same estimate as those of the others."""

import functools

from fused_inception.geometry import NaiveDims, align_up
from fused_inception.tuning.configs import InputGradConfig, NaiveConfig, NaiveWgradConfig
from fused_inception.tuning.heuristic import (
    Operands,
    conv_tile,
    gathered_config,
    stages,
    warps,
)
from fused_inception.tuning.targets import Target
from fused_inception.tuning.wgrad_heuristic import FilterGradient, wgrad_jobs

TAPS = (1, 9, 25)


@functools.lru_cache(maxsize=4096)
def naive_config(dims: NaiveDims, n_pixels: int, ops: Operands, target: Target) -> NaiveConfig:
    """Forward."""
    channels = align_up(dims.in_channels)

    def config(max_elements: int) -> NaiveConfig:
        conv1, conv3, conv5 = tiles = [
            conv_tile(n_pixels, width, channels, taps, ops, target, max_elements=max_elements)
            for width, taps in zip(dims.conv_widths, TAPS, strict=True)
        ]
        return NaiveConfig(conv1, conv3, conv5, warps(tiles), stages(tiles, ops, target))

    # larger ones spill beside the ReLU bits; without a pipeline operands lie in registers too
    largest = config(128 * 128)
    return largest if largest.num_stages > 1 else config(128 * 64)


@functools.lru_cache(maxsize=4096)
def naive_input_grad_config(
    dims: NaiveDims, n_pixels: int, ops: Operands, target: Target
) -> InputGradConfig:
    """The gradient of x: three data gradients behind the gather of the pool's."""
    depth = sum(taps * align_up(width) for width, taps in zip(dims.conv_widths, TAPS, strict=True))
    # 128 x 64 sums of fp32 products beside the addresses of three reductions spill on sm_80
    largest = 128 * 128 if ops.itemsize == 2 else target.max_tile // 4
    return gathered_config(n_pixels, dims.in_channels, depth, ops, target, largest)


@functools.lru_cache(maxsize=4096)
def naive_wgrad_config(
    dims: NaiveDims, n_pixels: int, ops: Operands, target: Target
) -> NaiveWgradConfig:
    """Three filter gradients."""
    channels = align_up(dims.in_channels)
    gradients = [
        FilterGradient(taps * channels, align_up(width))
        for width, taps in zip(dims.conv_widths, TAPS, strict=True)
    ]
    conv1, conv3, conv5 = jobs = wgrad_jobs(gradients, n_pixels, ops, target)
    tiles = [job.tile for job in jobs]
    return NaiveWgradConfig(conv1, conv3, conv5, warps(tiles), stages(tiles, ops, target))

"""Max pooling and local response normalisation on the Triton path, one launch a direction."""

import torch

from fused_inception.geometry import Window, align_up, power_of_two
from fused_inception.kernels.lrn import Norm, launch_lrn_bwd, launch_lrn_fwd
from fused_inception.kernels.lrn_pool import launch_lrn_max_pool_bwd, launch_lrn_max_pool_fwd
from fused_inception.kernels.max_pool import (
    launch_masked_max_pool_bwd,
    launch_max_pool_bwd,
    launch_max_pool_fwd,
)
from fused_inception.kernels.pool_lrn import launch_max_pool_lrn_bwd, launch_max_pool_lrn_fwd
from fused_inception.kernels.vectors import lanes_of
from fused_inception.ops.layout import empty_channels_last, for_kernels
from fused_inception.ops.problem import problem_of
from fused_inception.ops.stages import NormNumbers
from fused_inception.tuning.chosen import march_config, vector_config
from fused_inception.tuning.configs import MarchConfig, VectorConfig
from fused_inception.tuning.pool_heuristic import masked_pool_config


def max_pool2d(
    x: torch.Tensor, window: Window, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, exactly channels last, and with `save` the winning tap of each window, 1 byte."""
    y, saved = _pooled_like(x, window), []
    index = x.new_empty(0, dtype=torch.uint8)
    if save:
        (index,) = saved = max_pool2d_saved_like(y)
    launch_max_pool_fwd(for_kernels(x), y, index, window, _by_pixel(y), save=save)
    return y, saved


def max_pool2d_saved_like(y: torch.Tensor) -> list[torch.Tensor]:
    """Uninitialised tensors with the metadata of what is saved; channels are padded."""
    n, c, h, w = y.shape
    return [empty_channels_last(n, align_up(c), h, w, dtype=torch.uint8, device=y.device)]


def max_pool2d_backward(
    dy: torch.Tensor, shape: tuple[int, int, int, int], index: torch.Tensor, window: Window
) -> torch.Tensor:
    """The gradient of x, which is of `shape`, from dy of any strides."""
    dx = empty_channels_last(*shape, dtype=dy.dtype, device=dy.device)
    launch_max_pool_bwd(for_kernels(dy), index, dx, window, _by_cell(dx, window))
    return dx


def max_pool2d_backward_masked(
    dy: torch.Tensor,
    shape: tuple[int, int, int, int],
    index: torch.Tensor,
    window: Window,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient behind the ReLU whose bits `mask` has, of which x is the output, and its column
    sums over chunks of pixels; channels are a multiple of 8."""
    n, c, height, width = shape
    dx = empty_channels_last(*shape, dtype=dy.dtype, device=dy.device)
    cells = power_of_two(n * window.cells(height) * window.cells(width))
    config = masked_pool_config(c, lanes_of(dy.dtype), cells, problem_of(dx)[1])
    return dx, launch_masked_max_pool_bwd(for_kernels(dy), index, mask, dx, window, config)


def local_response_norm(
    x: torch.Tensor, norm: NormNumbers, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, exactly channels last; nothing but x is needed for its gradient."""
    y = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    launch_lrn_fwd(for_kernels(x), y, Norm(*norm), _by_pixel(y))
    return y, []


def local_response_norm_saved_like(y: torch.Tensor) -> list[torch.Tensor]:
    """Nothing."""
    return []


def local_response_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, norm: NormNumbers
) -> torch.Tensor:
    """The gradient of x."""
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    launch_lrn_bwd(for_kernels(x), for_kernels(dy), dx, Norm(*norm), _by_pixel(dx))
    return dx


def lrn_max_pool2d(
    x: torch.Tensor, norm: NormNumbers, window: Window, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, exactly channels last, and with `save` the winning tap of each window, 1 byte."""
    y, saved = _pooled_like(x, window), []
    index = x.new_empty(0, dtype=torch.uint8)
    if save:
        (index,) = saved = max_pool2d_saved_like(y)
    n, _, height, width = y.shape
    config = _marching(y, n * width, height, window)
    launch_lrn_max_pool_fwd(for_kernels(x), y, index, Norm(*norm), window, config, save=save)
    return y, saved


lrn_max_pool2d_saved_like = max_pool2d_saved_like


def lrn_max_pool2d_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    norm: NormNumbers,
    window: Window,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """The gradient of x; with `gated`, masked by the ReLU that x is the output of."""
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    launch_lrn_max_pool_bwd(
        for_kernels(x), for_kernels(dy), index, dx, Norm(*norm), window, _by_cell(dx, window),
        gated=gated,
    )  # fmt: skip
    return dx


def max_pool2d_lrn(
    x: torch.Tensor, norm: NormNumbers, window: Window, save: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """y, exactly channels last, and with `save` the pooled map and its winning taps, 1 byte each.

    The pooled map is a quarter of x where windows move by 2, and all that the norm's gradient
    reads.
    """
    y, saved = _pooled_like(x, window), []
    pooled, index = x.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    if save:
        pooled, index = saved = max_pool2d_lrn_saved_like(y)
    launch_max_pool_lrn_fwd(
        for_kernels(x), y, pooled, index, Norm(*norm), window, _by_pixel(y), save=save
    )
    return y, saved


def max_pool2d_lrn_saved_like(y: torch.Tensor) -> list[torch.Tensor]:
    """Uninitialised tensors with the metadata of what is saved; channels are padded."""
    n, c, h, w = y.shape
    pooled = empty_channels_last(n, align_up(c), h, w, dtype=y.dtype, device=y.device)
    return [pooled, *max_pool2d_saved_like(y)]


def max_pool2d_lrn_backward(
    dy: torch.Tensor,
    shape: tuple[int, int, int, int],
    pooled: torch.Tensor,
    index: torch.Tensor,
    norm: NormNumbers,
    window: Window,
    *,
    gated: bool = False,
) -> torch.Tensor:
    """The gradient of x, which is of `shape`, from dy of any strides; with `gated`, masked by the
    ReLU that x is the output of."""
    dx = empty_channels_last(*shape, dtype=dy.dtype, device=dy.device)
    n, _, height, width = shape
    config = _marching(dx, n * window.cells(width), window.cells(height), window)
    launch_max_pool_lrn_bwd(
        pooled, for_kernels(dy), index, dx, Norm(*norm), window, config, gated=gated
    )
    return dx


def _pooled_like(x: torch.Tensor, window: Window) -> torch.Tensor:
    n, c, h, w = x.shape
    h, w = window.out(h), window.out(w)
    return empty_channels_last(n, c, h, w, dtype=x.dtype, device=x.device)


def _groups(y: torch.Tensor) -> int:
    return align_up(y.shape[1]) // lanes_of(y.dtype)


def _by_pixel(y: torch.Tensor) -> VectorConfig:
    n, _, h, w = y.shape
    return vector_config(power_of_two(n * h * w * _groups(y)), problem_of(y)[1])


def _by_cell(dx: torch.Tensor, window: Window) -> VectorConfig:
    n, _, h, w = dx.shape
    cells = n * window.cells(h) * window.cells(w)
    return vector_config(power_of_two(cells * _groups(dx)), problem_of(dx)[1])


def _marching(y: torch.Tensor, columns: int, height: int, window: Window) -> MarchConfig:
    return march_config(power_of_two(columns), height, _groups(y), window, problem_of(y)[1])

"""Global average pooling on the Triton path."""

import torch

from fused_inception.kernels.global_pool import launch_global_pool_bwd, launch_global_pool_fwd
from fused_inception.ops.layout import empty_channels_last
from fused_inception.tuning.heuristic import global_pool_config


def forward(x: torch.Tensor, kept: torch.Tensor | None, scale: float) -> torch.Tensor:
    """[N, C, 1, 1], the mean over all pixels, from x of any strides; dropout where it is `kept`."""
    n, c, height, width = x.shape
    y = empty_channels_last(n, c, 1, 1, dtype=x.dtype, device=x.device)
    launch_global_pool_fwd(x, _dense(kept), scale, y, global_pool_config(c, height * width))
    return y


def backward(
    dy: torch.Tensor, kept: torch.Tensor | None, scale: float, shape: tuple[int, ...]
) -> torch.Tensor:
    """dx of shape `shape`, exactly channels last, from dy of any strides."""
    n, c, height, width = shape
    dx = empty_channels_last(n, c, height, width, dtype=dy.dtype, device=dy.device)
    launch_global_pool_bwd(dy, _dense(kept), scale, dx, global_pool_config(c, height * width))
    return dx


def backward_masked(
    dy: torch.Tensor,
    kept: torch.Tensor | None,
    scale: float,
    shape: tuple[int, ...],
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx behind the ReLU whose bits `mask` has, and its column sums over each image."""
    n, c, height, width = shape
    dx = empty_channels_last(n, c, height, width, dtype=dy.dtype, device=dy.device)
    config = global_pool_config(c, height * width)
    return dx, launch_global_pool_bwd(dy, _dense(kept), scale, dx, config, mask)


def _dense(kept: torch.Tensor | None) -> torch.Tensor | None:
    return None if kept is None else kept.contiguous()

"""The script of average pool, 1x1 convolution, bias and ReLU on the Triton path."""

import torch
from torch import Tensor

from fused_inception.geometry import AvgWindow, align_up
from fused_inception.kernels.avg_pool_project import launch_avg_pool_project_fwd
from fused_inception.kernels.avg_pool_project_grad import launch_avg_pool_project_bwd
from fused_inception.kernels.conv2d import conv2d_unfinished, pack_filter
from fused_inception.kernels.finish import launch_finish
from fused_inception.ops import filter_cache
from fused_inception.ops.layout import empty_channels_last, empty_filter_grad, for_kernels
from fused_inception.ops.problem import problem_of
from fused_inception.tuning.chosen import avg_pool_project_config
from fused_inception.tuning.configs import AvgPoolProjectConfig
from fused_inception.tuning.heuristic import Operands, finish_config


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, window: AvgWindow, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C_OUT * OH * OW] dense, and with `save` [the pooled map], whose channels are padded."""
    n, c, height, width = x.shape
    sides = window.out(height), window.out(width)
    y = x.new_empty((n, weight.shape[0], *sides))
    config, ops = _config(y, c, (height, width), window)
    pooled = empty_channels_last(
        n if save else 0, align_up(c), *sides, dtype=x.dtype, device=x.device
    )
    w, b = filter_cache.kept(
        [weight, bias], (x.dtype,), lambda: pack_filter(weight, bias, x.dtype), save=save
    )
    launch_avg_pool_project_fwd(
        for_kernels(x), w, b, y, pooled, window, config, save=save, precision=ops.precision
    )
    return y.flatten(1), [pooled] if save else []


def backward(
    dy: Tensor,
    y: Tensor,
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor,
    shape: tuple[int, ...],
    window: AvgWindow,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, which is of `shape`, weight, bias; 0 elements where `needs` says no."""
    need_x, need_w, need_b = needs
    n, c, height, width = shape
    y = y.view(n, weight.shape[0], *pooled.shape[2:])
    config, ops = _config(y, c, (height, width), window)
    w = weight.new_empty((align_up(c), 1, align_up(weight.shape[0])), dtype=dy.dtype)
    dx = dy.new_empty(0)
    if need_x:
        w, _ = pack_filter(weight, None, dy.dtype)
        dx = empty_channels_last(n, c, height, width, dtype=dy.dtype, device=dy.device)
    partial_w, partial_b = launch_avg_pool_project_bwd(
        dy.contiguous(), y, pooled, w, dx, shape, window, config,
        need_x=need_x, need_w=need_w, need_b=need_b, precision=ops.precision,
    )  # fmt: skip
    dw = empty_filter_grad(weight) if need_w else weight.new_empty(0)
    db = torch.empty_like(bias) if need_b else bias.new_empty(0)
    if need_w or need_b:
        part = conv2d_unfinished(partial_w, partial_b, dw, db, taps=1)
        launch_finish([part], finish_config())
    return [dx, dw, db]


def _config(
    y: Tensor, c_in: int, sides: tuple[int, int], window: AvgWindow
) -> tuple[AvgPoolProjectConfig, Operands]:
    _, c_out, height, width = y.shape
    ops, target, n_windows = problem_of(y)
    pixels = window.extent(sides[0]) * window.extent(sides[1])
    config = avg_pool_project_config(c_in, c_out, height * width, pixels, n_windows, ops, target)
    return config, ops

"""One convolution with BatchNorm in training, with PyTorch's own operators."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.geometry import conv_out
from fused_inception.ops import batch_norm_aten
from fused_inception.ops.layout import channels_last, empty_channels_last
from fused_inception.ops.running import Running

aten = torch.ops.aten


def forward(
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: float,
    stride: int,
    padding: int,
) -> tuple[Tensor, list[Tensor]]:
    """relu(batch norm(conv(x))) and the tensors of `saved_like`."""
    z = channels_last(F.conv2d(x, filters[0].to(x.dtype), None, stride, padding))
    gamma, beta = (gammas[0], betas[0]) if gammas else (None, None)
    a, mean, inverse = batch_norm_aten.forward(z, gamma, beta, running, 0, eps)
    return a.relu_(), [z, torch.stack([mean, inverse])]


def saved_like(x: Tensor, filters: list[Tensor], stride: int, padding: int) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what backward needs besides x, y and the filter:
    the raw result, mean and inverse deviation."""
    n, _, h, w = x.shape
    c_out, _, k, _ = filters[0].shape
    h, w = conv_out(h, k, stride, padding), conv_out(w, k, stride, padding)
    dtype = batch_norm_aten.statistics_dtype(x)
    return [
        empty_channels_last(n, c_out, h, w, dtype=x.dtype, device=x.device),
        x.new_empty((2, c_out), dtype=dtype),
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    gammas: list[Tensor],
    eps: float,
    stride: int,
    padding: int,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The needed gradients of x, filter, gamma and beta; None for the others."""
    need_x, need_w, need_gamma, need_beta = needs
    z, (mean, inverse) = saved
    g = aten.threshold_backward(dy, y, 0)
    dz, dgamma, dbeta = batch_norm_aten.backward(
        channels_last(g), z, gammas[0] if gammas else None, mean, inverse, eps,
        (need_x or need_w, need_gamma, need_beta),
    )  # fmt: skip
    dx: Tensor | None = None
    dw: Tensor | None = None
    if dz is not None and (need_x or need_w):
        dx, dw, _ = aten.convolution_backward.default(
            dz, x, filters[0].to(x.dtype), None, [stride] * 2, [padding] * 2, [1, 1], False,
            [0, 0], 1, [need_x, need_w, False],
        )  # fmt: skip
    return [None if dx is None else channels_last(dx), dw, dgamma, dbeta]

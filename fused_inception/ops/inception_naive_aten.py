"""The naive module with PyTorch's own operators: any device, any floating dtype."""

import torch
from torch import Tensor

from fused_inception.geometry import NaiveDims
from fused_inception.ops.inception_aten import cast, conv, conv_backward, masked, relu_into
from fused_inception.ops.layout import channels_last, empty_channels_last, naive_dims_of

aten = torch.ops.aten
POOL = ([3, 3], [1, 1], [1, 1], [1, 1], False)


def forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """The module's output, and with `save` the tensors of `saved_like`.

    ReLU writes every convolution straight into its slice.
    """
    dims = naive_dims_of(filters)
    x = channels_last(x)
    n, _, h, w = x.shape
    y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
    *parts, pool = y.split(dims.branch_widths, dim=1)
    for out, weight, bias in zip(parts, cast(filters, x.dtype), cast(biases, x.dtype), strict=True):
        relu_into(out, conv(x, weight, bias))
    pooled, index = aten.max_pool2d_with_indices(x, *POOL)
    pool.copy_(pooled)
    return y, [channels_last(index)] if save else []


def saved_like(x: Tensor, dims: NaiveDims) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what backward needs besides x, y and the filters:
    the int64 indices of the pool [N, C_in, H, W], channels last."""
    return [empty_channels_last(*x.shape, dtype=torch.int64, device=x.device)]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    needs: list[bool],
) -> list[Tensor | None]:
    """The needed gradients of x, the three filters and the three biases; None for the others.

    dy: [N, C_OUT, H, W] of any strides.
    """
    dims = naive_dims_of(filters)
    x = channels_last(x)
    (index,) = saved
    need_x, need_w, need_b = needs[0], needs[1:4], needs[4:]
    dw: list[Tensor | None] = [None] * 3
    db: list[Tensor | None] = [None] * 3
    *dy_parts, dy_pool = dy.split(dims.branch_widths, dim=1)
    y_parts = y.split(dims.branch_widths, dim=1)
    dx: Tensor | None = None
    if need_x:
        dx = aten.max_pool2d_with_indices_backward(channels_last(dy_pool), x, *POOL, index)
    for i, weight in enumerate(cast(filters, x.dtype)):
        needed = (need_x, need_w[i], need_b[i])
        if any(needed):
            dz = masked([(dy_parts[i], y_parts[i])])
            dx_part, dw[i], db[i] = conv_backward(dz, x, weight, needed)
            if dx_part is not None:
                dx = dx_part if dx is None else dx.add_(dx_part)
    return [None if dx is None else channels_last(dx), *dw, *db]

"""The module with BatchNorm in training, with PyTorch's own operators."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.ops import batch_norm_aten
from fused_inception.ops.layout import channels_last, dims_of, empty_channels_last
from fused_inception.ops.running import Running

aten = torch.ops.aten


def forward(
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: float,
) -> tuple[Tensor, list[Tensor]]:
    """The module's output and the tensors of `saved_like`; ReLU writes every branch straight into
    its slice."""
    dims = dims_of(filters)
    x = channels_last(x)
    n, _, h, w = x.shape
    y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
    slices = dict(zip((0, 2, 4, 5), y.split(dims.branch_widths, dim=1), strict=True))
    raw: list[Tensor] = [x] * 6
    means: list[Tensor] = [x] * 6
    inverses: list[Tensor] = [x] * 6

    def block(i: int, source: Tensor) -> Tensor:
        weight = filters[i].to(x.dtype)
        raw[i] = channels_last(F.conv2d(source, weight, padding=weight.shape[-1] // 2))
        gamma, beta = (gammas[i], betas[i]) if gammas else (None, None)
        a, means[i], inverses[i] = batch_norm_aten.forward(raw[i], gamma, beta, running, i, eps)
        # one pass from the normalised map to the slice; NaN stays NaN
        return torch.clamp_min(a, 0, out=slices.get(i, a))

    block(0, x)
    r3 = block(1, x)
    block(2, r3)
    r5 = block(3, x)
    block(4, r5)
    pooled, index = (channels_last(t) for t in F.max_pool2d(x, 3, 1, 1, return_indices=True))
    block(5, pooled)
    return y, [*raw, r3, r5, pooled, index, torch.cat([*means, *inverses])]


def saved_like(x: Tensor, filters: list[Tensor]) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what backward needs besides x, y and the filters.

    Six raw results, both reduced maps, the pooled input and its int64 indices, all channels last;
    means and inverse deviations of all layers.
    """
    dims = dims_of(filters)
    n, c, h, w = x.shape
    widths = [shape[0] for shape in dims.filter_shapes]
    maps = [(width, x.dtype) for width in (*widths, dims.ch3x3red, dims.ch5x5red, c)]
    dtype = batch_norm_aten.statistics_dtype(x)
    return [
        *(
            empty_channels_last(n, channels, h, w, dtype=of, device=x.device)
            for channels, of in (*maps, (c, torch.int64))
        ),
        x.new_empty(2 * sum(widths), dtype=dtype),
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    gammas: list[Tensor],
    eps: float,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The needed gradients of x, six filters, six gammas and six betas; None for the others."""
    dims = dims_of(filters)
    x = channels_last(x)
    raw, (r3, r5, pooled, index, statistics) = saved[:6], saved[6:]
    vectors = statistics.split([f.shape[0] for f in filters] * 2)
    means, inverses = vectors[:6], vectors[6:]
    need_x, need_w, need_gamma, need_beta = needs[0], needs[1:7], needs[7:13], needs[13:]
    trained = [any(of) for of in zip(need_w, need_gamma, need_beta, strict=True)]
    dw: list[Tensor | None] = [None] * 6
    dgamma: list[Tensor | None] = [None] * 6
    dbeta: list[Tensor | None] = [None] * 6

    def block(i: int, da: Tensor, a: Tensor, source: Tensor, need_source: bool) -> Tensor | None:
        if not need_source and not trained[i]:
            return None
        g = empty_channels_last(*a.shape, dtype=a.dtype, device=a.device)
        aten.threshold_backward.grad_input(da, a, 0, grad_input=g)
        need_z = need_source or need_w[i]
        dz, dgamma[i], dbeta[i] = batch_norm_aten.backward(
            g, raw[i], gammas[i] if gammas else None, means[i], inverses[i], eps,
            (need_z, need_gamma[i], need_beta[i]),
        )  # fmt: skip
        if dz is None or not need_z:
            return None
        weight = filters[i].to(x.dtype)
        padding = weight.shape[-1] // 2
        d_source, dw[i], _ = aten.convolution_backward.default(
            dz, source, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1,
            [need_source, need_w[i], False],
        )  # fmt: skip
        return d_source

    dx: Tensor | None = None
    dy1, dy3, dy5, dyp = dy.split(dims.branch_widths, dim=1)
    y1, y3, y5, yp = y.split(dims.branch_widths, dim=1)
    d_pooled = block(5, dyp, yp, pooled, need_x)
    if d_pooled is not None:
        dx = aten.max_pool2d_with_indices_backward.default(
            d_pooled, x, [3, 3], [1, 1], [1, 1], [1, 1], False, index
        )
    readers = [block(0, dy1, y1, x, need_x)]
    for i, dy_branch, y_branch, r in ((1, dy3, y3, r3), (3, dy5, y5, r5)):
        dr = block(i + 1, dy_branch, y_branch, r, need_x or trained[i])
        readers.append(None if dr is None else block(i, dr, r, x, need_x))
    for part in readers:
        if part is not None:
            dx = part if dx is None else dx.add_(part)
    return [None if dx is None else channels_last(dx), *dw, *dgamma, *dbeta]

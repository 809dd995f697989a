"""The Inception module with PyTorch's own operators: any device, any floating dtype."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.geometry import InceptionDims
from fused_inception.ops.layout import channels_last, dims_of, empty_channels_last

aten = torch.ops.aten
_T = TypeVar("_T")

# below this many pixels, copying the filters side by side costs more than reading x three times:
# one backward for three takes 1.5 times as long in 5b at 49 pixels, 0.9 times at 392 (a CPU core)
MERGE_PIXELS = 256


def forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """The module's output, and with `save` the tensors of `saved_like`.

    ReLU writes every branch straight into its slice.
    """
    dims = dims_of(filters)
    x = channels_last(x)
    w1, w3r, w3, w5r, w5, wp = cast(filters, x.dtype)
    b1, b3r, b3, b5r, b5, bp = cast(biases, x.dtype)
    n, _, h, w = x.shape
    y = empty_channels_last(n, dims.out_channels, h, w, dtype=x.dtype, device=x.device)
    y1, y3, y5, yp = y.split(dims.branch_widths, dim=1)
    r3, r5 = (
        empty_channels_last(n, c, h, w, dtype=x.dtype, device=x.device)
        for c in (dims.ch3x3red, dims.ch5x5red)
    )

    for group in _groups([(w1, b1, y1), (w3r, b3r, r3), (w5r, b5r, r5)], x):
        weights, group_biases, outputs = zip(*group, strict=True)
        whole = conv(x, _cat(weights), _cat(group_biases))
        for out, part in zip(outputs, whole.split([t.shape[1] for t in outputs], 1), strict=True):
            relu_into(out, part)
    relu_into(y3, conv(r3, w3, b3))
    relu_into(y5, conv(r5, w5, b5))
    pooled, index = (channels_last(t) for t in F.max_pool2d(x, 3, 1, 1, return_indices=True))
    relu_into(yp, conv(pooled, wp, bp))
    return y, [r3, r5, pooled, index] if save else []


def saved_like(x: Tensor, dims: InceptionDims) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what backward needs besides x, y and the filters.

    The reduced maps [N, ch3x3red, H, W] and [N, ch5x5red, H, W], the pooled input [N, C_in, H, W]
    and its int64 indices; all channels last.
    """
    n, c, h, w = x.shape
    return [
        empty_channels_last(n, channels, h, w, dtype=dtype, device=x.device)
        for channels, dtype in (
            (dims.ch3x3red, x.dtype),
            (dims.ch5x5red, x.dtype),
            (c, x.dtype),
            (c, torch.int64),
        )
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    needs: list[bool],
) -> list[Tensor | None]:
    """The needed gradients of x, the six filters and the six biases; None for the others.

    dy: [N, C_OUT, H, W] of any strides. The gradients of x that come through the 1x1 convolutions
    are one, from the masked gradients of their outputs side by side.
    """
    dims = dims_of(filters)
    x = channels_last(x)
    r3, r5, pooled, index = saved
    weights = cast(filters, x.dtype)
    need_x, need_w, need_b = needs[0], needs[1:7], needs[7:]
    trained = [w or b for w, b in zip(need_w, need_b, strict=True)]
    dw: list[Tensor | None] = [None] * 6
    db: list[Tensor | None] = [None] * 6
    dx: Tensor | None = None
    dy1, dy3, dy5, dyp = dy.split(dims.branch_widths, dim=1)
    y1, y3, y5, yp = y.split(dims.branch_widths, dim=1)

    def through(i: int, dz: Tensor, source: Tensor, need_source: bool) -> Tensor | None:
        mask = (need_source, need_w[i], need_b[i])
        d_source, dw[i], db[i] = conv_backward(dz, source, weights[i], mask)
        return d_source

    # the 1x1 convolutions that read x: position, gradient of the output, output
    readers: list[tuple[int, Tensor, Tensor]] = []
    if need_x or trained[0]:
        readers.append((0, dy1, y1))
    for i, dy_branch, y_branch, r in ((1, dy3, y3, r3), (3, dy5, y5, r5)):
        need_r = need_x or trained[i]
        if need_r or trained[i + 1]:
            dr = through(i + 1, masked([(dy_branch, y_branch)]), r, need_r)
            if dr is not None:
                readers.append((i, dr, r))
    if need_x or trained[5]:
        d_pooled = through(5, masked([(dyp, yp)]), pooled, need_x)
        if d_pooled is not None:
            dx = aten.max_pool2d_with_indices_backward.default(
                d_pooled, x, [3, 3], [1, 1], [1, 1], [1, 1], False, index
            )

    alike = len({(need_w[i], need_b[i]) for i, _, _ in readers}) == 1
    for group in _groups(readers, x) if alike else [[reader] for reader in readers]:
        positions = [i for i, _, _ in group]
        dz = masked([(gradient, output) for _, gradient, output in group])
        weight = _cat([weights[i] for i in positions])
        mask = (need_x, need_w[positions[0]], need_b[positions[0]])
        dx_group, dw_group, db_group = conv_backward(dz, x, weight, mask)
        if dx_group is not None:
            dx = dx_group if dx is None else dx_group.add_(dx)
        widths = [weights[i].shape[0] for i in positions]
        for gradients, whole in ((dw, dw_group), (db, db_group)):
            if whole is not None:
                for i, part in zip(positions, whole.split(widths), strict=True):
                    gradients[i] = part
    return [None if dx is None else channels_last(dx), *dw, *db]


def _groups(readers: list[_T], x: Tensor) -> list[list[_T]]:
    """Which of the 1x1 convolutions of `x` run as one."""
    n, _, h, w = x.shape
    return [readers] if n * h * w >= MERGE_PIXELS else [[reader] for reader in readers]


def cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


def relu_into(out: Tensor, x: Tensor) -> None:
    # one pass from the convolution's result to the slice; NaN stays NaN
    torch.clamp_min(x, 0, out=out)


def masked(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradients of ReLU from (gradient, output) pairs, side by side in one channels-last tensor.

    The gradient passes where not (output <= 0), so also where the output is NaN.
    """
    n, _, h, w = pairs[0][1].shape
    widths = [output.shape[1] for _, output in pairs]
    like = pairs[0][1]
    dz = empty_channels_last(n, sum(widths), h, w, dtype=like.dtype, device=like.device)
    for (gradient, output), part in zip(pairs, dz.split(widths, dim=1), strict=True):
        aten.threshold_backward.grad_input(gradient, output, 0, grad_input=part)
    return dz


def conv_backward(
    dz: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, filter and bias where `mask` asks for them."""
    need_x, need_weight, need_bias = mask
    padding = weight.shape[-1] // 2
    dx, dw, db = aten.convolution_backward.default(
        dz, x, weight, [weight.shape[0]], [1, 1], [padding, padding], [1, 1], False, [0, 0], 1,
        # a library computes the filter's gradient with the bias's: a sum is cheaper alone
        [need_x, need_weight, need_weight and need_bias],
    )  # fmt: skip
    if need_bias and not need_weight:
        db = dz.sum((0, 2, 3))
    return dx, dw, db

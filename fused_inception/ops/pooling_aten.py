"""Max pooling and local response normalisation with PyTorch's own operators: any device, any
floating dtype.

The normalisation saves its input alone and sums shifted slices: on a CPU a tenth of the time of
`torch.nn.functional.local_response_norm`, which pads, pools and keeps five tensors of that size.
"""

import torch
from torch import Tensor

from fused_inception.geometry import Window
from fused_inception.ops.layout import channels_last, empty_channels_last
from fused_inception.ops.stages import NormNumbers

aten = torch.ops.aten


def max_pool2d(x: Tensor, window: Window, save: bool) -> tuple[Tensor, list[Tensor]]:
    """y, and with `save` the int64 index."""
    y, index = aten.max_pool2d_with_indices(channels_last(x), *_of(window))
    return channels_last(y), [channels_last(index)] if save else []


def max_pool2d_saved_like(y: Tensor) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what is saved."""
    return [empty_channels_last(*y.shape, dtype=torch.int64, device=y.device)]


def max_pool2d_backward(
    dy: Tensor, shape: tuple[int, int, int, int], index: Tensor, window: Window
) -> Tensor:
    """The gradient of x, which is of `shape`."""
    dx = empty_channels_last(*shape, dtype=dy.dtype, device=dy.device)
    # of x only shape and layout matter: dx stands for it
    aten.max_pool2d_with_indices_backward.grad_input(
        channels_last(dy), dx, *_of(window), index, grad_input=dx
    )
    return dx


def local_response_norm(x: Tensor, norm: NormNumbers, save: bool) -> tuple[Tensor, list[Tensor]]:
    """y; nothing but x is needed for its gradient."""
    wide = _wide(channels_last(x))
    power, _ = _powers(wide, norm)
    return channels_last(power.mul_(wide).to(x.dtype)), []


def local_response_norm_saved_like(y: Tensor) -> list[Tensor]:
    """Nothing."""
    return []


def local_response_norm_backward(dy: Tensor, x: Tensor, norm: NormNumbers) -> Tensor:
    """dx[c] = dy[c] s[c]^-b - 2 b alpha / size x[c] sum of dy[i] x[i] s[i]^(-b - 1)."""
    size, alpha, beta, _ = norm
    dtype = x.dtype
    x, dy = _wide(channels_last(x)), _wide(channels_last(dy))
    power, inverse = _powers(x, norm)
    dx = power.mul_(dy)
    if beta != 0:
        # x before 1 / s, which may be out of range
        total = _window_sum((dx * x).mul_(inverse), (size - 1) // 2, size // 2)
        dx.addcmul_(total, x, value=-2 * beta * alpha / size)
    return channels_last(dx.to(dtype))


def lrn_max_pool2d(
    x: Tensor, norm: NormNumbers, window: Window, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y, and with `save` the int64 index; the normalised map is not kept."""
    normalised, _ = local_response_norm(x, norm, save)
    return max_pool2d(normalised, window, save)


lrn_max_pool2d_saved_like = max_pool2d_saved_like


def lrn_max_pool2d_backward(
    dy: Tensor, x: Tensor, index: Tensor, norm: NormNumbers, window: Window
) -> Tensor:
    """The gradient of x."""
    n, c, h, w = x.shape
    dz = max_pool2d_backward(dy, (n, c, h, w), index, window)
    return local_response_norm_backward(dz, x, norm)


def max_pool2d_lrn(
    x: Tensor, norm: NormNumbers, window: Window, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y, and with `save` the pooled map and its int64 index."""
    pooled, saved = max_pool2d(x, window, save)
    y, _ = local_response_norm(pooled, norm, save)
    return y, [pooled, *saved] if save else []


def max_pool2d_lrn_saved_like(y: Tensor) -> list[Tensor]:
    """Uninitialised tensors with the metadata of what is saved."""
    pooled = empty_channels_last(*y.shape, dtype=y.dtype, device=y.device)
    return [pooled, *max_pool2d_saved_like(y)]


def max_pool2d_lrn_backward(
    dy: Tensor,
    shape: tuple[int, int, int, int],
    pooled: Tensor,
    index: Tensor,
    norm: NormNumbers,
    window: Window,
) -> Tensor:
    """The gradient of x, which is of `shape`."""
    dz = local_response_norm_backward(dy, pooled, norm)
    return max_pool2d_backward(dz, shape, index, window)


def _of(window: Window) -> tuple[list[int], list[int], list[int], list[int], bool]:
    kernel, stride, padding = window.kernel, window.stride, window.padding
    return [kernel] * 2, [stride] * 2, [padding] * 2, [1, 1], window.ceil_mode


def _wide(x: Tensor) -> Tensor:
    """16-bit tensors in fp32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _powers(x: Tensor, norm: NormNumbers) -> tuple[Tensor, Tensor]:
    """(s ** -beta, 1 / s) in new memory, s = k + alpha / size * sum of squares over the window."""
    size, alpha, beta, k = norm
    s = _window_sum(x * x, size // 2, (size - 1) // 2).mul_(alpha / size).add_(k)
    if beta == 0.75:
        r = s.rsqrt_()
        return r.sqrt().mul_(r), r.mul_(r)
    return s.pow(-beta), s.reciprocal_()


def _window_sum(x: Tensor, below: int, above: int) -> Tensor:
    """Sum of each channel and its `below` and `above` neighbours, in new memory."""
    channels = x.shape[1]
    total = x.clone()
    for d in range(1, min(below, channels - 1) + 1):
        total[:, d:] += x[:, :-d]
    for d in range(1, min(above, channels - 1) + 1):
        total[:, :-d] += x[:, d:]
    return total

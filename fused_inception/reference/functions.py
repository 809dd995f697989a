"""Every function of the library in plain PyTorch, any floating dtype, any device."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.geometry import STEM_NORM, STEM_POOL, Window


def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0
) -> Tensor:
    """relu(conv(x) + bias). x: [N, C_in, H, W]; weight: [C_out, C_in, K, K]; bias: [C_out]."""
    return F.relu(F.conv2d(x, weight, bias, stride, padding))


def parallel_conv1x1_relu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """1x1 convolutions of one input, with ReLU: channel slices of one buffer, in filter order.

    x: [N, C_in, H, W]; weights: each [C_i, C_in, 1, 1]; biases: each [C_i].
    """
    outputs = [conv2d_relu(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    return torch.cat(outputs, dim=1).split([y.shape[1] for y in outputs], dim=1)


def inception(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w3r: Tensor,
    b3r: Tensor,
    w3: Tensor,
    b3: Tensor,
    w5r: Tensor,
    b5r: Tensor,
    w5: Tensor,
    b5: Tensor,
    wp: Tensor,
    bp: Tensor,
) -> Tensor:
    """The Inception module with dimension reduction (figure 2b of the paper), ReLU everywhere.

    cat(1x1(x), 3x3(3x3 reduce(x)), 5x5(5x5 reduce(x)), projection(3x3 max pool of stride 1(x))).
    The padding of the 3x3 and of the "5x5", which may also be a 3x3, keeps height and width.
    """
    branches = [
        conv2d_relu(x, w1, b1),
        conv2d_relu(conv2d_relu(x, w3r, b3r), w3, b3, padding=w3.shape[-1] // 2),
        conv2d_relu(conv2d_relu(x, w5r, b5r), w5, b5, padding=w5.shape[-1] // 2),
        conv2d_relu(F.max_pool2d(x, 3, stride=1, padding=1), wp, bp),
    ]
    return torch.cat(branches, dim=1)


def inception_naive(
    x: Tensor, w1: Tensor, b1: Tensor, w3: Tensor, b3: Tensor, w5: Tensor, b5: Tensor
) -> Tensor:
    """The naive Inception module (figure 2a): no reductions, the pooled input is not projected."""
    branches = [
        conv2d_relu(x, w1, b1),
        conv2d_relu(x, w3, b3, padding=w3.shape[-1] // 2),
        conv2d_relu(x, w5, b5, padding=w5.shape[-1] // 2),
        F.max_pool2d(x, 3, stride=1, padding=1),
    ]
    return torch.cat(branches, dim=1)


def conv2d_bn_relu(
    x: Tensor,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-3,
    batches_tracked: Tensor | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """relu(gamma * (conv(x) - mean) / sqrt(var + eps) + beta), a convolution with BatchNorm.

    In training the statistics are the batch's (biased variance), and the running ones, if given,
    are updated in place with the unbiased variance; otherwise they are the running ones. A
    `momentum` of None averages over all batches that `batches_tracked` counts; with
    `skip_nonfinite` channels of which the batch's statistics are not finite keep the running ones.
    """
    y = F.conv2d(x, weight, None, stride, padding)
    if training and batches_tracked is not None:
        batches_tracked.add_(1)
    if momentum is None:
        momentum = 0.0
        if training and batches_tracked is not None:
            momentum = 1.0 / batches_tracked.item()
    running = [t for t in (running_mean, running_var) if t is not None]
    before = [t.clone() for t in running]
    z = F.batch_norm(y, running_mean, running_var, gamma, beta, training, momentum, eps)
    if skip_nonfinite and training and running:
        finite = torch.isfinite(running[0]) & torch.isfinite(running[1])
        for t, old in zip(running, before, strict=True):
            # .data: F.batch_norm has saved these for its backward, which does not read them
            t.data.copy_(torch.where(finite, t, old))
    return F.relu(z)


def inception_bn(
    x: Tensor,
    filters: Sequence[Tensor],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    gammas: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-3,
    batches_tracked: Sequence[Tensor | None] = (),
    skip_nonfinite: bool = False,
) -> Tensor:
    """`inception` with BatchNorm in place of biases, as `conv2d_bn_relu` defines it.

    Every sequence holds six entries: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
    """

    def conv(index: int, x: Tensor) -> Tensor:
        return conv2d_bn_relu(
            x,
            filters[index],
            running_means[index],
            running_vars[index],
            gammas[index],
            betas[index],
            padding=filters[index].shape[-1] // 2,
            training=training,
            momentum=momentum,
            eps=eps,
            batches_tracked=batches_tracked[index] if batches_tracked else None,
            skip_nonfinite=skip_nonfinite,
        )

    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    return torch.cat([conv(0, x), conv(2, conv(1, x)), conv(4, conv(3, x)), conv(5, pooled)], dim=1)


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling with torch's signature; padding is -inf, the last NaN of a window wins."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """y[c] = x[c] / (k + alpha/size * sum of x[c']**2 over `size` channels around c) ** beta."""
    if input.dtype in (torch.float16, torch.bfloat16) and input.device.type == "cpu":
        # the window sum has no 16-bit kernel there
        return F.local_response_norm(input.float(), size, alpha, beta, k).to(input.dtype)
    return F.local_response_norm(input, size, alpha, beta, k)


def lrn_max_pool2d(
    x: Tensor,
    size: int,
    kernel_size: int,
    stride: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    padding: int = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """`local_response_norm`, then `max_pool2d`."""
    y = local_response_norm(x, size, alpha, beta, k)
    return max_pool2d(y, kernel_size, stride, padding, ceil_mode=ceil_mode)


def max_pool2d_lrn(
    x: Tensor,
    size: int,
    kernel_size: int,
    stride: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    padding: int = 0,
    ceil_mode: bool = False,
) -> Tensor:
    """`max_pool2d`, then `local_response_norm`."""
    y = max_pool2d(x, kernel_size, stride, padding, ceil_mode=ceil_mode)
    return local_response_norm(y, size, alpha, beta, k)


def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over height and width: [N, C, H, W] -> [N, C, 1, 1]."""
    return F.adaptive_avg_pool2d(x, 1)


def inception_trunk(
    x: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    *,
    pools: Mapping[int, Window],
    taps: Sequence[int] = (),
    global_pool: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`inception` with each twelve of the parameters, `max_pool2d` where there is one behind, at
    the end `global_avg_pool2d` and dropout; and the outputs of the modules in `taps`."""
    outputs = []
    for i, of_module in enumerate(parameters):
        x = inception(x, *of_module)
        outputs.append(x)
        if i in pools:
            x = _max_pool(x, pools[i])
    if global_pool:
        x = F.dropout(global_avg_pool2d(x), dropout)
    return x, tuple(outputs[i] for i in taps)


def googlenet_stem(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool1: Window = STEM_POOL,
    norm1: tuple[int, float, float, float] = STEM_NORM,
    norm2: tuple[int, float, float, float] = STEM_NORM,
    pool2: Window = STEM_POOL,
) -> Tensor:
    """`conv2d_relu`, `max_pool2d_lrn`, `conv2d_relu` twice (1x1, 3x3), `lrn_max_pool2d`."""

    x = conv2d_relu(x, w1, b1, stride, padding)
    x = local_response_norm(_max_pool(x, pool1), *norm1)
    x = conv2d_relu(conv2d_relu(x, w2, b2), w3, b3, padding=1)
    return _max_pool(local_response_norm(x, *norm2), pool2)


def _max_pool(x: Tensor, window: Window) -> Tensor:
    sizes = (window.kernel, window.stride, window.padding)
    return max_pool2d(x, *sizes, ceil_mode=window.ceil_mode)


def global_avg_pool2d_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`global_avg_pool2d`, flattened to [N, C], then dropout."""
    return F.dropout(torch.flatten(global_avg_pool2d(x), 1), p, training)


def avg_pool2d_conv1x1_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int = 5,
    stride: int = 3,
    ceil_mode: bool = True,
) -> Tensor:
    """relu(conv1x1(average pool(x)) + bias), flattened: [N, C_out * H_out * W_out]."""
    pooled = F.avg_pool2d(x, kernel_size, stride, ceil_mode=ceil_mode)
    return torch.flatten(conv2d_relu(pooled, weight, bias), 1)


def adaptive_avg_pool2d_conv1x1_relu(
    x: Tensor, weight: Tensor, bias: Tensor, output_size: int = 4
) -> Tensor:
    """The same behind torch's adaptive average pool, `output_size` windows along each side."""
    return torch.flatten(conv2d_relu(F.adaptive_avg_pool2d(x, output_size), weight, bias), 1)

"""The public functions: check once, bring to channels last, call the operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import BackendError, resolve, selected
from fused_inception.functional.classifier import (
    adaptive_avg_pool2d_conv1x1_relu,
    avg_pool2d_conv1x1_relu,
    global_avg_pool2d,
    global_avg_pool2d_dropout,
)
from fused_inception.functional.layout import settle as _settle
from fused_inception.geometry import IMAGE_CHANNELS, STEM_NORM, STEM_POOL, Window
from fused_inception.ops import conv2d as _conv2d
from fused_inception.ops import inception as _inception
from fused_inception.ops import inception_naive as _inception_naive
from fused_inception.ops import pooling as _pooling
from fused_inception.ops import stem as _stem
from fused_inception.ops.registration import autocast, autocasts

__all__ = [
    "adaptive_avg_pool2d_conv1x1_relu",
    "avg_pool2d_conv1x1_relu",
    "conv2d_relu",
    "global_avg_pool2d",
    "global_avg_pool2d_dropout",
    "googlenet_stem",
    "inception",
    "inception_naive",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
    "max_pool2d_lrn",
    "parallel_conv1x1_relu",
]


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
    """The Inception module with dimension reduction, bias and ReLU behind every convolution.

    y = cat(1x1(x), 3x3(3x3 reduce(x)), 5x5(5x5 reduce(x)), projection(3x3 max pool(x)))

    Source: Szegedy et al., arXiv 1409.4842, figure 2b. The padding of the 3x3, of the 5x5 and of
    the pool, whose stride is 1, keeps height and width. The last NaN of a pooling window wins.

    Args:
        x: [N, C_in, H, W] in fp16, bf16, fp32 or fp64. A channels-last tensor, or a channel slice
            of one, is read in place; any other is converted once.
        w1, w3r, w5r, wp: filters [C, C_in, 1, 1] of the 1x1 branch, the 3x3 and 5x5 reductions
            and the projection, in the dtype of `x`.
        w3: filters [C_3, C_3r, 3, 3].
        w5: filters [C_5, C_5r, 5, 5], or 3x3 in torchvision's form.
        b1, b3r, b3, b5r, b5, bp: one bias for each filter, in the dtype of `x` or fp32.

    Under autocast `x` is cast, and the filters inside; biases stay as they are.

    Returns:
        [N, C_1 + C_3 + C_5 + C_p, H, W] in the dtype of `x`, exactly channels last.

    Raises:
        ValueError: a shape or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves, besides `x` and the parameters, on the Triton path the reduced maps, one byte a
    pooled element and one bit an output; on the ATen path y, the reduced maps, the pooled input and
    its 8-byte indices. A double backward raises RuntimeError.
    """
    filters, biases = [w1, w3r, w3, w5r, w5, wp], [b1, b3r, b3, b5r, b5, bp]
    checks.image_batch(x)
    checks.inception_parameters(x, filters, biases, casts=autocasts(x))
    return _module(_inception.inception, x, filters, biases)


def inception_naive(
    x: Tensor, w1: Tensor, b1: Tensor, w3: Tensor, b3: Tensor, w5: Tensor, b5: Tensor
) -> Tensor:
    """The naive Inception module: no reductions, and the pooled input as it is.

    y = cat(relu(1x1(x) + b1), relu(3x3(x) + b3), relu(5x5(x) + b5), 3x3 max pool(x))

    Source: Szegedy et al., arXiv 1409.4842, figure 2a. Padding keeps height and width; the pool's
    stride is 1, its last NaN wins.

    Args:
        x: [N, C_in, H, W], as in `inception`.
        w1, w3, w5: filters [C_1, C_in, 1, 1], [C_3, C_in, 3, 3], [C_5, C_in, 5, 5], in the dtype of
            `x`.
        b1, b3, b5: one bias for each filter, in the dtype of `x` or fp32.

    Autocast and errors are those of `inception`; the pool branch too comes in the dtype to which
    autocast casts `x`, where PyTorch's own concatenation would stay fp32.

    Returns:
        [N, C_1 + C_3 + C_5 + C_in, H, W] in the dtype of `x`, exactly channels last.

    Autograd saves, besides `x` and the parameters, on the Triton path one byte a pooled element and
    one bit an output of the convolutions; on the ATen path y and 8 bytes a pooled element. A double
    backward raises RuntimeError.
    """
    filters, biases = [w1, w3, w5], [b1, b3, b5]
    checks.image_batch(x)
    checks.naive_parameters(x, filters, biases, casts=autocasts(x))
    return _module(_inception_naive.inception_naive, x, filters, biases)


def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0
) -> Tensor:
    """relu(conv(x, weight) + bias) in one kernel.

    Kernels exist for 1x1, 3x3 and 5x5 filters of stride 1 with "same" padding, and for filters of
    any size, stride and padding on images of up to 4 channels (at most 256 filter positions). All
    else runs through ATen; under the backend "triton" it raises.

    Args:
        x: [N, C_in, H, W] in fp16, bf16, fp32 or fp64. Images are read in their own layout, other
            inputs in place where they are channels last, else converted once.
        weight: [C_out, C_in, K, K] in the dtype of `x`.
        bias: [C_out] in the dtype of `x` or fp32.
        stride, padding: of the convolution, the same in both directions.

    Under autocast `x` is cast, and the filter inside; the bias stays as it is.

    Returns:
        [N, C_out, H_out, W_out] in the dtype of `x`, exactly channels last.

    Raises:
        ValueError: a shape, an option or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here, or has no kernel for this convolution.

    Autograd saves, besides `x` and the parameters, one bit an output on the Triton path and y on
    the ATen path. A double backward raises RuntimeError.
    """
    checks.image_batch(x)
    checks.conv_parameters(x, weight, bias, stride, padding, casts=autocasts(x))
    impl = resolve(x)
    reason = _conv2d.why_not(weight, stride, padding)
    if impl == "triton" and reason is not None:
        if selected() == "triton":
            raise BackendError(f'backend "triton" has no kernel for this convolution: {reason}')
        impl = "torch"
    x = autocast(x)
    if impl == "torch" or x.shape[1] > IMAGE_CHANNELS:
        x = _settle(x, impl)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _ = _conv2d.conv2d_relu(x, weight, bias, stride, padding, save, impl)
    return y


def parallel_conv1x1_relu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """1x1 convolutions of one input with bias and ReLU, as one product over all their filters.

    Args:
        x: [N, C_in, H, W], as in `conv2d_relu`.
        weights: filters, each [C_i, C_in, 1, 1].
        biases: each [C_i].

    Returns:
        Channel slices [N, C_i, H, W] of one channels-last buffer, in the order of the filters.

    Raises:
        ValueError: no filters, or not as many biases; else as `conv2d_relu`.
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(
            "weights and biases must be as many, and at least one, "
            f"got {len(weights)} and {len(biases)}"
        )
    y = conv2d_relu(x, torch.cat([*weights]), torch.cat([*biases]))
    return y.split([weight.shape[0] for weight in weights], dim=1)


def max_pool2d(
    input: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum over square windows: torch's function, with a 1-byte index.

    The first maximum of a window wins, the last NaN wins, padding takes no part. The sides of the
    output follow the rule that Caffe and torch share, `geometry.pool_out`.

    Args:
        input: [N, C, H, W] in fp16, bf16, fp32 or fp64. A channels-last tensor, or a channel slice
            of one, is read in place; any other is converted once.
        kernel_size, stride, padding, ceil_mode: as torch's, but the same for height and width.
        dilation: 1.

    Under autocast the dtype stays as it is.

    Returns:
        [N, C, H_out, W_out] in the dtype of `input`, exactly channels last.

    Raises:
        ValueError: a shape or an option that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here, or windows are larger than 3.

    Larger windows than 3 run through ATen.

    Autograd saves one byte an output on the Triton path, 8 on the ATen path, and not `input`. A
    double backward raises RuntimeError.
    """
    checks.image_batch(input)
    window = checks.pool_window(input, kernel_size, stride, padding, dilation, ceil_mode)
    return _pool(_pooling.max_pool2d, input, window)


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Tensor:
    """Local response normalisation across channels.

    y[c] = x[c] / (k + alpha / size * sum of x[c'] ** 2 over the `size` channels around c) ** beta

    Source: Krizhevsky et al. 2012, section 3.3; the division of alpha by `size` is PyTorch's and
    Caffe's. An even window has its additional channel below c, as torch's.

    Args:
        input: [N, C, H, W] in fp16, bf16, fp32 or fp64; layout as in `max_pool2d`.
        size: channels of the window, at least 1.
        alpha, beta, k: the constants of the formula.

    Under autocast the dtype stays as it is, where torch's function returns fp32: sums and powers
    are fp32 anyway.

    Returns:
        [N, C, H, W] in the dtype of `input`, exactly channels last.

    Raises:
        ValueError: a shape or a size that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves `input` alone; its denominator is computed again. A double backward raises
    RuntimeError.
    """
    checks.image_batch(input)
    checks.norm_size(size)
    return _pool(_pooling.local_response_norm, input, None, size, alpha, beta, k)


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
    """`local_response_norm`, then `max_pool2d`, in one kernel: the normalised map is not stored.

    Arguments, result and errors are those of the two. Windows compare the normalised values in
    fp32, before they are rounded.

    Autograd saves `x` and one byte an output on the Triton path, 8 on the ATen path.
    """
    checks.image_batch(x)
    checks.norm_size(size)
    window = checks.pool_window(x, kernel_size, stride, padding, 1, ceil_mode)
    return _pool(_pooling.lrn_max_pool2d, x, window, size, alpha, beta, k)


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
    """`max_pool2d`, then `local_response_norm`, in one kernel.

    Arguments, result and errors are those of the two.

    Autograd saves the pooled map and one byte an output on the Triton path, 8 on the ATen path,
    and not `x`.
    """
    checks.image_batch(x)
    checks.norm_size(size)
    window = checks.pool_window(x, kernel_size, stride, padding, 1, ceil_mode)
    return _pool(_pooling.max_pool2d_lrn, x, window, size, alpha, beta, k)


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
    """The stem of the paper's GoogLeNet: all that comes before its first Inception module.

    y = max_pool(lrn(conv3(conv2(lrn(max_pool(conv1(x))))))), each convolution with bias and ReLU

    Source: Szegedy et al., arXiv 1409.4842, table 1, with the order of pool and normalisation of
    Caffe's model. On the Triton path one operator: five launches forward; six backward, and one
    more for the gradient of the image. Elsewhere, and for images of more than 4 channels, widths
    that are no multiples of 8 or pools of more than 3 x 3, it is `conv2d_relu`, `max_pool2d_lrn`,
    `conv2d_relu` twice and `lrn_max_pool2d`.

    Args:
        x: images [N, C_in, H, W] in fp16, bf16, fp32 or fp64, read in their own layout.
        w1: filters [C_1, C_in, K, K] of conv1, in the dtype of `x`.
        w2, w3: filters [C_2, C_1, 1, 1] and [C_3, C_2, 3, 3]; their padding keeps the size.
        b1, b2, b3: one bias for each filter, in the dtype of `x` or fp32.
        stride, padding: of conv1.
        pool1, pool2: windows of the max pools, `geometry.Window`.
        norm1, norm2: size, alpha, beta and k of `local_response_norm`.

    Under autocast `x` is cast, and the filters inside; biases stay as they are.

    Returns:
        [N, C_3, H_out, W_out] in the dtype of `x`, exactly channels last; 28 x 28 of 224 x 224.

    Raises:
        ValueError: a shape, an option or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves, besides `x` and the parameters, on the Triton path the first pooled map before
    and after its norm, the outputs of conv2 and conv3 and one byte a pooled element; no ReLU mask:
    the gates are in these maps. A double backward raises RuntimeError.
    """
    filters, biases = [w1, w2, w3], [b1, b2, b3]
    checks.image_batch(x)
    checks.stem_parameters(x, filters, biases, stride, padding, (pool1, pool2), casts=autocasts(x))
    for size in (norm1[0], norm2[0]):
        checks.norm_size(size)
    impl = resolve(x)
    stem = _stem.Stem(stride, padding, pool1, norm1, norm2, pool2)
    if impl == "triton" and _stem.why_not(filters, stem) is None:
        x = autocast(x)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *biases))
        y, _ = _stem.googlenet_stem(x, filters, biases, stem.integers, stem.constants, save)
        return y
    x = conv2d_relu(x, w1, b1, stride, padding)
    x = _pool(_pooling.max_pool2d_lrn, x, pool1, *norm1)
    x = conv2d_relu(conv2d_relu(x, w2, b2), w3, b3, padding=1)
    return _pool(_pooling.lrn_max_pool2d, x, pool2, *norm2)


def _module(
    op: Callable[..., Any], x: Tensor, filters: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """Run a form of the module."""
    impl = resolve(x)
    x = _settle(autocast(x), impl)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *biases))
    y, _ = op(x, filters, biases, save, impl)
    return y


def _pool(op: Callable[..., Any], x: Tensor, window: Window | None, *norm: float) -> Tensor:
    """Run an operator of `ops.pooling`."""
    impl = resolve(x)
    if impl == "triton" and window is not None and window.kernel > _pooling.MAX_KERNEL:
        if selected() == "triton":
            raise BackendError(
                f'backend "triton" pools windows of up to {_pooling.MAX_KERNEL}, '
                f"got {window.kernel}"
            )
        impl = "torch"
    options = [*norm]
    if window is not None:
        options += [window.kernel, window.stride, window.padding, window.ceil_mode]
    save = torch.is_grad_enabled() and x.requires_grad
    y, _ = op(_settle(x, impl), *options, save, impl)
    return y

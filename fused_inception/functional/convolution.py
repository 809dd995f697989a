"""Convolutions with bias and ReLU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import Implementation, resolve, where_it_has_kernels
from fused_inception.functional.fitting import once
from fused_inception.functional.layout import settle
from fused_inception.geometry import IMAGE_CHANNELS
from fused_inception.ops import conv2d as _conv2d
from fused_inception.ops import plain
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts, call


@measured
def conv2d_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int = 0
) -> Tensor:
    """relu(conv(x, weight) + bias) in one kernel.

    Source: Szegedy et al., arXiv 1409.4842, table 1, whose every convolution has a ReLU behind it.

    Kernels exist for 1x1, 3x3 and 5x5 filters of stride 1 with "same" padding, and on images of up
    to 4 channels for any stride, padding and size of at most 256 weights a filter (C_in * K * K).
    All else runs through ATen; under the backend "triton" it raises.

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
    stride, padding = checks.integer("stride", stride), checks.integer("padding", padding)
    casts = autocasts(x)
    once(
        checks.conv_parameters,
        *((x, weight, bias), (stride, padding), x, weight, bias, stride, padding),
        casts=casts,
    )
    impl = conv_implementation(x, weight, stride, padding)
    x = autocast(x) if casts else x
    if impl == "torch" or x.shape[1] > IMAGE_CHANNELS:
        x = settle(x, impl)
    if impl == "torch":
        return plain.conv2d_relu(x, [weight], bias, stride, padding)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    y, _ = call(_conv2d.conv2d_relu, x, weight, bias, stride, padding, save)
    return y


def parallel_conv1x1_relu(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """1x1 convolutions of one input with bias and ReLU, as one product over all their filters.

    y_i = relu(conv1x1(x, weights[i]) + biases[i])

    Source: Szegedy et al., arXiv 1409.4842, figure 2b, whose reductions read one map.

    Args:
        x: [N, C_in, H, W], as in `conv2d_relu`.
        weights: filters, each [C_i, C_in, 1, 1] in the dtype of `x`.
        biases: each [C_i] in the dtype of `x` or fp32.

    Under autocast `x` is cast, and the filters inside.

    Returns:
        Channel slices [N, C_i, H, W] of one channels-last buffer, in the order of the filters.

    Raises:
        ValueError: no filters, or not as many biases; else as `conv2d_relu`.
        TypeError, BackendError: as `conv2d_relu`.

    Autograd saves what `conv2d_relu` does, and once more, concatenated, the filters and, on the
    Triton path, the biases. A double backward raises RuntimeError.
    """
    checks.image_batch(x)
    for name, given in (("weights", weights), ("biases", biases)):
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name} must be a list or tuple, got {type(given).__name__}")
    if not weights or len(weights) != len(biases):
        raise ValueError(
            "weights and biases must be as many, and at least one, "
            f"got {len(weights)} and {len(biases)}"
        )
    for weight, bias in zip(weights, biases, strict=True):
        checks.pointwise_parameters(x, weight, bias, casts=autocasts(x))
    y = conv2d_relu(x, torch.cat([*weights]), torch.cat([*biases]))
    return y.split([weight.shape[0] for weight in weights], dim=1)


def conv_implementation(x: Tensor, weight: Tensor, stride: int, padding: int) -> Implementation:
    """`resolve`, and ATen where there is no kernel for this convolution."""
    impl = resolve(x)
    if impl == "torch":
        return impl
    reason = _conv2d.why_not(weight, stride, padding)
    return where_it_has_kernels(impl, "convolution", reason)

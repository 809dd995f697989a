"""The Inception module with biases, and its naive form."""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve
from fused_inception.functional.fitting import once
from fused_inception.functional.layout import settle
from fused_inception.ops import inception as _inception
from fused_inception.ops import plain
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts, call


@measured
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
    pooled element and one bit an output; on the ATen path what PyTorch's own layers save. A double
    backward raises RuntimeError.
    """
    filters, biases = [w1, w3r, w3, w5r, w5, wp], [b1, b3r, b3, b5r, b5, bp]
    checks.image_batch(x)
    casts = autocasts(x)
    check = checks.inception_parameters
    once(check, [x, *filters, *biases], None, x, filters, biases, casts=casts)
    return _module(_inception.inception, plain.inception, x, filters, biases, casts)


@measured
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
    one bit an output of the convolutions; on the ATen path what PyTorch's own layers save. A double
    backward raises RuntimeError.
    """
    filters, biases = [w1, w3, w5], [b1, b3, b5]
    checks.image_batch(x)
    casts = autocasts(x)
    check = checks.naive_parameters
    once(check, [x, *filters, *biases], None, x, filters, biases, casts=casts)
    op, otherwise = _inception.inception_naive, plain.inception_naive
    return _module(op, otherwise, x, filters, biases, casts)


def _module(
    op: torch._ops.OpOverload,
    otherwise: Callable[..., Tensor],
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    casts: bool,
) -> Tensor:
    """Run a form of the module."""
    impl = resolve(x)
    x = settle(autocast(x) if casts else x, impl)
    if impl == "torch":
        return otherwise(x, filters, biases)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *biases))
    y, _ = call(op, x, filters, biases, save)
    return y

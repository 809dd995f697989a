"""The public functions: check once, bring to channels last, call the operator."""

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import Implementation, resolve
from fused_inception.ops import global_pool as _global_pool
from fused_inception.ops import inception as _inception
from fused_inception.ops.layout import why_not_in_place
from fused_inception.ops.registration import autocast, autocasts

__all__ = ["global_avg_pool2d", "inception"]


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
    impl = resolve(x)
    x = _settle(autocast(x), impl)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *biases))
    y, _ = _inception.inception(x, filters, biases, save, impl)
    return y


def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over height and width, accumulated in fp32 (fp64 in fp64).

    Args:
        x: [N, C, H, W] in fp16, bf16, fp32 or fp64; any layout is read in place.

    Returns:
        [N, C, 1, 1] in the dtype of `x`, exactly channels last; its gradient is channels last.

    Raises:
        ValueError: `x` is not 4-dimensional or has no channels or pixels.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves no tensor. A double backward raises RuntimeError.
    """
    checks.image_batch(x)
    return _global_pool.global_avg_pool2d(x, resolve(x))


def _settle(x: Tensor, impl: Implementation) -> Tensor:
    """`x` in the layout that `impl` reads: converted here, it is not converted again in backward.

    Channels that Triton has to pad are left to the operator, which does not keep the padded copy.
    """
    if impl == "triton" and why_not_in_place(x) is None:
        return x
    return x.contiguous(memory_format=torch.channels_last)

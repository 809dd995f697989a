"""Pooling and local response normalisation."""

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve, where_it_has_kernels
from fused_inception.functional.fitting import pool_window
from fused_inception.functional.layout import settle
from fused_inception.geometry import Window, why_no_norm_kernel, why_no_pool_kernel
from fused_inception.ops import plain
from fused_inception.ops import pooling as _pooling
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import call


@measured
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

    Source: Szegedy et al., arXiv 1409.4842, table 1 and figure 2.

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

    Autograd saves one byte an output on the Triton path, and not `input`; on the ATen path 8, and
    `input`. A double backward raises RuntimeError.
    """
    checks.image_batch(input)
    window = pool_window(input, kernel_size, stride, padding, dilation, ceil_mode)
    return pool(_pooling.max_pool2d, input, window)


@measured
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
        BackendError: the backend "triton" cannot run here, or `size` is above 32: such norms run
            through ATen.

    Autograd saves `input` alone; its denominator is computed again. A double backward raises
    RuntimeError.
    """
    checks.image_batch(input)
    size = checks.count("size", size)
    return pool(_pooling.local_response_norm, input, None, size, alpha, beta, k)


@measured
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

    Arguments, result, source and errors are those of the two. Windows compare the normalised values
    in fp32, before they are rounded.

    Autograd saves `x` and one byte an output on the Triton path, 8 on the ATen path. A double
    backward raises RuntimeError.
    """
    checks.image_batch(x)
    size = checks.count("size", size)
    window = pool_window(x, kernel_size, stride, padding, 1, ceil_mode)
    return pool(_pooling.lrn_max_pool2d, x, window, size, alpha, beta, k)


@measured
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

    Arguments, result, source and errors are those of the two.

    Autograd saves the pooled map and one byte an output on the Triton path, 8 on the ATen path,
    and not `x`. A double backward raises RuntimeError.
    """
    checks.image_batch(x)
    size = checks.count("size", size)
    window = pool_window(x, kernel_size, stride, padding, 1, ceil_mode)
    return pool(_pooling.max_pool2d_lrn, x, window, size, alpha, beta, k)


def pool(op: torch._ops.OpOverload, x: Tensor, window: Window | None, *norm: float) -> Tensor:
    """Run an operator of `ops.pooling`."""
    impl = resolve(x)
    if impl == "triton":
        reason = None if window is None else why_no_pool_kernel(window.kernel)
        if norm and reason is None:
            reason = why_no_norm_kernel(int(norm[0]))
        impl = where_it_has_kernels(impl, "pool", reason)
    if impl == "torch" and window is not None and not norm:
        return plain.max_pool2d(settle(x, impl), (), window)
    # alpha, beta and k behind the size
    options = [*norm[:1], *map(float, norm[1:])]
    if window is not None:
        options += [window.kernel, window.stride, window.padding, window.ceil_mode]
    save = torch.is_grad_enabled() and x.requires_grad
    y, _ = call(op, settle(x, impl), *options, save, impl)
    return y

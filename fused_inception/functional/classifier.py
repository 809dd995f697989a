"""What stands in front of a classifier: the global pool with its dropout, the auxiliary head."""

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve, where_it_has_kernels
from fused_inception.functional.fitting import pool_window
from fused_inception.functional.layout import settle
from fused_inception.geometry import AvgWindow
from fused_inception.ops import avg_pool_project as _avg_pool_project
from fused_inception.ops import global_pool as _global_pool
from fused_inception.ops import plain
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts, call


@measured
def global_avg_pool2d(x: Tensor) -> Tensor:
    """Mean over height and width, accumulated in fp32 (fp64 in fp64).

    Source: Szegedy et al., arXiv 1409.4842, section 5; Lin et al., arXiv 1312.4400, section 3.2.

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
    return _pool(x, None, 1.0)


@measured
def global_avg_pool2d_dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """`global_avg_pool2d`, flattened, with dropout in the same kernel.

    y[n, c] = kept[n, c] * (mean of x[n, c]) / (1 - p)

    PyTorch's generator draws `kept`, as `dropout` would draw it for a tensor like y: the same seed
    drops the same features as PyTorch does.

    Args:
        x: [N, C, H, W], as in `global_avg_pool2d`.
        p: probability that a feature is dropped.
        training: False drops nothing and scales nothing.

    Returns:
        [N, C] in the dtype of `x`, dense; where a dropped mean is not finite, NaN, as torch has it.

    Raises:
        ValueError: `p` is not between 0 and 1; else as `global_avg_pool2d`.

    Autograd saves one byte a feature, and nothing without dropout. A double backward raises
    RuntimeError.
    """
    checks.image_batch(x)
    checks.probability(p)
    if not training or p == 0:
        return torch.flatten(global_avg_pool2d(x), 1)
    return torch.flatten(_pool(x, *drawn(x, x.shape[1], p)), 1)


def _pool(x: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    if resolve(x) == "torch":
        return plain.global_avg_pool2d(x, (), kept, scale)
    return call(_global_pool.global_avg_pool2d, x, kept, scale)


def drawn(x: Tensor, channels: int, p: float) -> tuple[Tensor, float]:
    """What dropout keeps of [N, channels] features like `x`, and by what it scales that."""
    # the draw is torch's own launch; so a CUDA graph draws anew in every replay. Drawing a seed for
    # a generator inside the kernel would be as many launches, and other numbers
    _, kept = torch.native_dropout(x.new_empty(x.shape[0], channels), p, True)
    return kept, 0.0 if p == 1 else 1 / (1 - p)


@measured
def avg_pool2d_conv1x1_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_size: int = 5,
    stride: int = 3,
    ceil_mode: bool = True,
) -> Tensor:
    """What an auxiliary classifier does in front of its linear layers, in one kernel.

    y = flatten(relu(conv1x1(average pool(x), weight) + bias))

    Source: Szegedy et al., arXiv 1409.4842, section 5. Windows have no padding, and those that
    `ceil_mode` adds at the border average the pixels that they have, as torch's do.

    Args:
        x: [N, C_in, H, W], as in `inception`.
        weight: [C_out, C_in, 1, 1] in the dtype of `x`.
        bias: [C_out] in the dtype of `x` or fp32.
        kernel_size, stride, ceil_mode: of the pool, the same in both directions.

    Under autocast `x` is cast, and the filter inside; the bias stays as it is.

    Returns:
        [N, C_out * H_out * W_out] in the dtype of `x`, in the order of torch's `flatten`.

    Raises:
        ValueError: a shape, an option or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here, or more than 16 windows lie over one
            pixel, which runs through ATen.

    Autograd saves the pooled map and y, on the ATen path `x` too. A double backward raises
    RuntimeError.
    """
    checks.image_batch(x)
    window = pool_window(x, kernel_size, stride, 0, 1, ceil_mode)
    pool = AvgWindow(window.kernel, window.stride, window.ceil_mode)
    return _pool_project(x, weight, bias, pool)


@measured
def adaptive_avg_pool2d_conv1x1_relu(
    x: Tensor, weight: Tensor, bias: Tensor, output_size: int = 4
) -> Tensor:
    """`avg_pool2d_conv1x1_relu` with torch's adaptive windows, `output_size` along each side.

    Raises:
        ValueError: `output_size` is below 1; else as `avg_pool2d_conv1x1_relu`.
    """
    checks.image_batch(x)
    output_size = checks.count("output_size", output_size)
    return _pool_project(x, weight, bias, AvgWindow(0, 0, False, output_size))


def _pool_project(x: Tensor, weight: Tensor, bias: Tensor, pool: AvgWindow) -> Tensor:
    casts = autocasts(x)
    checks.pointwise_parameters(x, weight, bias, casts=casts)
    impl = resolve(x)
    if impl == "triton":  # ATen asks nothing of the sides
        impl = where_it_has_kernels(impl, "pool", pool.why_no_kernel(*x.shape[2:]))
    x = settle(autocast(x) if casts else x, impl)
    if impl == "torch":
        return plain.avg_pool2d_conv1x1_relu(x, [weight], bias, pool)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    options = pool.kernel, pool.stride, pool.ceil_mode, pool.grid
    y, _ = call(_avg_pool_project.avg_pool2d_conv1x1_relu, x, weight, bias, *options, save)
    return y

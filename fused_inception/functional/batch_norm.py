"""Convolutions with BatchNorm and ReLU."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve
from fused_inception.functional.convolution import conv_implementation
from fused_inception.functional.fitting import once
from fused_inception.functional.layout import settle
from fused_inception.geometry import IMAGE_CHANNELS, conv_out
from fused_inception.ops import batch_norm as _batch_norm
from fused_inception.ops import plain
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts
from fused_inception.ops.running import Running


@measured
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
    """`inception` with BatchNorm in place of each bias: relu(gamma (z - mean) / sqrt(var + eps) +
    beta) behind every convolution z.

    Source: Ioffe and Szegedy, arXiv 1502.03167; Szegedy et al., arXiv 1409.4842, figure 2b. Every
    sequence holds six entries: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.

    In training mean and variance are the batch's, over N, H and W, merged from tiles by Chan's rule
    in fp32; the running ones, where given, are updated in place as `nn.BatchNorm2d` does, the
    variance unbiased. Otherwise they are the running ones: BatchNorm is folded into filters, which
    in 16 bits are rounded once more, and biases; both are kept until a parameter or a statistic
    changes.

    Args:
        x: [N, C_in, H, W] in fp16, bf16, fp32 or fp64; layout as in `inception`.
        filters: as the filters of `inception`, in the dtype of `x`.
        running_means, running_vars: each [C], in the dtype of `x` or fp32, contiguous in training,
            which writes to them; all None: not tracked.
        gammas, betas: each [C], likewise; all None: 1 and 0.
        training: take the batch's statistics; without it the running ones are needed.
        momentum: weight of the new batch; None averages over all batches in `batches_tracked`.
        eps: added to the variance.
        batches_tracked: counters, int64 scalars, which training advances, all in one launch.
        skip_nonfinite: channels of which the batch's mean or variance is not finite keep their
            running statistics; otherwise one overflow stays in them for ever.

    Under autocast `x` is cast, and the filters inside; all else stays as it is.

    Returns:
        [N, C_1 + C_3 + C_5 + C_p, H, W] in the dtype of `x`, exactly channels last.

    Raises:
        ValueError: a shape or a device that does not fit; one value a channel, or an eps that is
            not positive, in training; no running statistics without training.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves, in training and besides `x` and the parameters, on the Triton path the raw
    results of all six convolutions, one byte a pooled element and four numbers a channel; on the
    ATen path what PyTorch's own layers save. In eval as `inception`, of the folded filters. A
    double backward raises RuntimeError.
    """
    checks.image_batch(x)
    casts = autocasts(x)
    vectors = running_means, running_vars, gammas, betas, batches_tracked
    layers = _norm_layers(x, filters, vectors, (training, momentum, eps), casts)
    impl = resolve(x)
    x = settle(autocast(x) if casts else x, impl)
    if not training:
        if impl == "torch":
            return plain.inception(x, *_folded([*filters], layers, eps))
        return _batch_norm.evaluate(
            "inception_bn", x, [*filters], *layers.parameters, *layers.running[:2], (eps,)
        )
    if impl == "torch":
        running = Running(*layers.running, momentum, skip_nonfinite)
        return plain.inception_bn(x, filters, *layers.parameters, running, eps)
    options = (momentum, eps, skip_nonfinite)
    return _batch_norm.train(
        "inception_bn", x, [*filters], *layers.parameters, layers.running, options
    )


@measured
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
    """relu(batch_norm(conv(x, weight))): BatchNorm as in `inception_bn`, kernels as `conv2d_relu`.

    Args:
        x: [N, C_in, H, W], as in `conv2d_relu`.
        weight: [C_out, C_in, K, K] in the dtype of `x`.
        running_mean, running_var, gamma, beta: [C_out] in the dtype of `x` or fp32, or None; the
            first two contiguous in training.
        stride, padding: of the convolution, the same in both directions.
        training, momentum, eps, batches_tracked, skip_nonfinite: as in `inception_bn`.

    Returns:
        [N, C_out, H_out, W_out] in the dtype of `x`, exactly channels last.

    Raises:
        ValueError, TypeError, BackendError: as `conv2d_relu` and `inception_bn`.

    Autograd saves, in training and besides `x` and the parameters, the raw result and a few numbers
    a channel, of the network's 7x7 on images 16 elements for 2 x 2 pixels too, on the ATen path y;
    in eval as `conv2d_relu`. A double backward raises RuntimeError.
    """
    checks.image_batch(x)
    stride, padding = checks.integer("stride", stride), checks.integer("padding", padding)
    casts = autocasts(x)
    vectors = (running_mean,), (running_var,), (gamma,), (beta,), (batches_tracked,)
    options = training, momentum, eps, stride, padding
    layers = _norm_layers(x, [weight], vectors, options, casts)
    impl = conv_implementation(x, weight, stride, padding)
    x = autocast(x) if casts else x
    if impl == "torch" or x.shape[1] > IMAGE_CHANNELS:
        x = settle(x, impl)
    if not training:
        if impl == "torch":
            filters, biases = _folded([weight], layers, eps)
            return plain.conv2d_relu(x, filters, biases[0], stride, padding)
        return _batch_norm.evaluate(
            "conv2d_bn_relu", x, [weight], *layers.parameters, *layers.running[:2],
            (stride, padding, eps),
        )  # fmt: skip
    if impl == "torch":
        running = Running(*layers.running, momentum, skip_nonfinite)
        return plain.conv2d_bn_relu(x, [weight], *layers.parameters, running, eps, stride, padding)
    return _batch_norm.train(
        "conv2d_bn_relu", x, [weight], *layers.parameters, layers.running,
        (stride, padding, momentum, eps, skip_nonfinite),
    )  # fmt: skip


def _folded(
    filters: list[Tensor], layers: "_NormLayers", eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Filters and biases that hold BatchNorm with its running statistics; kept where no gradient
    will ask for them."""
    arguments = filters, *layers.parameters, *layers.running[:2], eps
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _batch_norm.fold(*arguments)
    return _batch_norm.kept_folded(*arguments)


class _NormLayers(NamedTuple):
    parameters: tuple[list[Tensor], list[Tensor]]  # gammas, betas
    running: tuple[list[Tensor], list[Tensor], list[Tensor]]  # means, variances, counters


# means, variances, gammas, betas, counters
_Vectors = Sequence[Sequence[Tensor | None]]


def _norm_layers(
    x: Tensor,
    filters: Sequence[Tensor],
    vectors: _Vectors,
    options: tuple[Any, ...],
    casts: bool,
) -> _NormLayers:
    """What BatchNorm layers hold, behind `_check`; empty lists where there is nothing.

    options: training, momentum, eps; of one convolution stride and padding, too.
    """
    tensors = [x, *filters, *chain.from_iterable(vectors)]
    lengths = tuple(map(len, (filters, *vectors)))
    once(_check, tensors, (lengths, options), x, filters, vectors, *options, casts=casts)
    means, variances, scales, shifts, counters = (
        [t for t in kind if t is not None] for kind in vectors
    )
    if not options[0]:
        return _NormLayers((scales, shifts), (means, variances, []))
    checks.written_to("running_means", means)
    checks.written_to("running_vars", variances)
    return _NormLayers((scales, shifts), (means, variances, counters if means else []))


def _check(
    x: Tensor,
    filters: Sequence[Tensor],
    vectors: _Vectors,
    training: bool,
    momentum: float | None,
    eps: float,
    *geometry: int,
    casts: bool,
) -> None:
    n, _, height, width = x.shape
    if geometry:
        checks.conv_filter(x, filters[0], *geometry, casts=casts)
        side = filters[0].shape[2]
        height, width = (conv_out(size, side, *geometry) for size in (height, width))
    else:
        checks.inception_filters(x, filters, casts=casts)
    widths = [weight.shape[0] for weight in filters]
    names = ("running_means", "running_vars", "gammas", "betas")
    means, variances, scales, shifts = (
        checks.norm_vectors(x, name, kind, widths, casts=casts)
        for name, kind in zip(names, vectors, strict=False)
    )
    checks.norm_pair("running_means", means, "running_vars", variances)
    checks.norm_pair("gammas", scales, "betas", shifts)
    if training:
        checks.one_dtype(means, variances)
        checks.batch_counters(vectors[-1], momentum, means)
        checks.batch_statistics(n, widths[0], height, width, eps)
    elif not means:
        raise ValueError("training=False needs running_means and running_vars, which are None")

"""A run of Inception modules with biases."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve
from fused_inception.functional.classifier import (
    drawn,
    global_avg_pool2d,
    global_avg_pool2d_dropout,
)
from fused_inception.functional.fitting import once
from fused_inception.functional.inception import inception
from fused_inception.functional.layout import settle
from fused_inception.functional.pooling import pool
from fused_inception.geometry import Window
from fused_inception.ops import pooling as _pooling
from fused_inception.ops import trunk as _trunk
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts, call
from fused_inception.ops.stages import Trunk


@measured
def inception_trunk(
    x: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    *,
    pools: Mapping[int, Window],
    taps: Sequence[int] = (),
    global_pool: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Inception modules one behind the other, with the max pools behind them and, at the end, the
    global average pool with dropout.

    y = inception_k( ... maxpool(inception_1(inception_0(x)))), and of that, with `global_pool`,
    dropout(mean over height and width)

    Source: Szegedy et al., arXiv 1409.4842, table 1; GoogLeNet has three, which end with its max
    pools and its global pool. On the Triton path one operator: the launch that makes the gradient
    of a module's output applies that module's ReLU mask and sums its bias gradients, and filters of
    all modules are packed together; that takes one to three launches and a pass over the gradient
    of each module less than `inception`. Elsewhere, and where a branch's width is no multiple of 8,
    a pool is of more than 3 x 3, the last module is tapped or one that has a pool behind it, or the
    global pool is behind a max pool, it is `inception`, `max_pool2d` and
    `global_avg_pool2d_dropout`.

    Args:
        x: [N, C_in, H, W], as in `inception`.
        parameters: twelve for each module, in the order of `inception`'s arguments.
        pools: module, counted from 0 -> the `fused_inception.geometry.Window` of the max pool
            behind it.
        taps: modules whose output is returned too, in ascending order.
        global_pool: whether the mean over height and width is behind the last module.
        dropout: probability that a mean is dropped; PyTorch's generator draws, as `dropout` would.

    Under autocast `x` is cast, and the filters inside; biases stay as they are.

    Returns:
        The last map, or with `global_pool` the means [N, C_out, 1, 1], and a tuple of the tapped
        outputs, each in the dtype of `x` and exactly channels last.

    Raises:
        ValueError: a shape, an option or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves, besides the parameters, from the first module on that needs a gradient: each
    one's input, what `inception` saves, one byte a pooled element, and of dropout one a mean. A
    double backward raises RuntimeError.
    """
    checks.image_batch(x)
    casts = autocasts(x)
    once(
        checks.trunk_parameters,
        [x, *(t for module in parameters for t in module)],
        (tuple(map(len, parameters)), tuple(pools.items()), tuple(taps)),
        *(x, parameters, pools, taps),
        casts=casts,
    )
    checks.probability(dropout)
    if dropout and not global_pool:
        raise ValueError(f"dropout is behind the global pool: without one it is 0, got {dropout}")
    impl = resolve(x)
    filters = [t for module in parameters for t in module[::2]]
    biases = [t for module in parameters for t in module[1::2]]
    trunk = Trunk(dict(pools), tuple(taps), global_pool)
    if impl == "triton" and _trunk.why_not(filters, trunk) is None:
        x = settle(autocast(x) if casts else x, impl)
        kept, scale = None, 1.0
        if dropout:
            last = parameters[-1]
            channels = sum(last[i].shape[0] for i in (0, 4, 8, 10))
            kept, scale = drawn(x, channels, dropout)
        y, tapped, _ = call(
            _trunk.inception_trunk,
            *(x, filters, biases, kept, scale, trunk.integers, _save_from(x, parameters)),
        )
        return y, tuple(tapped)
    outputs = []
    for i, module in enumerate(parameters):
        x = inception(x, *module)
        outputs.append(x)
        if i in pools:
            x = pool(_pooling.max_pool2d, x, pools[i])
    if global_pool and dropout:
        x = global_avg_pool2d_dropout(x, dropout)[:, :, None, None]
    elif global_pool:
        x = global_avg_pool2d(x)
    return x, tuple(outputs[i] for i in taps)


def _save_from(x: Tensor, parameters: Sequence[Sequence[Tensor]]) -> int:
    """The first module through which a gradient will pass; one behind the last for none."""
    if not torch.is_grad_enabled():
        return len(parameters)
    if x.requires_grad:
        return 0
    needs = (any(t.requires_grad for t in module) for module in parameters)
    return next((i for i, need in enumerate(needs) if need), len(parameters))

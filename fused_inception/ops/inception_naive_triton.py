"""The script of the naive module on the Triton path: 2 launches forward, 4 backward."""

import torch
from torch import Tensor

from fused_inception.geometry import NaiveDims, Window, align_up, power_of_two
from fused_inception.kernels.finish import launch_finish
from fused_inception.kernels.max_pool import launch_max_pool_fwd
from fused_inception.kernels.naive import launch_naive_conv, naive_packing
from fused_inception.kernels.naive_grad import (
    launch_naive_input_grad,
    launch_naive_wgrad,
    naive_unfinished,
)
from fused_inception.kernels.pack import launch_pack
from fused_inception.kernels.relu_mask import launch_relu_mask
from fused_inception.kernels.vectors import lanes_of
from fused_inception.ops import filter_cache
from fused_inception.ops.layout import (
    empty_channels_last,
    empty_filter_grads,
    for_kernels,
    naive_dims_of,
)
from fused_inception.ops.problem import problem_of
from fused_inception.tuning.chosen import (
    mask_config,
    naive_config,
    naive_input_grad_config,
    naive_wgrad_config,
    vector_config,
)
from fused_inception.tuning.heuristic import finish_config

POOL = Window(kernel=3, stride=1, padding=1)


def forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C_OUT, H, W] exactly channels last, and with `save` the tensors of `saved_like`.

    x: [N, C_IN, H, W], read in place where `layout.why_not_in_place` has no objection, else copied
    once. Filters and biases in any floating dtype.
    """
    dims = naive_dims_of(filters)
    n, _, height, width = x.shape
    ops, target, pixels = problem_of(x)
    w, b = filter_cache.kept(
        [*filters, *biases], (x.dtype,),
        lambda: launch_pack([naive_packing(dims)], filters, biases, x.dtype)[0], save=save,
    )  # fmt: skip
    y = empty_channels_last(n, dims.out_channels, height, width, dtype=x.dtype, device=x.device)
    index, mask = saved = saved_like(x, dims)
    if not save:
        index, mask = index.new_empty(0), mask.new_empty(0)
    x = for_kernels(x)
    launch_naive_conv(
        dims, x, w, b, y, mask, naive_config(dims, pixels, ops, target),
        save=save, precision=ops.precision,
    )  # fmt: skip
    vectors = power_of_two(n * height * width * x.shape[1] // lanes_of(x.dtype))
    launch_max_pool_fwd(
        x,
        y[:, dims.offsets[3] :],
        index,
        POOL,
        vector_config(vectors, target),
        save=save,
    )
    return y, saved if save else []


def saved_like(x: Tensor, dims: NaiveDims) -> list[Tensor]:
    """Empty tensors of the shapes and strides that `forward` saves.

    The winning tap of each pooling window, 1 byte; the ReLU mask of the convolutions, 1 bit.
    """
    n, c_in, h, w = x.shape
    index = empty_channels_last(n, align_up(c_in), h, w, dtype=torch.uint8, device=x.device)
    mask = x.new_empty((n * h * w, dims.slot_channels // 8), dtype=torch.uint8)
    return [index, mask]


def backward(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    biases_dtype: list[torch.dtype],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, three filters, three biases; 0 elements where `needs` says no.

    dy: [N, C_OUT, H, W] in the dtype of x, any strides. Its pool branch has no ReLU and is read
    where it lies if it can be. dx comes exactly channels last; a filter's gradient in the strides
    of the filter where those are contiguous or channels last.
    """
    dims = naive_dims_of(filters)
    index, mask = saved
    ops, target, pixels = problem_of(x)
    need_x, need_w, need_b = needs[0], needs[1:4], needs[4:]
    dz, partial = launch_relu_mask(
        dims.conv_widths, dy, mask, mask_config(dims.slot_channels, pixels, target)
    )
    dx = x.new_empty(0)
    if need_x:
        ((w, _),) = launch_pack([naive_packing(dims)], filters, None, x.dtype)
        dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
        launch_naive_input_grad(
            dims, dz, for_kernels(dy[:, dims.offsets[3] :]), index, w, dx,
            naive_input_grad_config(dims, pixels, ops, target), precision=ops.precision,
        )  # fmt: skip
    filter_grads = empty_filter_grads(filters, need_w)
    bias_grads = [
        x.new_empty(f.shape[0] if need else 0, dtype=dtype)
        for f, need, dtype in zip(filters, need_b, biases_dtype, strict=True)
    ]
    if any(need_w) or any(need_b):
        names = zip(("conv1", "conv3", "conv5"), need_w, strict=True)
        partial_filters = launch_naive_wgrad(
            dims, for_kernels(x), dz, naive_wgrad_config(dims, pixels, ops, target),
            groups=frozenset(name for name, need in names if need), precision=ops.precision,
        )  # fmt: skip
        part = naive_unfinished(dims, partial_filters, partial, filter_grads, bias_grads)
        launch_finish([part], finish_config())
    return [dx, *filter_grads, *bias_grads]

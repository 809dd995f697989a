"""The script of one convolution with BatchNorm in training, on the Triton path."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception.geometry import align_up, sums_in_stages
from fused_inception.kernels.batch_norm import launch_batch_statistics
from fused_inception.kernels.batch_norm_grad import launch_norm_grad
from fused_inception.kernels.conv2d import launch_conv2d_fwd, pack_filter
from fused_inception.kernels.epilogue import launch_epilogue
from fused_inception.kernels.image_conv import launch_image_conv_fwd
from fused_inception.kernels.launch import cdiv
from fused_inception.kernels.moments import Moments, merged_moments
from fused_inception.kernels.normalise import launch_normalise
from fused_inception.kernels.stem import launch_image_pack
from fused_inception.kernels.stem_conv import launch_stem_conv_fwd, packed_image_shape
from fused_inception.ops import library_triton
from fused_inception.ops.conv2d_triton import image_of, input_and_filter_gradients, map_shape
from fused_inception.ops.inception_bn_triton import norm_parameters
from fused_inception.ops.layout import empty_channels_last, for_kernels
from fused_inception.ops.problem import problem_of
from fused_inception.ops.replay import replayed
from fused_inception.ops.running import Running
from fused_inception.tuning import dispatch
from fused_inception.tuning.chosen import (
    conv_config,
    image_conv_config,
    norm_config,
    stem_conv_config,
)
from fused_inception.tuning.conv_heuristic import epilogue_config
from fused_inception.tuning.heuristic import finish_config
from fused_inception.tuning.norm_heuristic import merge_config, statistics_config


@replayed
def forward(
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: Running,
    eps: float,
    stride: int,
    padding: int,
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C_OUT, H_out, W_out] exactly channels last, and what `saved_like` describes.

    Three launches beside the packing, of an image too: convolution, statistics, normalisation;
    where tiles are many one more, which merges them in groups.
    """
    (weight,) = filters
    c_out, c_in, k, _ = weight.shape
    shape = map_shape(x, weight, stride, padding)
    z, norm, packed = saved_like(x, filters, stride, padding)
    ops, target, pixels = problem_of(z)
    n_pixels = shape[0] * shape[2] * shape[3]
    image = image_of(weight, stride, padding)

    def moments(tile: int) -> Moments:
        partial = torch.empty(
            (cdiv(n_pixels, tile), 3, z.shape[1]), dtype=torch.float32, device=x.device
        )
        return Moments(partial, tile)

    plan = dispatch.conv_plan(c_in, c_out, k, stride, pixels, ops, target, norm=True)
    packed_w = launch_image_pack(x, weight, packed) if packed.numel() else None
    if plan.library("conv.forward"):
        raw = library_triton.convolve(x, weight.to(x.dtype), stride, padding)
        config = epilogue_config(z.shape[1])
        found = moments(config.block_p)
        # where z has slots of padding they are filled, else the raw result is z
        dense = raw.shape == z.shape
        z = raw if dense else z
        launch_epilogue(raw, None, None if dense else z, None, config, moments=found.partial)
    elif packed_w is not None:
        stem_config = stem_conv_config(c_out, pixels, ops, target)
        found = moments(stem_config.forward.block_m)
        launch_stem_conv_fwd(
            packed, packed_w, None, z, None, stem_config,
            precision=ops.precision, moments=found.partial,
        )  # fmt: skip
    elif image is not None:
        image_config = image_conv_config(image.positions, c_out, pixels, ops, target)
        found = moments(image_config.forward.block_m)
        launch_image_conv_fwd(
            image, x, weight.contiguous(), None, z, None, image_config,
            save=False, precision=ops.precision, moments=found.partial,
        )  # fmt: skip
    else:
        conv = conv_config(c_in, c_out, k, pixels, ops, target, norm=True)
        found = moments(conv.forward.block_m)
        w, b = pack_filter(weight, weight.new_empty(0), x.dtype)
        launch_conv2d_fwd(
            for_kernels(x), w, b, z, None, conv,
            kernel=k, save=False, precision=ops.precision, moments=found.partial,
        )  # fmt: skip
    if sums_in_stages(n_pixels):
        found, _ = merged_moments(found, None, n_pixels, merge_config())
    layers = norm_parameters(filters, gammas, betas, running)
    launch_batch_statistics(
        norm, (found, layers), None, n_pixels, statistics_config(),
        momentum=running.momentum or 0.0, eps=eps, skip=running.skip,
    )  # fmt: skip
    y = empty_channels_last(*shape, dtype=x.dtype, device=x.device)
    launch_normalise((c_out,), z, norm, 0, y, norm_config(z.shape[1], pixels, target))
    return y, [z, norm, packed]


def saved_like(x: Tensor, filters: list[Tensor], stride: int, padding: int) -> list[Tensor]:
    """Empty tensors of the shapes and strides that `forward` saves beside x and the filter.

    The raw result, channels padded to slots; mean, inverse deviation, scale and beta, fp32; the
    elements of conv1's packed image, of other convolutions none.
    """
    n, c_out, height, width = map_shape(x, filters[0], stride, padding)
    slots = align_up(c_out)
    image = image_of(filters[0], stride, padding)
    packs = image is not None and image.packs
    return [
        empty_channels_last(n, slots, height, width, dtype=x.dtype, device=x.device),
        x.new_empty((4, slots), dtype=torch.float32),
        x.new_empty(math.prod(packed_image_shape(n, height, width)) if packs else 0),
    ]


def backward(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    filters: list[Tensor],
    gammas: list[Tensor],
    stride: int,
    padding: int,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, filter, gamma and beta; 0 elements where `needs` says no."""
    (weight,) = filters
    z, norm, packed = saved
    c_out = weight.shape[0]
    _, target, pixels = problem = problem_of(dy)
    like = gammas[0] if gammas else norm[0, :c_out]
    dgamma, dbeta = (torch.empty_like(like) if need else None for need in needs[2:])
    dz = launch_norm_grad(
        (c_out,), dy, z, norm, 0, [dgamma], [dbeta],
        norm_config(z.shape[1], pixels, target), finish_config(),
    )  # fmt: skip
    # behind a BatchNorm there is no bias
    empty = norm.new_empty(0)
    dx, dw = input_and_filter_gradients(
        dz, x, packed, weight, stride, padding, needs[:2], norm[:0], empty, problem, norm=True
    )
    return [dx, dw, empty if dgamma is None else dgamma, empty if dbeta is None else dbeta]

"""The script of one convolution with bias and ReLU on the Triton path."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception.geometry import IMAGE_CHANNELS, align_up, conv_out, sums_in_stages
from fused_inception.kernels.conv2d import (
    conv2d_unfinished,
    launch_conv2d_dgrad,
    launch_conv2d_fwd,
    launch_conv2d_wgrad,
    pack_filter,
)
from fused_inception.kernels.epilogue import launch_epilogue
from fused_inception.kernels.finish import launch_finish
from fused_inception.kernels.image_conv import (
    ImageConv,
    launch_image_conv_dgrad,
    launch_image_conv_fwd,
    launch_image_conv_wgrad,
)
from fused_inception.kernels.relu_mask import launch_relu_mask
from fused_inception.kernels.stem import launch_image_pack
from fused_inception.kernels.stem_conv import launch_stem_conv_fwd, packed_image_shape
from fused_inception.kernels.stem_wgrad import launch_packed_wgrad
from fused_inception.ops import filter_cache, library_triton
from fused_inception.ops.layout import empty_channels_last, empty_filter_grad, for_kernels
from fused_inception.ops.problem import problem_of
from fused_inception.tuning import dispatch
from fused_inception.tuning.chosen import (
    conv_config,
    image_conv_config,
    mask_config,
    stem_conv_config,
)
from fused_inception.tuning.conv_heuristic import epilogue_config, packed_wgrad_config
from fused_inception.tuning.heuristic import Operands, finish_config
from fused_inception.tuning.targets import Target


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C_OUT, H_out, W_out] exactly channels last, and with `save` [its ReLU mask, 1 bit].

    An image is read in its own layout and dtype, by the network's conv1 packed where pixels are
    many; any other x as `layout.for_kernels` has it.
    """
    (mask,) = saved_like(x, weight, stride, padding)
    y = empty_channels_last(*map_shape(x, weight, stride, padding), dtype=x.dtype, device=x.device)
    if not save:
        mask = mask.new_empty(0)
    ops, target, pixels = problem_of(y)
    shape = image_of(weight, stride, padding)
    c_out, c_in, k, _ = weight.shape
    w, b = weight, bias.contiguous()
    if shape is None:
        w, b = filter_cache.kept(
            [weight, bias], (x.dtype,), lambda: pack_filter(weight, bias, x.dtype), save=save
        )
    plan = dispatch.conv_plan(c_in, c_out, k, stride, pixels, ops, target)
    if plan.library("conv.forward"):
        if shape is None:
            raw = library_triton.convolve_packed(for_kernels(x), w, k)
        else:
            raw = library_triton.convolve(x, weight.to(x.dtype), stride, padding)
        launch_epilogue(raw, b, y, mask if save else None, epilogue_config(c_out))
    elif shape is not None and shape.packs and sums_in_stages(y.numel() // c_out):
        packed = y.new_empty(packed_image_shape(y.shape[0], *y.shape[2:]))
        launch_stem_conv_fwd(
            packed, launch_image_pack(x, weight, packed), b, y, mask,
            stem_conv_config(c_out, pixels, ops, target), save=save, precision=ops.precision,
        )  # fmt: skip
    elif shape is not None:
        launch_image_conv_fwd(
            shape, x, weight.contiguous(), b, y, mask,
            image_conv_config(shape.positions, shape.c_out, pixels, ops, target),
            save=save, precision=ops.precision,
        )  # fmt: skip
    else:
        launch_conv2d_fwd(
            for_kernels(x), w, b, y, mask, conv_config(c_in, c_out, k, pixels, ops, target),
            kernel=k, save=save, precision=ops.precision,
        )  # fmt: skip
    return y, [mask] if save else []


def saved_like(x: Tensor, weight: Tensor, stride: int, padding: int) -> list[Tensor]:
    """An empty tensor of the shape of the mask that `forward` saves."""
    n, c_out, height, width = map_shape(x, weight, stride, padding)
    return [x.new_empty((n * height * width, align_up(c_out) // 8), dtype=torch.uint8)]


def backward(
    dy: Tensor,
    x: Tensor,
    saved: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: int,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight, bias; 0 elements where `needs` says no."""
    *needs, need_b = needs
    _, target, pixels = problem = problem_of(dy)
    (mask,) = saved
    c_out = weight.shape[0]
    dz, sums = launch_relu_mask((c_out,), dy, mask, mask_config(align_up(c_out), pixels, target))
    db = torch.empty_like(bias) if need_b else bias.new_empty(0)
    dx, dw = input_and_filter_gradients(
        dz, x, None, weight, stride, padding, needs, sums, db, problem, norm=False
    )
    return [dx, dw, db]


def input_and_filter_gradients(
    dz: Tensor,
    x: Tensor,
    packed: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    needs: Sequence[bool],
    sums: Tensor,
    db: Tensor,
    problem: tuple[Operands, Target, int],
    *,
    norm: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, of the convolution alone, from that of its raw result, `dz` [N,
    slots of C_OUT, H_out, W_out] dense; 0 elements where `needs` says no.

    packed: the elements of the packed image, ahead of a BatchNorm; of x that is not packed none.
    `db` is filled from `sums`, partial sums of dz [rows, slots of C_OUT], where it has elements.
    problem: of dz. norm: whether a BatchNorm is behind the convolution.
    """
    need_x, need_w = needs
    c_out, c_in, k, _ = weight.shape
    ops, target, pixels = problem
    plan = dispatch.conv_plan(c_in, c_out, k, stride, pixels, ops, target, norm=norm)
    their_dx, their_dw = library_triton.gradients(
        dz, x, weight, stride, padding,
        need_x=need_x and plan.library("conv.dgrad"), need_w=need_w and plan.library("conv.wgrad"),
    )  # fmt: skip
    need_x, need_w = need_x and their_dx is None, need_w and their_dw is None
    dx, dw = x.new_empty(0), weight.new_empty(0)
    if need_x:
        dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    taps = k * k
    image = image_of(weight, stride, padding)
    if image is None:
        config = conv_config(c_in, c_out, k, pixels, ops, target, norm=norm)
        if need_x:
            w, _ = pack_filter(weight, None, dz.dtype)
            launch_conv2d_dgrad(dz, w, dx, None, config, kernel=k, precision=ops.precision)
        if need_w:
            dw = empty_filter_grad(weight)
            partial = launch_conv2d_wgrad(
                for_kernels(x), dz, config, kernel=k, precision=ops.precision
            )
    else:
        image_config = image_conv_config(image.positions, c_out, pixels, ops, target)
        if need_x:
            launch_image_conv_dgrad(
                image, dz, weight.contiguous(), dx, image_config, precision=ops.precision
            )
        if need_w:
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if packed is not None and packed.numel():
                launch_packed_wgrad(
                    packed, dz, dw, packed_wgrad_config(dz.shape[1], pixels, ops, target),
                    finish_config(), precision=ops.precision,
                )  # fmt: skip
                return dx if their_dx is None else their_dx, dw
            partial = launch_image_conv_wgrad(
                image, x, dz, image_config, finish_config(), precision=ops.precision
            )
            # the last row of each split is the gradient of the bias
            taps, sums = 1, partial[:, -1]
    if need_w or db.numel():
        if not need_w:
            partial = sums[:0, None]
        launch_finish([conv2d_unfinished(partial, sums, dw, db, taps=taps)], finish_config())
    return dx if their_dx is None else their_dx, dw if their_dw is None else their_dw


def image_of(weight: Tensor, stride: int, padding: int) -> ImageConv | None:
    c_out, c_in, k, _ = weight.shape
    if c_in > IMAGE_CHANNELS:
        return None
    return ImageConv(c_in, c_out, k, stride, padding)


def map_shape(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[int, int, int, int]:
    n, _, height, width = x.shape
    k = weight.shape[2]
    return (
        n,
        weight.shape[0],
        conv_out(height, k, stride, padding),
        conv_out(width, k, stride, padding),
    )

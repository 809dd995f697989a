"""The script of the stem on the Triton path: five launches forward, at most six backward beside
packing (one more for the gradient of an image).

Of its convolutions a plan may give the library the forward of conv1 and all of conv2 and conv3; the
gradients of conv1 come with that of its bias, and stay ours.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fused_inception.kernels.conv2d import launch_conv2d_dgrad, launch_conv2d_fwd
from fused_inception.kernels.epilogue import launch_epilogue, launch_gate
from fused_inception.kernels.image_conv import ImageConv, launch_image_conv_dgrad
from fused_inception.kernels.launch import cdiv
from fused_inception.kernels.pack import launch_pack
from fused_inception.kernels.stem import (
    ImageToPack,
    StemShape,
    launch_stem_pack,
)
from fused_inception.kernels.stem_conv import BORDER, launch_stem_conv_fwd
from fused_inception.kernels.stem_wgrad import StemMaps, launch_stem_finish, launch_stem_wgrad
from fused_inception.ops import conv2d_triton, filter_cache, library_triton, pooling_triton
from fused_inception.ops.layout import empty_channels_last, empty_filter_grad
from fused_inception.ops.problem import problem_of
from fused_inception.ops.replay import replayed
from fused_inception.ops.stages import Stem
from fused_inception.tuning import dispatch
from fused_inception.tuning.chosen import (
    conv_config,
    image_conv_config,
    stem_conv_config,
    stem_wgrad_config,
)
from fused_inception.tuning.configs import ImageConvConfig
from fused_inception.tuning.conv_heuristic import epilogue_config
from fused_inception.tuning.heuristic import finish_config


def forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], stem: Stem, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """y [N, C3, H, W] exactly channels last, and with `save` what `backward` needs beside the
    filters and x.

    x: an image of any strides. Filters and biases in any floating dtype.

    With `save` the image is packed, and the packed one is what backward reads: x is then of use for
    its own gradient alone.

    Saved: the pooled map and its winning taps, 1 byte each; the inputs of conv2 and of conv3; the
    output of conv3; the winning taps of the second pool. The gates of the three ReLUs are among
    them: the pooled map (only a winner gets a gradient, and its value is there), conv3's input, its
    output. Behind them the packed image.
    """
    w1, w2, w3 = filters
    shape = _shape(filters, stem)
    if not save:
        flat, b = filter_cache.kept(
            [w2, w3, *biases[1:]], (x.dtype,),
            lambda: launch_pack([shape.packing], [w2, w3], biases[1:], x.dtype)[0], save=False,
        )  # fmt: skip
        return _inference(x, w1, biases[0], flat, b, shape, stem), []
    out_height, out_width = (stem.sides(side, shape.conv1.kernel)[0] for side in x.shape[2:])
    to_pack = ImageToPack(x, w1, biases[0], out_height, out_width)
    packed = launch_stem_pack(to_pack, w2, w3, biases[1:], x.dtype)
    image, b1 = packed.image, packed.b[shape.c2 + shape.c3 :]

    def conv1() -> Tensor:
        return _convolve_image(to_pack, image, packed.w1, b1, stem)

    y, saved = _layers(conv1, packed.w, packed.b, shape, stem, save)
    return y, [*saved, image]


@replayed
def _inference(
    x: Tensor, w1: Tensor, b1: Tensor, flat: Tensor, b: Tensor, shape: StemShape, stem: Stem
) -> Tensor:
    """Of packed filters and biases `flat` and `b` of conv2 and conv3."""

    def conv1() -> Tensor:
        return conv2d_triton.forward(x, w1, b1, stem.stride, stem.padding, False)[0]

    return _layers(conv1, flat, b, shape, stem, False)[0]


def _layers(
    conv1: Callable[[], Tensor], flat: Tensor, b: Tensor, shape: StemShape, stem: Stem, save: bool
) -> tuple[Tensor, list[Tensor]]:
    """`forward` behind the packing, and what it saves but for the image. What conv1 gives is of use
    to the first pool alone."""
    z, pooled_and_index = pooling_triton.max_pool2d_lrn(conv1(), stem.norm1, stem.pool1, save)
    packed2, packed3 = shape.packed(flat, backward=False)
    r = _convolve(z, packed2, b[: shape.c2], kernel=1)
    y2 = _convolve(r, packed3, b[shape.c2 : shape.c2 + shape.c3], kernel=3)
    y, index = pooling_triton.lrn_max_pool2d(y2, stem.norm2, stem.pool2, save)
    return y, [*pooled_and_index, z, r, y2, *index]


def backward(
    dy: Tensor,
    x: Tensor | None,
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    stem: Stem,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, three filters, three biases; 0 elements where `needs` says no.

    dy: [N, C3, H, W] in the dtype of x, any strides. x: None where the image needs no gradient. dx
    comes exactly channels last, the gradient of conv1's filter contiguous, another filter's in its
    strides.
    """
    pooled, index1, z, r, y2, index2, image = saved
    need_x, need_w, need_b = needs[0], needs[1:4], needs[4:]
    need1 = need_x or need_w[0] or need_b[0]
    need2 = need1 or need_w[1] or need_b[1]
    shape = _shape(filters, stem)
    precision = problem_of(y2)[0].precision
    dz3 = pooling_triton.lrn_max_pool2d_backward(dy, y2, index2, stem.norm2, stem.pool2, gated=True)
    dz1, dz2, sums2 = None, None, dz3.new_empty((0, shape.c2), dtype=torch.float32)
    if need2:
        ((flat, _),) = launch_pack([shape.packing], filters[1:], None, y2.dtype)
        packed2, packed3 = shape.packed(flat, backward=True)
        dz2, sums2 = _data_gradient(dz3, packed3, r, r, kernel=3)
        if need1:
            dz, _ = _data_gradient(dz2, packed2, z, None, kernel=1)
            n, height, width, _ = image.shape
            map_shape = (n, shape.conv1.c_out, height - BORDER, width - BORDER)
            dz1 = pooling_triton.max_pool2d_lrn_backward(
                dz, map_shape, pooled, index1, stem.norm1, stem.pool1, gated=True
            )  # fmt: skip
    dx = y2.new_empty(0)
    if need_x and dz1 is not None and x is not None:
        dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
        launch_image_conv_dgrad(
            shape.conv1, dz1, filters[0].contiguous(), dx, _image_config(shape, dz1),
            precision=precision,
        )  # fmt: skip
    gradients = _parameter_gradients(
        shape, StemMaps(image, z, r, dz1, dz2, dz3), sums2,
        filters, biases, need_w, need_b,
    )  # fmt: skip
    return [dx, *gradients]


def _shape(filters: list[Tensor], stem: Stem) -> StemShape:
    c1, c_in, kernel, _ = filters[0].shape
    conv1 = ImageConv(c_in, c1, kernel, stem.stride, stem.padding)
    return StemShape(conv1, filters[1].shape[0], filters[2].shape[0])


def _image_config(shape: StemShape, dz1: Tensor) -> ImageConvConfig:
    ops, target, pixels = problem_of(dz1)
    return image_conv_config(shape.conv1.positions, shape.conv1.c_out, pixels, ops, target)


def _convolve_image(
    image: ImageToPack, packed: Tensor, weight: Tensor, bias: Tensor, stem: Stem
) -> Tensor:
    """relu(conv1 + bias), exactly channels last, of the packed image; by the library of the image
    itself."""
    c_out, c_in, kernel, _ = image.weight.shape
    y = empty_channels_last(
        image.x.shape[0], c_out, image.out_height, image.out_width,
        dtype=packed.dtype, device=packed.device,
    )  # fmt: skip
    ops, target, pixels = problem_of(y)
    plan = dispatch.conv_plan(c_in, c_out, kernel, stem.stride, pixels, ops, target)
    if plan.library("conv.forward"):
        y, _ = conv2d_triton.forward(
            image.x, image.weight, image.bias, stem.stride, stem.padding, False
        )
        return y
    launch_stem_conv_fwd(
        packed, weight, bias, y, None, stem_conv_config(c_out, pixels, ops, target),
        precision=ops.precision,
    )  # fmt: skip
    return y


def _convolve(x: Tensor, packed: Tensor, bias: Tensor, *, kernel: int) -> Tensor:
    """relu(conv(x) + bias), [N, C_OUT, H, W] exactly channels last; its gate is kept elsewhere."""
    n, c_in, height, width = x.shape
    c_out = packed.shape[0]
    y = empty_channels_last(n, c_out, height, width, dtype=x.dtype, device=x.device)
    ops, target, pixels = problem_of(y)
    if _plan(c_in, c_out, kernel, y).library("conv.forward"):
        raw = library_triton.convolve_packed(x, packed, kernel)
        launch_epilogue(raw, bias, y, None, epilogue_config(c_out))
        return y
    launch_conv2d_fwd(
        x, packed, bias, y, x.new_empty(0, dtype=torch.uint8),
        conv_config(c_in, c_out, kernel, pixels, ops, target),
        kernel=kernel, save=False, precision=ops.precision,
    )  # fmt: skip
    return y


def _data_gradient(
    dz: Tensor, packed: Tensor, x: Tensor, gate: Tensor | None, *, kernel: int
) -> tuple[Tensor, Tensor]:
    """The gradient of a convolution's input x, masked by `gate`, and its column sums where there is
    a gate."""
    if _plan(x.shape[1], dz.shape[1], kernel, x).library("conv.dgrad"):
        return _their_data_gradient(dz, packed, gate, kernel=kernel)
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    ops, target, pixels = problem_of(x)
    config = conv_config(x.shape[1], dz.shape[1], kernel, pixels, ops, target)
    sums = launch_conv2d_dgrad(dz, packed, dx, gate, config, kernel=kernel, precision=ops.precision)
    return dx, sums


def _their_data_gradient(
    dz: Tensor, packed: Tensor, gate: Tensor | None, *, kernel: int
) -> tuple[Tensor, Tensor]:
    raw = library_triton.convolve_packed(dz, packed, kernel)
    n, c, height, width = raw.shape
    config = epilogue_config(c)
    tiles = 0 if gate is None else cdiv(n * height * width, config.block_p)
    sums = torch.empty((tiles, c), dtype=torch.float32, device=raw.device)
    if gate is None:
        return raw, sums
    dx = torch.empty_like(raw)
    launch_gate(raw, gate, dx, sums, config)
    return dx, sums


def _plan(c_in: int, c_out: int, kernel: int, like: Tensor) -> dispatch.Plan:
    """Of conv2 or conv3, whose maps are as large as `like`."""
    ops, target, pixels = problem_of(like)
    return dispatch.conv_plan(c_in, c_out, kernel, 1, pixels, ops, target)


def _parameter_gradients(
    shape: StemShape,
    maps: StemMaps,
    sums2: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    need_w: list[bool],
    need_b: list[bool],
) -> list[Tensor]:
    """Gradients of filters and biases: the launch of partial sums, and the one that finishes
    them."""
    like = [
        torch.empty_like(filters[0], memory_format=torch.contiguous_format),
        *map(empty_filter_grad, filters[1:]),
        *map(torch.empty_like, biases),
    ]
    needs = (*need_w, *need_b)
    grads = [t if need else t.new_empty(0) for t, need in zip(like, needs, strict=True)]
    ours = list(grads[:3])
    for i, x, dz in ((1, maps.z, maps.dz2), (2, maps.r, maps.dz3)):
        c_out, c_in, kernel, _ = filters[i].shape
        if need_w[i] and _plan(c_in, c_out, kernel, x).library("conv.wgrad"):
            assert dz is not None  # for the type checker: a filter's gradient needs it
            library_triton.filter_gradient(dz, x, ours[i])
            ours[i] = ours[i].new_empty(0)
    if any(need_w) or any(need_b):
        ops, target, pixels = problem_of(maps.dz3)
        pixels1 = pixels if maps.dz1 is None else problem_of(maps.dz1)[2]
        widths = (shape.conv1.c_out, shape.c2, shape.c3)
        partials = launch_stem_wgrad(
            shape, maps,
            stem_wgrad_config(widths, pixels1, pixels, ops, target), finish_config(),
            # the gradient of conv1's bias comes with that of its filter
            filters=(need_w[0] or need_b[0], ours[1].numel() > 0, ours[2].numel() > 0),
            bias3=need_b[2], precision=ops.precision,
        )  # fmt: skip
        launch_stem_finish(shape, partials, sums2, ours, grads[3:], finish_config())
    return grads

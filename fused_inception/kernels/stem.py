"""The stem's convolutions together: conv1 reads images, conv2 is 1x1, conv3 3x3; packing of their
filters and, where conv1 reads it packed, of the image."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from fused_inception.geometry import STEM_CONV, align_up, conv_out
from fused_inception.kernels.image_conv import ImageConv, within_reach
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import (
    ELEMENTS,
    PackedBias,
    Packing,
    is_channels_last_filter,
    pack_all,
    pack_constants,
    row_packing,
)
from fused_inception.kernels.stem_conv import (
    DEPTH,
    pack_image,
    pack_image_filter,
    packed_image_shape,
)


@dataclass(frozen=True)
class StemShape:
    """The three convolutions; `c2` and `c3` are the output channels of conv2 and conv3."""

    conv1: ImageConv
    c2: int
    c3: int

    @property
    def packing(self) -> Packing:
        """The layout of conv2's and conv3's filters and biases."""
        return _packing(self.conv1.c_out, self.c2, self.c3, image=False)

    def packed(self, flat: torch.Tensor, *, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The filters of conv2 and conv3 among those packed so, as launchers of single convolutions
        take them."""
        c1, c2, c3 = self.conv1.c_out, self.c2, self.c3
        w2, w3 = flat[: c1 * c2], flat[c1 * c2 :]
        if backward:
            return w2.view(c1, 1, c2), w3.view(c2, 9, c3)
        return w2.view(c2, 1, c1), w3.view(c3, 9, c2)


@triton.jit(
    do_not_specialize=[
        "image_end", "filter_end", "n_packed", "packed_rows", "packed_columns", "height", "width",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _stem_pack_kernel(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype
    packed_ptr,  # [N, packed_rows, packed_columns, 16]
    w1_ptr,  # [C1, C_IN, 7, 7] likewise
    packed_w1_ptr,  # [C1, 256]
    # sizes
    image_end,  # first program behind the image
    filter_end,  # first program behind conv1's filter
    n_packed,
    packed_rows,
    packed_columns,
    height,
    width,
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # of `pack_all`, for all else
    w_ptr,
    b_ptr,
    filters,
    biases,
    # problem
    C_IN: tl.constexpr,
    C1: tl.constexpr,
    FILTERS: tl.constexpr,
    BIASES: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Program ranges: the image, conv1's filter, all other filters and all biases."""
    pid = tl.program_id(0)
    if pid < image_end:
        pack_image(
            x_ptr, packed_ptr, pid, n_packed, packed_rows, packed_columns,
            height, width, x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
            C_IN, BLOCK,
        )  # fmt: skip
    elif pid < filter_end:
        pack_image_filter(w1_ptr, packed_w1_ptr, pid - image_end, C1, C_IN, BLOCK)
    else:
        pack_all(
            w_ptr, b_ptr, filters, biases, pid - filter_end, FILTERS, BIASES, FOR_DGRAD, BLOCK,
            BLOCK_O,
        )  # fmt: skip


@dataclass(frozen=True)
class ImageToPack:
    """An image of any strides, conv1's filter and bias, rows and columns of its output."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    out_height: int
    out_width: int


@dataclass(frozen=True)
class PackedStem:
    """A packed image, and all filters and biases: conv1's filter [C1, DEPTH]; those of conv2 and
    conv3 flat; biases of conv2, conv3, conv1 behind each other."""

    image: torch.Tensor
    w1: torch.Tensor
    w: torch.Tensor
    b: torch.Tensor


def launch_stem_pack(
    image: ImageToPack,
    w2: torch.Tensor,
    w3: torch.Tensor,
    biases: list[torch.Tensor],
    dtype: torch.dtype,
) -> PackedStem:
    """Pack an image, of which `stem_conv` tells, all filters and, in fp32, all biases."""
    shape = packed_image_shape(image.x.shape[0], image.out_height, image.out_width)
    packing = _packing(image.weight.shape[0], w2.shape[0], w3.shape[0], image=True)
    source = w3 if is_channels_last_filter(w3) else w3.contiguous()
    programs, constants = pack_constants(
        (packing,), (False, is_channels_last_filter(source)), True, False, ELEMENTS
    )
    packed = torch.empty(shape, dtype=dtype, device=image.x.device)
    w = packed.new_empty(packing.filter_elements)
    b = torch.empty(packing.bias_elements, dtype=torch.float32, device=packed.device)
    others = (w2.contiguous(), source), tuple(bias.contiguous() for bias in (*biases, image.bias))
    packed_w1 = _launch_pack(image.x, image.weight, packed, (w, b, *others), programs, constants)
    return PackedStem(packed, packed_w1, w, b)


def launch_image_pack(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Fill `packed`, of `stem_conv.packed_image_shape` or flat, with an image of any strides;
    return conv1's filter packed, [C1, DEPTH], in the same dtype."""
    sides = (conv_out(side, *STEM_CONV) for side in x.shape[2:])
    packed = packed.view(packed_image_shape(x.shape[0], *sides))
    programs, constants = pack_constants((), (), False, False, ELEMENTS)
    return _launch_pack(x, weight, packed, (packed, packed, (), ()), programs, constants)


def _launch_pack(
    x: torch.Tensor,
    w1: torch.Tensor,
    packed: torch.Tensor,
    others: tuple[Any, ...],
    programs: int,
    constants: dict[str, Any],
) -> torch.Tensor:
    """Fill `packed`, and whatever `others`, `programs` and `constants` are of in `pack_all`; return
    conv1's filter packed."""
    x, w1 = within_reach(x), w1.contiguous()
    (c1, c_in, _, _), (n, rows, columns, _) = w1.shape, packed.shape
    packed_w1 = packed.new_empty((c1, DEPTH))
    image_end = cdiv(packed.numel(), ELEMENTS)
    filter_end = image_end + cdiv(packed_w1.numel(), ELEMENTS)
    run(
        _stem_pack_kernel,
        (filter_end + programs,),
        (x, packed, w1, packed_w1, image_end, filter_end, n * rows * columns, rows, columns,
         *x.shape[2:], *x.stride(), *others),
        dict(C_IN=c_in, C1=c1, **constants),
        num_warps=4,
    )  # fmt: skip
    return packed_w1


@functools.lru_cache(maxsize=1024)
def _packing(c1: int, c2: int, c3: int, *, image: bool) -> Packing:
    """Of conv2 and conv3; with an image, behind theirs, the bias of conv1."""
    of = row_packing((c2, c1, 1), (c3, c2, 9))
    if not image:
        return of
    bias1 = PackedBias(c1, of.bias_elements)
    return replace(of, biases=(*of.biases, bias1), bias_elements=of.bias_elements + align_up(c1))

"""The stem's convolutions together: conv1 reads images, conv2 is 1x1, conv3 3x3; packing of their
filters and, where conv1 reads it packed, of the image."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.image_conv import ImageConv
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter, pack_bias, pack_rows
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

    def packed(self, flat: torch.Tensor, *, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The filters of conv2 and conv3 in the result of `launch_stem_pack`, as launchers of
        single convolutions take them."""
        c1, c2, c3 = self.conv1.c_out, self.c2, self.c3
        w2, w3 = flat[: c1 * c2], flat[c1 * c2 : self._before_conv1]
        if backward:
            return w2.view(c1, 1, c2), w3.view(c2, 9, c3)
        return w2.view(c2, 1, c1), w3.view(c3, 9, c2)

    def packed1(self, flat: torch.Tensor) -> torch.Tensor:
        """Likewise that of conv1, [C1, DEPTH], where it is packed."""
        return flat[self._before_conv1 :].view(self.conv1.c_out, DEPTH)

    @property
    def _before_conv1(self) -> int:
        return self.c2 * (self.conv1.c_out + 9 * self.c3)


@triton.jit(
    do_not_specialize=[
        "image_end", "n_packed", "packed_rows", "packed_columns", "height", "width",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _stem_pack_kernel(
    # tensors
    w2_ptr,  # [C2, C1, 1, 1]
    w3_ptr,  # [C3, C2, 3, 3], or in memory [C3, 3, 3, C2] with LAST3
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype; None where it is not packed
    w1_ptr,  # [C1, C_IN, 7, 7] likewise
    b1_ptr,  # [C1]
    b2_ptr,  # [C2]
    b3_ptr,  # [C3]
    packed_ptr,  # [N, packed_rows, packed_columns, 16]
    # [C2, C1] and [C3, 9, C2], then [C1, 256]; with FOR_DGRAD [C1, C2] and [C2, 9 backwards, C3]
    w_ptr,
    b_ptr,  # [C2 + C3], then [C1], fp32
    # sizes
    image_end,  # first program behind the image
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
    # problem
    C_IN: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    LAST3: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Program ranges: the image; the filters of conv2, conv3 and, with an image, conv1, copied,
    transposed and cast; for a forward the last program packs the biases."""
    pid = tl.program_id(0) - image_end
    D: tl.constexpr = FOR_DGRAD
    T2: tl.constexpr = (C2 * C1 + BLOCK - 1) // BLOCK
    T3: tl.constexpr = T2 + (C3 * 9 * C2 + BLOCK - 1) // BLOCK
    T1: tl.constexpr = T3 + (0 if x_ptr is None else (C1 * 256 + BLOCK - 1) // BLOCK)
    if pid < 0:
        if x_ptr is not None:
            pack_image(
                x_ptr, packed_ptr, pid + image_end, n_packed, packed_rows, packed_columns,
                height, width, x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
                C_IN, BLOCK,
            )  # fmt: skip
    elif pid < T2:
        pack_rows(w2_ptr, w_ptr, pid, C2, C1, 1, C1, C2, C2, False, D, BLOCK)
    elif pid < T3:
        pack_rows(w3_ptr, w_ptr + C2 * C1, pid - T2, C3, C2, 9, C2, C3, C3, LAST3, D, BLOCK)
    elif pid < T1:
        if x_ptr is not None:
            pack_image_filter(w1_ptr, w_ptr + C2 * (C1 + 9 * C3), pid - T3, C1, C_IN, BLOCK)
    elif not FOR_DGRAD:
        pack_bias(b2_ptr, b_ptr, C2, C2, BLOCK)
        pack_bias(b3_ptr, b_ptr + C2, C3, C3, BLOCK)
        if x_ptr is not None:
            pack_bias(b1_ptr, b_ptr + (C2 + C3), C1, C1, BLOCK)


@dataclass(frozen=True)
class ImageToPack:
    """An image of any strides, conv1's filter and bias, rows and columns of its output."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    out_height: int
    out_width: int


def launch_stem_pack(
    w2: torch.Tensor,
    w3: torch.Tensor,
    biases: list[torch.Tensor] | None,
    dtype: torch.dtype,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters of conv2 and conv3, flat, in `dtype`, and both biases behind each other in fp32;
    without biases packed for the data gradients. `StemShape.packed` takes the filters apart."""
    w, b, _ = _launch(w2, w3, biases, None, dtype, block)
    return w, b


def launch_stem_pack_image(
    image: ImageToPack,
    w2: torch.Tensor,
    w3: torch.Tensor,
    biases: list[torch.Tensor],
    dtype: torch.dtype,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in a launch that packs an image, conv1's filter and its bias too, which come behind
    the others'; and the packed image, of which `stem_conv` tells."""
    w, b, packed = _launch(w2, w3, biases, image, dtype, block)
    assert packed is not None  # for the type checker
    return w, b, packed


def _launch(
    w2: torch.Tensor,
    w3: torch.Tensor,
    biases: list[torch.Tensor] | None,
    image: ImageToPack | None,
    dtype: torch.dtype,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    (c2, c1), c3, device = w2.shape[:2], w3.shape[0], w2.device
    source = w3 if is_channels_last_filter(w3) else w3.contiguous()
    elements = [c2 * c1, c3 * 9 * c2]
    packed: torch.Tensor | None = None
    x, w1, b1, image_programs, sizes = None, None, None, 0, [0] * 9
    if image is not None:
        x, w1, b1 = image.x, image.weight.contiguous(), image.bias.contiguous()
        n, _, height, width = x.shape
        shape = packed_image_shape(n, image.out_height, image.out_width)
        packed = torch.empty(shape, dtype=dtype, device=device)
        elements.append(c1 * DEPTH)
        image_programs = cdiv(packed.numel(), block)
        pixels = n * shape[1] * shape[2]
        sizes = [pixels, shape[1], shape[2], height, width, *x.stride()]
    biased = 0 if biases is None else c2 + c3 + (0 if image is None else c1)
    packed_w = torch.empty(sum(elements), dtype=dtype, device=device)
    packed_b = torch.empty(biased, dtype=torch.float32, device=device)
    b2, b3 = [b.contiguous() for b in biases] if biases else [packed_b] * 2
    run(
        _stem_pack_kernel,
        (image_programs + sum(cdiv(n, block) for n in elements) + (biases is not None),),
        # the first is a tensor, whatever is packed
        (w2.contiguous(), source, x, w1, b1, b2, b3, packed, packed_w, packed_b, image_programs,
         *sizes),
        dict(
            C_IN=0 if image is None else image.weight.shape[1],
            C1=c1,
            C2=c2,
            C3=c3,
            LAST3=is_channels_last_filter(source),
            FOR_DGRAD=not biases,
            BLOCK=block,
        ),
        num_warps=4,
    )  # fmt: skip
    return packed_w, packed_b, packed

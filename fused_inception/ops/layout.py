"""Channels-last memory: how outputs are made and what the Triton kernels can read in place."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception.geometry import ALIGN, InceptionDims, NaiveDims, align_up

# offsets within a tile, of up to 1024 pixels, have 32 bits
FARTHEST = 2**20


def empty_channels_last(
    n: int, c: int, h: int, w: int, *, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Uninitialised [N, C, H, W] with exactly these strides, also where a size is 0 or 1."""
    return torch.empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype, device=device)


def channels_last(x: Tensor) -> Tensor:
    """`x` in dense channels-last memory with exact strides; itself if it is that already.

    For implementations, below autograd.
    """
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    # contiguous() leaves strides of sizes 0 and 1 as they are; elements are in order all the same
    try:
        return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, strides)
    except RuntimeError:
        refuse_vmap()
        raise


def refuse_vmap() -> None:
    """What failed was the layout of a tensor; of those of vmap none can be had.

    Raises:
        RuntimeError: vmap is at work.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "vmap is not implemented for fused blocks; unfuse_ the model first, or take the "
            "functions of fused_inception.reference"
        ) from None


def as_saved(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that forward saved, maps again exactly channels last, all else contiguous: hooks of
    saved tensors, such as those of `save_on_cpu(pin_memory=True)`, may give them back in other
    strides."""
    return [channels_last(t) if t.dim() == 4 else t.contiguous() for t in tensors]


def why_not_in_place(x: Tensor) -> str | None:
    """Why the Triton kernels cannot read `x` where it lies; None where they can.

    They read channels-last pixels at equal distances: a dense tensor or a channel slice of one,
    with 8 k channels, pixels at multiples of 8 elements and not `FARTHEST` apart, the first at a
    multiple of 16 bytes.
    """
    n, c, h, w = x.shape
    pixel = _pixel_stride(x)
    if c % ALIGN != 0:
        return f"{c} channels, no multiple of {ALIGN}"
    if x.stride(1) != 1 or pixel < c:
        return "channels are not last"
    if (h > 1 and x.stride(2) != w * pixel) or (n > 1 and x.stride(0) != h * w * pixel):
        return "pixels are not evenly spaced"
    if pixel > FARTHEST:
        return f"pixels are {pixel} elements apart, more than {FARTHEST}"
    if pixel % ALIGN != 0:
        return f"pixels are {pixel} elements apart, no multiple of {ALIGN}"
    # addresses exist at run time only; the implementation asks again there
    if not torch.compiler.is_compiling() and x.data_ptr() % 16 != 0:
        return "the first element is not at a multiple of 16 bytes"
    return None


def for_kernels(x: Tensor) -> Tensor:
    """[N, C, H, W] as the Triton kernels read it: [N, 8 k, H, W], in place or copied once.

    Channels from C on are zero. The strides are those of `empty_channels_last` but for the distance
    of pixels, `stride(3)`, which is that of the tensor that `x` is a slice of. For implementations,
    below autograd.
    """
    n, c, h, w = x.shape
    if why_not_in_place(x) is None:
        pixel = _pixel_stride(x)
        return x.as_strided(x.shape, (h * w * pixel, 1, w * pixel, pixel))
    slots = align_up(c)
    copy = empty_channels_last(n, slots, h, w, dtype=x.dtype, device=x.device)
    copy[:, :c].copy_(x)
    copy[:, c:].zero_()
    return copy


def _pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next; strides of sizes below 2 mean nothing."""
    n, c, h, w = x.shape
    if w > 1:
        return x.stride(3)
    if h > 1:
        return x.stride(2)
    return x.stride(0) if n > 1 else c


def dims_of(filters: Sequence[Tensor]) -> InceptionDims:
    """The widths that six filters in the usual order define."""
    w1, w3r, w3, w5r, w5, wp = filters
    return InceptionDims(
        in_channels=w1.shape[1],
        ch1x1=w1.shape[0],
        ch3x3red=w3r.shape[0],
        ch3x3=w3.shape[0],
        ch5x5red=w5r.shape[0],
        ch5x5=w5.shape[0],
        pool_proj=wp.shape[0],
        kernel_5x5=w5.shape[2],
    )


def naive_dims_of(filters: Sequence[Tensor]) -> NaiveDims:
    """The widths that the three filters of a naive module define."""
    w1, w3, w5 = filters
    return NaiveDims(w1.shape[1], w1.shape[0], w3.shape[0], w5.shape[0])


def empty_filter_grads(weights: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Empty gradients of filters; 0 elements where `needs` says no."""
    return [
        empty_filter_grad(weight) if need else weight.new_empty(0)
        for weight, need in zip(weights, needs, strict=True)
    ]


def empty_filter_grad(weight: Tensor) -> Tensor:
    """An empty gradient in the filter's own strides where those are dense, else contiguous."""
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(weight)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def settle_all(
    gradients: Sequence[Tensor | None],
    x: Tensor,
    parameters: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """What a backward operator returns for x and its parameters: 0 elements where not needed, the
    gradient of x as it is, those of parameters settled. Gradients and `needs` may be longer."""
    settled = []
    for tensor, gradient, need in zip((x, *parameters), gradients, needs, strict=False):
        if not need or gradient is None:
            settled.append(tensor.new_empty(0))
        else:
            settled.append(gradient if tensor is x else settle(gradient, tensor))
    return settled


def gradients_like(x: Tensor, parameters: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Empty tensors of the shapes and strides that `settle_all` returns."""
    dx = empty_channels_last(*x.shape, dtype=x.dtype, device=x.device)
    like = [dx, *(torch.empty_like(p) for p in parameters)]
    return [
        gradient if need else gradient.new_empty(0)
        for gradient, need in zip(like, needs, strict=False)
    ]


def settle(gradient: Tensor, parameter: Tensor) -> Tensor:
    """`gradient` in the dtype and, where dense, the strides of its parameter, in its own memory."""
    alike = gradient.dtype == parameter.dtype and gradient.stride() == parameter.stride()
    # a part of a larger gradient would keep all of it alive
    if alike and not gradient._is_view():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)

"""Which tensors the kernels read in place, and what they get otherwise."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_inception.ops.layout import (
    channels_last,
    empty_channels_last,
    for_kernels,
    why_not_in_place,
)

SHAPES = [(2, 16, 5, 4), (1, 8, 1, 1), (0, 8, 3, 3), (3, 8, 1, 4), (3, 8, 4, 1), (1, 24, 1, 7)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def exact(n: int, c: int, h: int, w: int) -> tuple[int, int, int, int]:
    return h * w * c, 1, w * c, c


def filled(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


@shapes
def test_empty_has_exact_strides(shape: tuple[int, int, int, int]) -> None:
    x = empty_channels_last(*shape, dtype=torch.float16, device=torch.device("cpu"))
    assert x.shape == shape
    assert x.stride() == exact(*shape)


@shapes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_channels_last(shape: tuple[int, int, int, int], layout: torch.memory_format) -> None:
    x = filled(shape).contiguous(memory_format=layout)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.stride() == exact(*shape)
    assert channels_last(y) is y


@shapes
def test_dense_tensors_are_read_in_place(shape: tuple[int, int, int, int]) -> None:
    x = filled(shape)
    assert why_not_in_place(x) is None
    y = for_kernels(x)
    assert y.data_ptr() == x.data_ptr()
    assert y.stride() == exact(*shape)
    assert torch.equal(x, y)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_are_read_in_place(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w = shape
    x = channels_last(filled((n, c + 32, h, w), dtype))[:, 8 : 8 + c]
    assert why_not_in_place(x) is None
    y = for_kernels(x)
    assert y.data_ptr() == x.data_ptr()
    pixel = c + 32 if n > 1 or h * w > 1 else c  # one pixel has no neighbour
    assert y.stride() == (h * w * pixel, 1, w * pixel, pixel)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda x: x[:, :13], "13 channels, no multiple of 8", id="13-channels"),
        pytest.param(lambda x: x.contiguous(), "channels are not last", id="contiguous"),
        pytest.param(lambda x: x[:, ::3], "channels are not last", id="every-third-channel"),
        pytest.param(lambda x: x[:, :1].expand(-1, 8, -1, -1), "not last", id="one-channel"),
        pytest.param(lambda x: x[:, :, ::2], "not evenly spaced", id="every-second-row"),
        pytest.param(lambda x: x[:1, :, ::2], "not evenly spaced", id="rows-of-one-image"),
        pytest.param(
            lambda x: x[:1, :, :1, :1].expand(-1, -1, 6, 5), "not last", id="one-pixel-everywhere"
        ),
        pytest.param(lambda x: x[:, :, :, 1:], "not evenly spaced", id="cropped-columns"),
        pytest.param(lambda x: x[:, :, 1:], "not evenly spaced", id="cropped-rows"),
        pytest.param(lambda x: x[:1].expand(3, -1, -1, -1), "not evenly spaced", id="one-image"),
        pytest.param(lambda x: x.transpose(2, 3), "not evenly spaced", id="turned"),
        pytest.param(lambda x: x[:, 1:9], "16 bytes", id="odd-first-channel"),
        pytest.param(
            lambda x: filled((2, 13, 6, 5))[:, :8], "13 elements apart", id="slice-of-13-channels"
        ),
    ],
)
def test_others_are_copied(change: Callable[[Tensor], Tensor], reason: str) -> None:
    x = change(filled((2, 24, 6, 5)))
    assert reason in str(why_not_in_place(x))
    y = for_kernels(x)
    n, c, h, w = x.shape
    slots = -(-c // 8) * 8
    assert y.shape == (n, slots, h, w)
    assert y.stride() == exact(n, slots, h, w)
    assert torch.equal(y[:, :c], x)
    assert y[:, c:].count_nonzero() == 0
    assert why_not_in_place(y) is None


def test_pixels_far_apart_are_copied() -> None:
    """Their distances from the first of a tile would not fit 32 bits."""
    far = 2**20 + 8
    x = torch.empty(2 * far).as_strided((1, 8, 1, 2), (2 * far, 1, 2 * far, far)).fill_(3)
    assert why_not_in_place(x) == f"pixels are {far} elements apart, more than {2**20}"
    assert for_kernels(x).stride(3) == 8


def test_every_second_column_is_evenly_spaced() -> None:
    """Its pixels are 2 * 24 elements apart throughout: a slice like any other."""
    x = filled((2, 24, 6, 4))[:, :, :, ::2]
    assert why_not_in_place(x) is None
    y = for_kernels(x)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(x, y)

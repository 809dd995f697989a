"""Output sizes for any window against PyTorch's own convolution and pooling; shares of pixels."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from fused_inception.geometry import align_up, conv_out, even_share, pool_out, power_of_two

SIZES = st.integers(1, 40)
KERNELS = st.integers(1, 9)
STRIDES = st.integers(1, 5)
FAST = settings(max_examples=300, deadline=None)


def torch_size(operation, size: int, *window, **options) -> int | None:
    """Side of torch's output; None where torch refuses the window."""
    try:
        return operation(torch.empty(1, 1, size, size, device="meta"), *window, **options).shape[-1]
    except RuntimeError:
        return None


@FAST
@given(SIZES, KERNELS, STRIDES, st.integers(0, 4))
def test_conv_out(size: int, kernel: int, stride: int, padding: int) -> None:
    weight = torch.empty(1, 1, kernel, kernel, device="meta")
    want = torch_size(F.conv2d, size, weight, stride=stride, padding=padding)
    assert ours(conv_out, size, kernel, stride, padding) == want


@FAST
@given(SIZES, KERNELS, STRIDES, st.data(), st.booleans())
def test_pool_out(size: int, kernel: int, stride: int, data: st.DataObject, ceil: bool) -> None:
    # torch allows half a window of padding at most
    padding = data.draw(st.integers(0, kernel // 2))
    for pool in (F.max_pool2d, F.avg_pool2d):
        want = torch_size(pool, size, kernel, stride, padding, ceil_mode=ceil)
        assert ours(pool_out, size, kernel, stride, padding, ceil) == want


def ours(function, *window: int) -> int | None:
    try:
        return function(*window)
    except ValueError:
        return None


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_align_up_is_the_nearest_multiple(n: int, multiple: int) -> None:
    aligned = align_up(n, multiple)
    assert aligned % multiple == 0
    assert n <= aligned < n + multiple


@FAST
@given(st.integers(1, 10**7), st.integers(1, 300), st.sampled_from([16, 32, 64]))
def test_programs_share_pixels_evenly(n_pixels: int, tiles: int, block: int) -> None:
    """As many programs as planned for the next power of two, but for what whole blocks save."""
    planned = tiles * block
    share = even_share(n_pixels, planned, block)
    programs = -(-power_of_two(n_pixels) // planned)
    assert share % block == 0
    assert share <= planned
    assert -(-n_pixels // share) <= programs
    assert share - block < n_pixels / programs

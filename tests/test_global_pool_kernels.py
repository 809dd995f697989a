"""Global average pooling through its launchers, in the interpreter or on a GPU, against fp64."""

import pytest
import torch
from torch import Tensor

from fused_inception.launches import record_launches
from fused_inception.ops import global_pool_triton
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "googlenet": (2, 1024, 7, 7),
    "one-pixel": (3, 24, 1, 1),
    "odd": (1, 13, 5, 9),
    "more-pixels-than-a-tile": (1, 16, 13, 11),
    "empty-batch": (0, 16, 3, 3),
}


def data(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=draw).to(device, dtype, memory_format=torch.channels_last)
    return x, torch.randn(*shape[:2], 1, 1, generator=draw).to(device, dtype)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradient(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x, dy = data(SHAPES[name], dtype, device)
    n, c, h, w = x.shape
    with record_launches() as launches:
        y = global_pool_triton.forward(x, None, 1.0)
        dx = global_pool_triton.backward(dy, None, 1.0, (n, c, h, w))
    assert len(launches) == (2 if n else 0)
    assert_within("y", y, x.double().mean((2, 3), keepdim=True), x.mean((2, 3), keepdim=True))
    want = (dy.double() / (h * w)).expand(x.shape)
    assert_within("dx", dx, want, (dy / (h * w)).expand(x.shape), slack=3.0)
    assert dx.stride() == (h * w * c, 1, w * c, c)


def test_any_strides(device: torch.device) -> None:
    x, dy = data((2, 24, 5, 6), torch.float32, device)
    want = global_pool_triton.forward(x, None, 1.0)
    wide = torch.full((2, 40, 5, 6), torch.nan, device=device)
    wide[:, 3:27] = x
    for other in (x.contiguous(), wide[:, 3:27], x.transpose(2, 3)):
        torch.testing.assert_close(global_pool_triton.forward(other, None, 1.0), want)
    expanded = dy[:1, :1].expand(dy.shape)
    dx = global_pool_triton.backward(expanded, None, 1.0, tuple(x.shape))
    torch.testing.assert_close(dx, (expanded / 30).expand(x.shape))


def test_nan_stays_in_its_channel(device: torch.device) -> None:
    x, _ = data((2, 24, 3, 3), torch.float32, device)
    x[1, 5, 2, 0] = torch.nan
    y = global_pool_triton.forward(x, None, 1.0)
    assert y.isnan().nonzero().tolist() == [[1, 5, 0, 0]]

"""The repaired interpreter computes in bfloat16 as torch does."""

import pytest
import torch

from tests.conftest import HAS_TRITON, INTERPRETED

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("kernels do not run in the interpreter here", allow_module_level=True)

import triton
import triton.language as tl

N = 64
BF16 = torch.bfloat16


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    offs = tl.arange(0, N)
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    if OP == "add":
        result = a + b
    elif OP == "subtract":
        result = a - b
    elif OP == "multiply":
        result = a * b
    elif OP == "maximum":
        result = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "negate":
        result = -a
    elif OP == "greater":
        result = (a > b).to(tl.bfloat16)
    elif OP == "where":
        result = tl.where(a > 0, a, b)
    elif OP == "full":
        result = a + tl.full((N,), 1.5, tl.bfloat16)
    tl.store(out_ptr + offs, result)


EXPECTED = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": torch.maximum,
    "negate": lambda a, b: -a,
    "greater": lambda a, b: (a > b).to(BF16),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "full": lambda a, b: a + 1.5,
}


@pytest.mark.parametrize("op", EXPECTED)
def test_elementwise_equals_torch(op: str) -> None:
    a, b = torch.randn(2, N).to(BF16)
    b[:4] = a[:4]
    b[5] = float("nan")
    out = torch.empty_like(a)
    _arithmetic_kernel[(1,)](a, b, out, op, N)
    torch.testing.assert_close(out, EXPECTED[op](a, b), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs).to(out_ptr.dtype.element_ty))


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    3.4e38,
    -3.4e38,
    1e-40,
    65504.0,
]
# halfway between neighbours, with an even and an odd lower one, and just beside the middle
TIES = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, -(1 + 3 * 2**-8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_casts_to_bf16_equal_torch(dtype: torch.dtype) -> None:
    numbers = torch.tensor(SPECIAL + TIES)
    x = torch.cat([numbers, torch.randn(N - len(numbers)) * 1e3]).to(dtype)
    out = torch.empty(N, dtype=BF16)
    _cast_kernel[(1,)](x, out, N)
    torch.testing.assert_close(out, x.to(BF16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_from_bf16_equal_torch(dtype: torch.dtype) -> None:
    x = (torch.randn(N) * 1e3).to(BF16)
    out = torch.empty(N, dtype=dtype)
    _cast_kernel[(1,)](x, out, N)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    rows = tl.arange(0, N)[:, None]
    columns = tl.arange(0, N)[None, :]
    a_tile = tl.load(a_ptr + rows * N + columns)
    b_tile = tl.load(b_ptr + rows * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.dot(a_tile, b_tile, input_precision="ieee"))


def test_dot_multiplies_the_numbers() -> None:
    a, b = torch.randn(2, N, N).to(BF16)
    out = torch.empty(N, N)
    _dot_kernel[(1,)](a, b, out, N)
    torch.testing.assert_close(out, (a.double() @ b.double()).float())

"""The interpreter that is made faster: types as before, overflow seen."""

import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.conftest import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="this is about Triton's interpreter"
)

LEAST, MOST = -(2**31), 2**31 - 1

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def add(ys, a, b):
        lanes = tl.arange(0, 4)
        tl.store(ys + lanes, (lanes * 0 + a) + b)

    @triton.jit
    def sub(ys, a, b):
        lanes = tl.arange(0, 4)
        tl.store(ys + lanes, (lanes * 0 + a) - b)

    @triton.jit
    def mul(ys, a, b):
        lanes = tl.arange(0, 4)
        tl.store(ys + lanes, (lanes * 0 + a) * b)

    KERNELS = {operator.add: add, operator.sub: sub, operator.mul: mul}


@pytest.mark.parametrize(
    ("of", "a", "b"),
    [
        (operator.add, MOST, 1),
        (operator.add, LEAST, -1),
        (operator.sub, LEAST, 1),
        (operator.sub, 0, LEAST),
        (operator.mul, 2**16, 2**15),
        (operator.mul, LEAST, -1),
    ],
)
def test_overflow_is_an_error(of: Callable[[int, int], int], a: int, b: int) -> None:
    ys = torch.zeros(4, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=r"OverflowError.*int32: "):
        KERNELS[of][(1,)](ys, a, b)


@pytest.mark.parametrize(
    ("of", "a", "b"),
    [
        (operator.add, MOST - 1, 1),
        (operator.sub, LEAST + 1, 1),
        (operator.mul, 2**15, 2**15),
        (operator.mul, -(2**16), 2**15),
    ],
)
def test_what_fits_is_computed(of: Callable[[int, int], int], a: int, b: int) -> None:
    ys = torch.zeros(4, dtype=torch.int32)
    KERNELS[of][(1,)](ys, a, b)
    assert ys.tolist() == [of(a, b)] * 4


def test_offsets_of_64_bits_do_not_overflow() -> None:
    ys = torch.zeros(4, dtype=torch.int64)
    mul[(1,)](ys, 2**40, 3)
    assert ys.tolist() == [3 * 2**40] * 4


def test_types_are_those_of_the_interpreter() -> None:
    from tests import interpreter_speed

    scalars = [
        *(tl.int1, tl.int8, tl.uint8, tl.int16, tl.uint16, tl.int32, tl.uint32, tl.int64),
        *(tl.uint64, tl.float16, tl.bfloat16, tl.float32, tl.float64),
    ]
    found = {}
    for scalar in scalars:
        for dtype in (scalar, tl.pointer_type(scalar)):
            for form in (dtype, tl.block_type(dtype, [16])):
                found[str(form)] = interpreter_speed.numpy_dtype(form)
                assert found[str(form)] == interpreter_speed._dtype_of(form)
    assert len(found) == 4 * len(scalars)
    assert set(found.values()) > {np.dtype(np.uint64), np.dtype(bool), np.dtype(np.float16)}

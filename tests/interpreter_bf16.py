"""bfloat16 in Triton's interpreter, which runs kernels on NumPy.

NumPy has no bfloat16: the interpreter keeps such a tensor as its bit patterns, uint16, and up to
version 3.7.1 multiplies, adds and compares the patterns as if they were the numbers, and truncates
where it casts. Here each such operation goes through fp32 and rounds to nearest even, as a GPU does
operation by operation. The library itself never changes Triton; this is for tests without a GPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

QUIET_NAN = np.uint16(0x7FC0)


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The numbers, as fp32, whose bfloat16 patterns are `bits`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(numbers: np.ndarray) -> np.ndarray:
    """bfloat16 patterns of `numbers`, rounded to nearest even."""
    numbers = np.asarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    # half of the last kept place, less one where that place is even: ties go to even
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), QUIET_NAN, rounded.astype(np.uint16))


def install() -> None:
    """Repair the interpreter of this process."""
    interpreter.interpreter_builder.__class__ = Bfloat16Builder


class Bfloat16Builder(InterpreterBuilder):
    """The interpreter's operations; those that meet bfloat16 compute in fp32."""

    def get_bf16(self, value: float) -> TensorHandle:
        """A constant; the interpreter has none of this type."""
        return _rounded(np.array([value]))

    def create_dot(
        self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any
    ) -> TensorHandle:
        """Products of bfloat16 numbers are exact in fp32."""
        return super().create_dot(_lifted(a), _lifted(b), d, *options)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        """Every cast from or to bfloat16 passes through fp32."""
        if _is_bf16(dst_type):
            return src if _is_bf16(src.dtype) else _rounded(src.data)
        src = _lifted(src)
        return src if src.dtype == dst_type.scalar else super().cast_impl(src, dst_type)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x * y + z, rounded once."""
        if not _is_bf16(z.dtype):
            return super().create_fma(x, y, z)
        return _rounded(_lifted(x).data * _lifted(y).data + _lifted(z).data)

    def binary_op(
        self, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., np.ndarray]
    ) -> TensorHandle:
        """Arithmetic and comparisons."""
        if not _is_bf16(lhs.dtype):
            return super().binary_op(lhs, rhs, op)
        result = op(_lifted(lhs).data, _lifted(rhs).data)
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return _rounded(result)

    def ternary_op(
        self,
        lhs: TensorHandle,
        rhs: TensorHandle,
        other: TensorHandle,
        op: Callable[..., np.ndarray],
    ) -> TensorHandle:
        """Clamping computes; selection moves bit patterns and is right as it is."""
        if not _is_bf16(lhs.dtype):
            return super().ternary_op(lhs, rhs, other, op)
        return _rounded(op(_lifted(lhs).data, _lifted(rhs).data, _lifted(other).data))

    def unary_op(self, arg: TensorHandle, op: Callable[..., np.ndarray]) -> TensorHandle:
        """Elementary functions."""
        if not _is_bf16(arg.dtype):
            return super().unary_op(arg, op)
        return _rounded(op(_lifted(arg).data))


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _lifted(handle: TensorHandle) -> TensorHandle:
    if not _is_bf16(handle.dtype):
        return handle
    return TensorHandle(to_float32(handle.data), tl.float32)


def _rounded(numbers: np.ndarray) -> TensorHandle:
    return TensorHandle(to_bits(numbers), tl.bfloat16)

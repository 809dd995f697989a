"""Triton's interpreter spends half of its time on what it drops or finds again.

It computes whether additions, subtractions and products of integers overflow, operation by
operation of its own, and tells nobody. It builds a table of NumPy's types at every operation, and
looks for what is to be replaced in `triton.language` at every call of a function inside a kernel.
Here overflow is an error, asked of NumPy, and the others are kept. What kernels compute stays as it
is.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
_dtype_of = interpreter._get_np_dtype
_dtypes: dict[str, np.dtype] = {}


def install() -> None:
    """Change the interpreter of this process, before anything has run in it."""
    for pkg in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtin_names(pkg)
    interpreter._patch_builtin = _patch_builtin
    interpreter._get_np_dtype = numpy_dtype
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


def numpy_dtype(dtype: tl.dtype) -> np.dtype:
    """NumPy's type for the elements of one of Triton's, as the interpreter has it."""
    name = dtype.element_ty.name if isinstance(dtype, tl.block_type) else dtype.name
    found = _dtypes.get(name)
    if found is None:
        found = _dtypes[name] = _dtype_of(dtype)
    return found


def _refuse_overflow(
    self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor, binary_op: Callable[..., Any]
) -> None:
    """`lhs` and `rhs` are of one type of integers and as large."""
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    a, b = (t.handle.data.astype(np.int64) for t in (lhs, rhs))
    exact = _EXACT[binary_op.__name__](a, b)
    if exact.min() < integer.get_int_min_value() or exact.max() > integer.get_int_max_value():
        raise OverflowError(f"{integer}: {binary_op.__name__} of {lhs} and {rhs}")


@functools.cache
def _builtin_names(pkg: Any) -> tuple[str, ...]:
    """What in a module or class of `triton.language` is built in, asked before it is replaced."""
    return tuple(name for name, member in inspect.getmembers(pkg) if tl.core.is_builtin(member))


def _patch_builtin(pkg: Any, *arguments: Any) -> None:
    """The interpreter's function; what is replaced already is not built in."""
    for name in _builtin_names(pkg):
        member = getattr(pkg, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(pkg, name, member, *arguments)

"""Tensors and numbers by themselves: kinds, shapes, dtypes, devices."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def image_batch(x: Tensor) -> None:
    """`x` is [N, C, H, W] with at least one channel and one pixel, in a dtype that is computed in.

    Raises:
        ValueError, TypeError: of the shape, of the dtype.
    """
    tensor("x", x)
    if x.layout != torch.strided:
        raise ValueError(f"x must be a dense tensor, got the layout {x.layout}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must have 4 dimensions [N, C, H, W], got {len(shape)}")
    _, c, h, w = shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"x must have channels, height and width of at least 1, got {[*shape]}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be {names_of(DTYPES)}, got {names_of([x.dtype])}")


def tensor(name: str, value: object) -> None:
    """`value` is a tensor.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        hint = ": unfuse_ the model before torch.fx traces it" if kind == "Proxy" else ""
        raise TypeError(f"{name} must be a torch.Tensor, got {kind}{hint}")


def integer(name: str, value: Any) -> Any:
    """`value` as one of Python's integers, which those of NumPy become.

    Raises:
        TypeError: it is none.
    """
    try:
        return value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def filter_placed(x: Tensor, name: str, weight: Tensor, casts: bool) -> None:
    """A filter is on the device of `x`, in a dtype that it can be combined with."""
    placed(x, name, weight, DTYPES[:3] if casts else (x.dtype,))


def vector_placed(x: Tensor, name: str, vector: Tensor, casts: bool) -> None:
    """So is a bias."""
    placed(x, name, vector, beside(x, casts))


def beside(x: Tensor, casts: bool) -> Sequence[torch.dtype]:
    """Dtypes of biases and statistics, which may be fp32 beside 16 bits."""
    if casts:
        return DTYPES[:3]
    return (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)


def placed(x: Tensor, name: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if t.dtype not in allowed:
        raise TypeError(
            f"{name} must be {names_of(allowed)}, got {names_of([t.dtype])}; "
            f"x is {names_of([x.dtype])}"
        )


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    # each once, in order
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))

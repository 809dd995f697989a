"""Tensors inside of arguments and results."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Those in tensors, lists, tuples and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)

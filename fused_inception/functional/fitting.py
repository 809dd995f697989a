"""Arguments of one description are checked once."""

import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.geometry import Window

# descriptions of arguments that fit, and how many are kept
_fitting: set[tuple[Hashable, ...]] = set()
_MOST = 1024


def once(
    check: Callable[..., None],
    tensors: Sequence[Tensor | None],
    options: Hashable,
    *arguments: object,
    casts: bool,
) -> None:
    """`check(*arguments, casts=casts)`, unless that has passed for tensors like these and equal
    options.

    `check` may read no more of `arguments` than shapes, dtypes and devices of `tensors`, and
    `options`. A network has a hundred parameters: to describe them takes a third of the time.
    """
    if torch.compiler.is_compiling():
        check(*arguments, casts=casts)
        return
    try:
        description = (
            *(check, options, casts),
            tuple([None if t is None else t.shape for t in tensors]),
            tuple([None if t is None else t.dtype for t in tensors]),
            tuple([None if t is None else t.device for t in tensors]),
        )
        if description in _fitting:
            return
    except (TypeError, AttributeError):  # sizes of a tracer are no numbers; what is no tensor
        check(*arguments, casts=casts)
        return
    check(*arguments, casts=casts)
    if len(_fitting) >= _MOST:
        _fitting.clear()
    _fitting.add(description)


_known_window = functools.lru_cache(_MOST, typed=True)(checks.pool_window)


def pool_window(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Window:
    """`checks.pool_window` of the map `x`."""
    _, _, height, width = x.shape
    arguments = height, width, kernel_size, stride, padding, dilation, ceil_mode
    if not torch.compiler.is_compiling():
        try:
            return _known_window(*arguments)
        except TypeError:  # lists, and sizes of a tracer, cannot be kept
            pass
    return checks.pool_window(*arguments)

"""Options: windows, sizes, probabilities."""

from collections.abc import Sequence

from fused_inception.checks.tensors import integer
from fused_inception.geometry import Window


def count(name: str, value: int, *, least: int = 1) -> int:
    """`value` as an integer: so many of something.

    Raises:
        ValueError, TypeError: there are fewer than `least`; no integer.
    """
    value = integer(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def probability(p: float) -> None:
    """`p` is a probability.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")


def pool_window(
    height: int,
    width: int,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Window:
    """The square window that these options of a pool mean, if it fits the map; no stride means one
    window beside the other.

    Raises:
        ValueError: of options that differ between height and width, are out of range or don't fit.
        TypeError: of options that are no integers.
    """
    if _side("dilation", dilation, 1) != 1:
        raise ValueError(f"dilation must be 1, got {dilation}")
    found = window_of(kernel_size, stride, padding, ceil_mode)
    found.of_map(height, width)
    return found


def window_of(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    ceil_mode: bool,
) -> Window:
    kernel = _side("kernel_size", kernel_size, 1)
    step = kernel if stride is None else _side("stride", stride, 1)
    border = _side("padding", padding, 0)
    if border > kernel // 2:
        raise ValueError(
            f"padding must be at most half of kernel_size, {kernel // 2}, got {border}"
        )
    return Window(kernel, step, border, ceil_mode)


def _side(name: str, value: int | Sequence[int], least: int) -> int:
    """One number for height and width."""
    given = value if isinstance(value, list | tuple) else (value, value)
    sides = [integer(name, side) for side in given]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{name} must be one number for height and width, got {value}")
    if sides[0] < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return sides[0]

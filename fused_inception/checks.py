"""The checks of arguments and their messages: what was expected, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def image_batch(x: Tensor) -> None:
    """`x` is [N, C, H, W] with at least one channel and one pixel, in a dtype that is computed in.

    Raises:
        ValueError, TypeError: of the shape, of the dtype.
    """
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [N, C, H, W], got {x.dim()}")
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(
            f"x must have channels, height and width of at least 1, got {list(x.shape)}"
        )
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be {_names(DTYPES)}, got {_names([x.dtype])}")


def inception_parameters(x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Six filters and biases fit each other and `x`.

    Raises:
        ValueError, TypeError: of shapes or devices, of dtypes.
    """
    w1, w3r, w3, w5r, w5, wp = filters
    c = x.shape[1]
    for name, weight, c_in, sides in (
        ("w1", w1, c, (1,)),
        ("w3r", w3r, c, (1,)),
        ("w3", w3, w3r.shape[0], (3,)),
        ("w5r", w5r, c, (1,)),
        ("w5", w5, w5r.shape[0], (3, 5)),
        ("wp", wp, c, (1,)),
    ):
        _filter(name, weight, c_in, sides)
    for name, weight, bias in zip(_NAMES, filters, biases, strict=True):
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"b{name} must be of shape [{weight.shape[0]}], one bias for each filter, "
                f"got {list(bias.shape)}"
            )
    _devices_and_dtypes(x, filters, biases)


_NAMES = ("1", "3r", "3", "5r", "5", "p")


def _filter(name: str, weight: Tensor, c_in: int, sides: tuple[int, ...]) -> None:
    expected = " or ".join(f"[C_out, {c_in}, {side}, {side}]" for side in sides)
    if (
        weight.dim() != 4
        or weight.shape[0] < 1
        or weight.shape[1] != c_in
        or weight.shape[2] not in sides
        or weight.shape[3] != weight.shape[2]
    ):
        raise ValueError(f"{name} must be of shape {expected}, got {list(weight.shape)}")


def _devices_and_dtypes(x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    # autocast casts the input and the filters
    casts = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    for letter, tensors in (("w", filters), ("b", biases)):
        for name, t in zip(_NAMES, tensors, strict=True):
            if t.device != x.device:
                raise ValueError(
                    f"{letter}{name} must be on the device of x, {x.device}, got {t.device}"
                )
            allowed = _allowed(x.dtype, bias=letter == "b", casts=casts)
            if t.dtype not in allowed:
                raise TypeError(
                    f"{letter}{name} must be {_names(allowed)}, got {_names([t.dtype])}"
                )


def _allowed(dtype: torch.dtype, *, bias: bool, casts: bool) -> tuple[torch.dtype, ...]:
    if casts:
        return DTYPES[:3]
    if bias and dtype in (torch.float16, torch.bfloat16):
        return dtype, torch.float32
    return (dtype,)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

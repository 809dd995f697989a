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


def inception_parameters(
    x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor], *, casts: bool
) -> None:
    """Six filters and biases fit each other and `x`; `casts`: autocast casts input and filters.

    Raises:
        ValueError, TypeError: of shapes or devices, of dtypes.
    """
    c, reduced3, reduced5 = x.shape[1], filters[1].shape[0], filters[3].shape[0]
    for name, weight, c_in, sides in zip(
        _NAMES,
        filters,
        (c, c, reduced3, c, reduced5, c),
        ((1,), (1,), (3,), (1,), (3, 5), (1,)),
        strict=True,
    ):
        shape = weight.shape
        if (
            len(shape) != 4
            or shape[0] < 1
            or shape[1] != c_in
            or shape[2] not in sides
            or shape[3] != shape[2]
        ):
            expected = " or ".join(f"[C_out, {c_in}, {side}, {side}]" for side in sides)
            raise ValueError(f"w{name} must be of shape {expected}, got {list(shape)}")
    for name, weight, bias in zip(_NAMES, filters, biases, strict=True):
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"b{name} must be of shape [{weight.shape[0]}], one bias for each filter, "
                f"got {list(bias.shape)}"
            )
    allowed_w: tuple[torch.dtype, ...]
    allowed_b: tuple[torch.dtype, ...]
    if casts:
        allowed_w = allowed_b = DTYPES[:3]
    else:
        allowed_w = (x.dtype,)
        allowed_b = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    _placed("w", filters, x.device, allowed_w)
    _placed("b", biases, x.device, allowed_b)


_NAMES = ("1", "3r", "3", "5r", "5", "p")


def _placed(
    letter: str,
    tensors: Sequence[Tensor],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> None:
    for name, t in zip(_NAMES, tensors, strict=True):
        if t.device != device:
            raise ValueError(f"{letter}{name} must be on the device of x, {device}, got {t.device}")
        if t.dtype not in dtypes:
            raise TypeError(f"{letter}{name} must be {_names(dtypes)}, got {_names([t.dtype])}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    # each once, in order
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))

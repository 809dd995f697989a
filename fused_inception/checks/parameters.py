"""Filters and biases: whether they fit the input, and each other."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from fused_inception.checks.options import count, window_of
from fused_inception.checks.tensors import filter_placed, tensor, vector_placed
from fused_inception.geometry import Window, conv_out

_NAMES = ("1", "3r", "3", "5r", "5", "p")


def inception_parameters(
    x: Tensor,
    filters: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    casts: bool,
    c_in: int | None = None,
) -> None:
    """Six filters and biases fit each other and `x`, or a map of `c_in` channels like `x`; `casts`:
    autocast casts input and filters.

    Raises:
        ValueError, TypeError: of shapes or devices, of dtypes.
    """
    inception_filters(x, filters, casts=casts, c_in=c_in)
    _biases(x, _NAMES, filters, biases, casts)


def inception_filters(
    x: Tensor, filters: Sequence[Tensor], *, casts: bool, c_in: int | None = None
) -> None:
    """Six filters fit each other and `x`; errors as above."""
    if len(filters) != len(_NAMES):
        raise ValueError(f"filters must be {len(_NAMES)}, got {len(filters)}")
    c = x.shape[1] if c_in is None else c_in
    for i in (1, 3):  # whose shapes say what the others are to be
        tensor(f"w{_NAMES[i]}", filters[i])
    reduced3, reduced5 = filters[1].shape[0], filters[3].shape[0]
    channels = (c, c, reduced3, c, reduced5, c)
    sides = ((1,), (1,), (3,), (1,), (3, 5), (1,))
    _filters(x, _NAMES, channels, sides, filters, casts)


def trunk_parameters(
    x: Tensor,
    parameters: Sequence[Sequence[Tensor]],
    pools: Mapping[int, Window],
    taps: Sequence[int],
    *,
    casts: bool,
) -> None:
    """Twelve parameters of each module fit what the module before makes of `x`, and so do the pools
    between them; `casts` and errors as above."""
    if not parameters:
        raise ValueError("parameters must be those of at least one module, got none")
    modules = range(len(parameters))
    for name, numbers in (("pools", pools), ("taps", taps)):
        if any(number not in modules for number in numbers):
            raise ValueError(
                f"{name} must name modules from 0 to {len(parameters) - 1}, got {list(numbers)}"
            )
    if list(taps) != sorted(set(taps)):
        raise ValueError(f"taps must be in ascending order, each once, got {list(taps)}")
    c_in, sides = x.shape[1], (x.shape[2], x.shape[3])
    for number, module in enumerate(parameters):
        if len(module) != 2 * len(_NAMES):
            raise ValueError(
                f"parameters must be {2 * len(_NAMES)} for each module, filters and biases in "
                f"turn, got {len(module)} for module {number}"
            )
        try:
            inception_parameters(x, module[::2], module[1::2], casts=casts, c_in=c_in)
            if number in pools:
                pool = pools[number]
                window = window_of(pool.kernel, pool.stride, pool.padding, pool.ceil_mode)
                sides = window.of_map(*sides)
        except (ValueError, TypeError) as error:
            raise type(error)(f"module {number}: {error}") from None
        c_in = sum(module[i].shape[0] for i in (0, 4, 8, 10))


def naive_parameters(
    x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor], *, casts: bool
) -> None:
    """Three filters and biases fit `x`; `casts` and errors as above."""
    c = x.shape[1]
    _filters(x, "135", (c, c, c), ((1,), (3,), (5,)), filters, casts)
    _biases(x, "135", filters, biases, casts)


def _filters(
    x: Tensor,
    names: Sequence[str],
    channels: Sequence[int],
    all_sides: Sequence[tuple[int, ...]],
    filters: Sequence[Tensor],
    casts: bool,
) -> None:
    for name, c_in, sides, weight in zip(names, channels, all_sides, filters, strict=True):
        tensor(f"w{name}", weight)
        shape = weight.shape
        if (
            len(shape) != 4
            or shape[0] < 1
            or shape[1] != c_in
            or shape[2] not in sides
            or shape[3] != shape[2]
        ):
            expected = " or ".join(f"[C_out, {c_in}, {side}, {side}]" for side in sides)
            reads_x = f"; x has {c_in} channels" if c_in == x.shape[1] else ""
            raise ValueError(f"w{name} must be of shape {expected}, got {list(shape)}{reads_x}")
        filter_placed(x, f"w{name}", weight, casts)


def _biases(
    x: Tensor,
    names: Sequence[str],
    filters: Sequence[Tensor],
    biases: Sequence[Tensor],
    casts: bool,
) -> None:
    for name, weight, bias in zip(names, filters, biases, strict=True):
        tensor(f"b{name}", bias)
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"b{name} must be of shape [{weight.shape[0]}], one bias for each filter, "
                f"got {list(bias.shape)}"
            )
        vector_placed(x, f"b{name}", bias, casts)


def conv_parameters(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, *, casts: bool
) -> None:
    """One square filter and its bias fit `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes, options or devices, of dtypes.
    """
    conv_filter(x, weight, stride, padding, casts=casts)
    tensor("bias", bias)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must be of shape [{weight.shape[0]}], got {list(bias.shape)}")
    vector_placed(x, "bias", bias, casts)


def conv_filter(x: Tensor, weight: Tensor, stride: int, padding: int, *, casts: bool) -> None:
    """One square filter fits `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes, options or devices, of dtypes.
    """
    tensor("weight", weight)
    shape, c_in = weight.shape, x.shape[1]
    if len(shape) != 4 or shape[0] < 1 or shape[1] != c_in or shape[2] < 1 or shape[3] != shape[2]:
        takes = f", this filter takes {shape[1]}" if len(shape) == 4 and shape[1] != c_in else ""
        raise ValueError(
            f"weight must be of shape [C_out, {c_in}, K, K], got {list(shape)}; "
            f"x has {c_in} channels{takes}"
        )
    count("stride", stride)
    count("padding", padding, least=0)
    for side in x.shape[2:]:
        conv_out(side, shape[2], stride, padding)
    filter_placed(x, "weight", weight, casts)


def stem_parameters(
    x: Tensor,
    filters: Sequence[Tensor],
    biases: Sequence[Tensor],
    stride: int,
    padding: int,
    pools: Sequence[Window],
    *,
    casts: bool,
) -> None:
    """Three filters (any, 1x1, 3x3) and biases fit each other and images `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes, options or devices, of dtypes.
    """
    count("stride", stride)
    count("padding", padding, least=0)
    c_in = x.shape[1]
    for name, weight, bias, kernel in zip("123", filters, biases, (None, 1, 3), strict=True):
        tensor(f"w{name}", weight)
        tensor(f"b{name}", bias)
        shape = weight.shape
        side = kernel or shape[-1]
        fits = len(shape) == 4 and shape[1:] == (c_in, side, side) and min(shape) > 0
        if not fits:
            side_name = kernel or "K"
            expected = f"[C_out, {c_in}, {side_name}, {side_name}]"
            reads_x = f"; x has {c_in} channels" if name == "1" else ""
            raise ValueError(f"w{name} must be of shape {expected}, got {list(shape)}{reads_x}")
        if bias.dim() != 1 or bias.shape[0] != shape[0]:
            raise ValueError(f"b{name} must be of shape [{shape[0]}], got {list(bias.shape)}")
        filter_placed(x, f"w{name}", weight, casts)
        vector_placed(x, f"b{name}", bias, casts)
        c_in = shape[0]
    windows = [window_of(p.kernel, p.stride, p.padding, p.ceil_mode) for p in pools]
    for side in x.shape[2:]:
        side = conv_out(side, filters[0].shape[2], stride, padding)
        for window in windows:
            side = window.out(side)


def pointwise_parameters(x: Tensor, weight: Tensor, bias: Tensor, *, casts: bool) -> None:
    """One 1x1 filter and its bias fit the channels of `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes or devices, of dtypes.
    """
    tensor("weight", weight)
    shape = weight.shape
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"weight must be of shape [C_out, {x.shape[1]}, 1, 1], got {list(shape)}; "
            f"x has {x.shape[1]} channels"
        )
    conv_parameters(x, weight, bias, 1, 0, casts=casts)

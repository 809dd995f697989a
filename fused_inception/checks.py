"""The checks of arguments and their messages: what was expected, what came."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fused_inception.geometry import Window, conv_out

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def image_batch(x: Tensor) -> None:
    """`x` is [N, C, H, W] with at least one channel and one pixel, in a dtype that is computed in.

    Raises:
        ValueError, TypeError: of the shape, of the dtype.
    """
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        hint = ": unfuse_ the model before torch.fx traces it" if kind == "Proxy" else ""
        raise TypeError(f"x must be a torch.Tensor, got {kind}{hint}")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(f"x must have 4 dimensions [N, C, H, W], got {len(shape)}")
    _, c, h, w = shape
    if c < 1 or h < 1 or w < 1:
        raise ValueError(f"x must have channels, height and width of at least 1, got {[*shape]}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be {_names(DTYPES)}, got {_names([x.dtype])}")


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
                window = _window(pool.kernel, pool.stride, pool.padding, pool.ceil_mode)
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


_NAMES = ("1", "3r", "3", "5r", "5", "p")


def _filters(
    x: Tensor,
    names: Sequence[str],
    channels: Sequence[int],
    all_sides: Sequence[tuple[int, ...]],
    filters: Sequence[Tensor],
    casts: bool,
) -> None:
    for name, c_in, sides, weight in zip(names, channels, all_sides, filters, strict=True):
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
        _filter_placed(x, f"w{name}", weight, casts)


def _biases(
    x: Tensor,
    names: Sequence[str],
    filters: Sequence[Tensor],
    biases: Sequence[Tensor],
    casts: bool,
) -> None:
    for name, weight, bias in zip(names, filters, biases, strict=True):
        if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"b{name} must be of shape [{weight.shape[0]}], one bias for each filter, "
                f"got {list(bias.shape)}"
            )
        _vector_placed(x, f"b{name}", bias, casts)


def conv_parameters(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, *, casts: bool
) -> None:
    """One square filter and its bias fit `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes, options or devices, of dtypes.
    """
    conv_filter(x, weight, stride, padding, casts=casts)
    if bias.dim() != 1 or bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias must be of shape [{weight.shape[0]}], got {list(bias.shape)}")
    _vector_placed(x, "bias", bias, casts)


def conv_filter(x: Tensor, weight: Tensor, stride: int, padding: int, *, casts: bool) -> None:
    """One square filter fits `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes, options or devices, of dtypes.
    """
    shape, c_in = weight.shape, x.shape[1]
    if len(shape) != 4 or shape[0] < 1 or shape[1] != c_in or shape[2] < 1 or shape[3] != shape[2]:
        takes = f", this filter takes {shape[1]}" if len(shape) == 4 and shape[1] != c_in else ""
        raise ValueError(
            f"weight must be of shape [C_out, {c_in}, K, K], got {list(shape)}; "
            f"x has {c_in} channels{takes}"
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    for side in x.shape[2:]:
        conv_out(side, shape[2], stride, padding)
    _filter_placed(x, "weight", weight, casts)


def norm_vectors(
    x: Tensor, name: str, vectors: Sequence[Tensor | None], widths: Sequence[int], *, casts: bool
) -> list[Tensor]:
    """The tensors [C] of one kind, one for each of `widths`; none where all are None.

    Raises:
        ValueError, TypeError: some are None and some are not; of shapes or devices, of dtypes.
    """
    present = [t for t in vectors if t is not None]
    if not present:
        return present
    if len(present) != len(widths):
        raise ValueError(f"{name} must be {len(widths)} tensors or all None, got {len(present)}")
    allowed = _beside(x, casts)
    for t, width in zip(present, widths, strict=True):
        if t.shape != (width,):
            raise ValueError(f"{name} must be of shape [{width}], got {list(t.shape)}")
        _placed(x, name, t, allowed)
    return present


def written_to(name: str, vectors: Sequence[Tensor]) -> None:
    """Training can write to these: kernels know no strides.

    Raises:
        ValueError: one is not contiguous.
    """
    for t in vectors:
        if not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as training writes to them, got stride {t.stride(0)}"
            )


def one_dtype(means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """Mean and variance of a layer can be written in one launch.

    Raises:
        TypeError: they differ in dtype.
    """
    for mean, var in zip(means, variances, strict=True):
        if mean.dtype != var.dtype:
            got = f"{_names([mean.dtype])} and {_names([var.dtype])}"
            raise TypeError(f"running_means and running_vars must be of one dtype, got {got}")


def norm_pair(first: str, a: Sequence[Tensor], second: str, b: Sequence[Tensor]) -> None:
    """Both kinds are there, or neither.

    Raises:
        ValueError: one alone is.
    """
    # lengths: torch.compile of torch 2.11 traces no bool() of a list
    if (len(a) > 0) != (len(b) > 0):
        missing, given = (first, second) if len(b) > 0 else (second, first)
        raise ValueError(f"{given} must come with {missing}, which is None")


def batch_counters(
    counters: Sequence[Tensor | None], momentum: float | None, running: Sequence[Tensor]
) -> None:
    """One counter of batches for each running mean, or none where no average is cumulative.

    Raises:
        ValueError: they are missing where a cumulative average needs them, or too few.
        TypeError: one is not int64.
    """
    present = [t for t in counters if t is not None]
    if not running:
        return
    if not present and momentum is None:
        raise ValueError("momentum=None averages over all batches and needs batches_tracked")
    if present and len(present) != len(running):
        raise ValueError(
            f"batches_tracked must be {len(running)} tensors or all None, got {len(present)}"
        )
    for t, mean in zip(present, running, strict=False):
        if t.dtype != torch.int64:
            raise TypeError(f"batches_tracked must be int64, got {_names([t.dtype])}")
        if t.device != mean.device:
            raise ValueError(f"batches_tracked must be on {mean.device}, got {t.device}")


def batch_statistics(n: int, c: int, h: int, w: int, eps: float) -> None:
    """[N, C, H, W] has more than one value a channel, and `eps` is positive, as PyTorch asks.

    Raises:
        ValueError: it has one, PyTorch's words; eps is not.
    """
    if n * h * w == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size([n, c, h, w])}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive in training, got {eps}")


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
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    c_in = x.shape[1]
    for name, weight, bias, kernel in zip("123", filters, biases, (None, 1, 3), strict=True):
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
        _filter_placed(x, f"w{name}", weight, casts)
        _vector_placed(x, f"b{name}", bias, casts)
        c_in = shape[0]
    windows = [_window(p.kernel, p.stride, p.padding, p.ceil_mode) for p in pools]
    for side in x.shape[2:]:
        side = conv_out(side, filters[0].shape[2], stride, padding)
        for window in windows:
            side = window.out(side)


def pointwise_parameters(x: Tensor, weight: Tensor, bias: Tensor, *, casts: bool) -> None:
    """One 1x1 filter and its bias fit the channels of `x`; `casts` as above.

    Raises:
        ValueError, TypeError: of shapes or devices, of dtypes.
    """
    shape = weight.shape
    if len(shape) != 4 or shape[0] < 1 or shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"weight must be of shape [C_out, {x.shape[1]}, 1, 1], got {list(shape)}; "
            f"x has {x.shape[1]} channels"
        )
    conv_parameters(x, weight, bias, 1, 0, casts=casts)


def output_size(size: int) -> None:
    """`size` windows along a side.

    Raises:
        ValueError: there are none.
    """
    if size < 1:
        raise ValueError(f"output_size must be at least 1, got {size}")


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
    """
    if _side("dilation", dilation, 1) != 1:
        raise ValueError(f"dilation must be 1, got {dilation}")
    window = _window(kernel_size, stride, padding, ceil_mode)
    window.of_map(height, width)
    return window


def _window(
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


def norm_size(size: int) -> None:
    """`size` channels are a window.

    Raises:
        ValueError: there are none.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")


def _side(name: str, value: int | Sequence[int], least: int) -> int:
    """One number for height and width."""
    sides = [value, value] if isinstance(value, int) else list(value)
    if len(sides) != 2 or sides[0] != sides[1]:
        raise ValueError(f"{name} must be one number for height and width, got {value}")
    if sides[0] < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return sides[0]


def _filter_placed(x: Tensor, name: str, weight: Tensor, casts: bool) -> None:
    """A filter is on the device of `x`, in a dtype that it can be combined with."""
    _placed(x, name, weight, DTYPES[:3] if casts else (x.dtype,))


def _vector_placed(x: Tensor, name: str, vector: Tensor, casts: bool) -> None:
    """So is a bias."""
    _placed(x, name, vector, _beside(x, casts))


def _beside(x: Tensor, casts: bool) -> Sequence[torch.dtype]:
    """Dtypes of biases and statistics, which may be fp32 beside 16 bits."""
    if casts:
        return DTYPES[:3]
    return (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)


def _placed(x: Tensor, name: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {t.device}")
    if t.dtype not in allowed:
        raise TypeError(
            f"{name} must be {_names(allowed)}, got {_names([t.dtype])}; x is {_names([x.dtype])}"
        )


def _names(dtypes: Sequence[torch.dtype]) -> str:
    # each once, in order
    return " or ".join(dict.fromkeys(str(dtype).removeprefix("torch.") for dtype in dtypes))

"""Functions that give way to plain PyTorch where that was measured to be faster.

`tune` times each function of a model as a whole, forward and in training backward too, against the
same on the ATen path, which is what `fuse_` replaced. Where a table says that the ATen path is
faster, the backend "auto" takes it; "triton" still insists. Without a measurement ours runs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fused_inception.backend import backend, resolve, selected
from fused_inception.geometry import power_of_two
from fused_inception.ops.nested import tensors_in
from fused_inception.ops.problem import problem_of
from fused_inception.tuning import table
from fused_inception.tuning.fields import numbers
from fused_inception.tuning.targets import Target, target_of

FAMILY = "plain"

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Call:
    """One call of a function whose whole has a choice."""

    function: Callable[..., Any]
    args: Sequence[Any]
    named: Mapping[str, Any]
    training: bool  # a backward would follow

    def run(self) -> Any:
        """The call again, and in training its backward: results that nothing depends on."""
        with torch.set_grad_enabled(self.training):
            outputs = [*tensors_in(self.function(*self.args, **self.named))]
            roots = [y for y in outputs if y.requires_grad]
            if not roots:
                return outputs
            leaves = [t for t in tensors_in((self.args, self.named)) if t.requires_grad]
            return torch.autograd.grad(
                roots, leaves, [torch.ones_like(y) for y in roots], allow_unused=True
            )


_recorded: dict[table.Key, Call] | None = None
_reasons: list[str] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[dict[table.Key, Call]]:
    """The calls inside the block that have a choice, by what tables know of them, of each problem
    the first; kernels compute all of them."""
    global _recorded
    before, _recorded = _recorded, {}
    try:
        yield _recorded
    finally:
        _recorded = before


@contextlib.contextmanager
def reasons() -> Iterator[list[str]]:
    """Why calls inside the block gave way to plain PyTorch."""
    global _reasons
    before, _reasons = _reasons, []
    try:
        yield _reasons
    finally:
        _reasons = before


def measured(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`function`, whose first argument is a map, on the ATen path where a table has that as faster.

    A compiler traces the function itself: which of both it compiles is not asked.
    """

    @wraps(function)
    def run(*args: _P.args, **named: _P.kwargs) -> _T:
        if torch.compiler.is_compiling() or not args or not isinstance(args[0], Tensor):
            return function(*args, **named)
        x = args[0]
        if _recorded is None and not _has_entries(x.device):
            return function(*args, **named)
        if x.dim() != 4 or selected() != "auto" or resolve(x) != "triton":
            return function(*args, **named)
        training = torch.is_grad_enabled() and any(
            t.requires_grad for t in tensors_in((args, named))
        )
        key = _key(function.__name__, x, args[1:], named, training)
        if _recorded is not None:
            _recorded.setdefault(key, Call(function, _leaves(args), _leaves(named), training))
            return function(*args, **named)
        reason = _why_plain(key, target_of(x.device))
        if reason is None:
            return function(*args, **named)
        if _reasons is not None:
            _reasons.append(reason)
        with backend("torch"):
            return function(*args, **named)

    return run


def _key(
    name: str, x: Tensor, rest: Sequence[Any], named: Mapping[str, Any], training: bool
) -> table.Key:
    """Function, mode, operands, x and the integers of all else: neighbouring batches share it."""
    operands, _, _ = problem_of(x)
    n, *shape = x.shape
    # names, as the stride of one call may be as large as the padding of another
    by_name: list[int | str] = []
    for name_of, value in sorted(named.items()):
        found = [*_integers(value)]
        by_name += [name_of, *found] if found else []
    return (
        *(name, "training" if training else "inference"),
        "16-bit" if operands.itemsize == 2 else operands.precision,
        *(power_of_two(n), *shape, *_integers(rest), *by_name),
    )


def _integers(value: Any) -> Iterable[int]:
    """Shapes of tensors and all integers and flags in `value`; floats change no time."""
    if isinstance(value, Tensor):
        yield from value.shape
    elif isinstance(value, int):
        yield int(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (int(part) for part in numbers(value))
    elif isinstance(value, Mapping):
        yield from _integers(sorted(value.items()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _integers(part)


def _leaves(value: Any) -> Any:
    """`value` with its tensors behind no graph."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {name: _leaves(part) for name, part in value.items()}
    if any(True for _ in tensors_in(value)):
        return [_leaves(part) for part in value]
    return value


@table.cached
def _has_entries(device: torch.device) -> bool:
    return table.has(FAMILY, target_of(device))


@table.cached
def _why_plain(key: table.Key, target: Target) -> str | None:
    """What the table says for plain PyTorch; None where ours runs."""
    fields = table.lookup(FAMILY, key, target)
    if fields is None:
        return None
    ratio: Any = fields.get("speed_up")
    if fields.keys() != {"speed_up"} or not table.is_ratio(ratio):
        table.reject(FAMILY, key, target, f"field must be speed_up, above 0, got {dict(fields)}")
        return None
    return f"table {target.name}, plain PyTorch {ratio:.2f}x as fast" if ratio > 1 else None

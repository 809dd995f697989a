"""Which implementation computes a convolution: our Triton kernel, or the library's convolution
(cuDNN, through ATen) with our epilogue behind it.

A *part* is one convolution in one direction: "conv3" and "conv5" are the 3x3 and 5x5 branch of a
module, "conv" a convolution that is an operator of its own; "forward", "dgrad" the data gradient,
"wgrad" the weight gradient. Forward and backward are chosen apart: what forward saves for backward
is the same either way.

Without a measurement every part is ours. The library's way costs passes over memory that ours does
without (its raw result, written and read again; a dense copy of a channel slice that it reads), the
3x3 and the 5x5 lose their common launch, and the library does not promise bitwise repeatable weight
gradients. It pays where its convolution is faster by more than that, which no rule of thumb tells:
only a measured table changes a choice.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from fused_inception.geometry import InceptionDims
from fused_inception.tuning import table
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import Target

FAMILY = "dispatch"
DIRECTIONS = ("forward", "dgrad", "wgrad")
MODULE_PARTS = tuple(f"{conv}.{way}" for conv, way in product(("conv3", "conv5"), DIRECTIONS))
CONV_PARTS = tuple(f"conv.{way}" for way in DIRECTIONS)
PARTS = MODULE_PARTS + CONV_PARTS


@dataclass(frozen=True)
class Choice:
    """Who computes a part, and why."""

    library: bool
    reason: str

    def __str__(self) -> str:
        return f"{'library' if self.library else 'triton'}: {self.reason}"


@dataclass(frozen=True)
class Plan:
    """The choices for the parts of one problem."""

    choices: Mapping[str, Choice]

    def library(self, part: str) -> bool:
        """Whether the library computes `part`, which is about to run."""
        choice = self.choices[part]
        if _recorded is not None:
            _recorded[part] = choice
        return choice.library


_forced: frozenset[str] | None = None
_recorded: dict[str, Choice] | None = None


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Choice]]:
    """The choices for the parts that run inside the block, in any thread; of each part the last."""
    global _recorded
    before = _recorded
    found: dict[str, Choice] = {}
    _recorded = found
    try:
        yield found
    finally:
        _recorded = before


def is_usual() -> bool:
    """Whether tables decide, and nobody listens."""
    return _forced is None and _recorded is None


@contextlib.contextmanager
def forced(parts: Collection[str]) -> Iterator[None]:
    """Inside the block the library computes `parts`, ours all others, whatever the tables say.

    For tests, benchmarks and measurements: `forced(PARTS)` is the library wherever there is a
    choice, `forced(())` ours alone. It holds for the whole process, as backward runs in threads of
    autograd's, and is read whenever an operator runs; a captured CUDA graph keeps what it captured.

    Raises:
        ValueError: there is no such part.
    """
    global _forced
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"parts must be among {', '.join(PARTS)}, got {sorted(unknown)}")
    before = _forced
    _forced = frozenset(parts)
    try:
        yield
    finally:
        _forced = before


def module_key(
    dims: InceptionDims, n_pixels: int, ops: Operands, *, norm: bool = False
) -> table.Key:
    """Where a table keeps what was measured of a module; with `norm` of BatchNorm in training."""
    kind = "inception_bn" if norm else "inception"
    return (kind, *dims.widths, dims.kernel_5x5, n_pixels, _operands(ops))


def conv_key(
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int,
    n_pixels: int,
    ops: Operands,
    *,
    norm: bool = False,
) -> table.Key:
    """The same of one convolution; `n_pixels` of its output."""
    kind = "conv2d_bn" if norm else "conv2d"
    return (kind, c_in, c_out, kernel, stride, n_pixels, _operands(ops))


def module_plan(
    dims: InceptionDims, n_pixels: int, ops: Operands, target: Target, *, norm: bool = False
) -> Plan:
    """The choices for the 3x3 and the 5x5 branch of a module."""
    if _forced is not None:
        return _forced_plan(MODULE_PARTS, _forced)
    return _module_plan(dims, n_pixels, ops, target, norm)


def conv_plan(
    c_in: int,
    c_out: int,
    kernel: int,
    stride: int,
    n_pixels: int,
    ops: Operands,
    target: Target,
    *,
    norm: bool = False,
) -> Plan:
    """The choices for one convolution."""
    if _forced is not None:
        return _forced_plan(CONV_PARTS, _forced)
    return _conv_plan((c_in, c_out, kernel, stride, n_pixels), ops, target, norm)


def _operands(ops: Operands) -> str:
    # fp16 and bf16 run at one speed; the precision is that of fp32 alone
    return "16-bit" if ops.itemsize == 2 else ops.precision


def _forced_plan(parts: tuple[str, ...], taken: frozenset[str]) -> Plan:
    return Plan({part: Choice(part in taken, "forced") for part in parts})


# a step asks once a problem and direction: the key is built once
@table.cached
def _module_plan(
    dims: InceptionDims, n_pixels: int, ops: Operands, target: Target, norm: bool
) -> Plan:
    return _measured_plan(MODULE_PARTS, module_key(dims, n_pixels, ops, norm=norm), target)


@table.cached
def _conv_plan(
    shape: tuple[int, int, int, int, int], ops: Operands, target: Target, norm: bool
) -> Plan:
    return _measured_plan(CONV_PARTS, conv_key(*shape, ops, norm=norm), target)


def _measured_plan(parts: tuple[str, ...], key: table.Key, target: Target) -> Plan:
    """What the table says: the fields of an entry are part -> time of ours / time of the library's
    way, for the parts that were measured."""
    fields: Mapping[str, Any] = table.lookup(FAMILY, key, target) or {}
    wrong = {name: x for name, x in fields.items() if name not in parts or not table.is_ratio(x)}
    if wrong:
        table.reject(
            FAMILY, key, target, f"fields must be {', '.join(parts)}, above 0, got {wrong}"
        )
        fields = {}
    choices = {}
    for part in parts:
        choices[part] = Choice(False, "no measurement")
        if part in fields:
            reason = f"table {target.name}, library {fields[part]:.2f}x as fast"
            choices[part] = Choice(fields[part] > 1, reason)
    return Plan(choices)

"""A kernel that has been launched is launched again without Triton's binding of its arguments.

Triton binds, specialises and looks up at every launch, about 20 us on a CPU of 2020; what it finds
depends on a key that takes a few microseconds to put together. The key here is at least as fine as
Triton's, so a remembered kernel is the one that Triton would have found.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import OutOfResources, driver
from triton.runtime.jit import JITFunction

# whose specialisation and launch protocol this file follows; others take Triton's own way
VERSIONS = ("3.6", "3.7", "3.8")
_MOST_INTEGERS = 10_000


def why_not() -> str:
    """Why launches on GPUs take Triton's own way; empty if they do not."""
    if torch.version.hip is not None:
        return "on AMD's GPUs Triton also specialises on sizes"
    if not triton.__version__.startswith(tuple(f"{version}." for version in VERSIONS)):
        known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
        return f"Triton {triton.__version__} may bind arguments otherwise than {known}"
    return ""


DEVICES = frozenset(() if why_not() else {"cuda"})  # types


@dataclass(frozen=True)
class Known:
    """A compiled kernel and what Triton would launch it with."""

    kernel: Any  # alive, so that its id stays its own
    compiled: Any  # alive, as Triton 3.8 unloads what is not
    run: Callable[..., None]
    function: Any
    metadata: Any
    constants: tuple[Any, ...]  # as the signature has them, behind the run-time arguments

    def launch(self, grid: tuple[int, ...], stream: int, args: Sequence[Any]) -> None:
        """On the current device. Tensors of `args` may be addresses; tuples stay tuples."""
        grid_x, grid_y, grid_z = (*grid, 1, 1)[:3]
        # no metadata and no hooks: only hooks read the metadata
        self.run(
            grid_x, grid_y, grid_z, stream, self.function, self.metadata, None, None, None,
            *args, *self.constants,
        )  # fmt: skip


_known: dict[tuple[Any, ...], Known] = {}


def device_of(args: tuple[Any, ...]) -> torch.device:
    """That of the first tensor."""
    for arg in args:
        if type(arg) is not tuple:
            return arg.device
        if arg:
            return arg[0].device
    raise TypeError("a launch without tensors")


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
) -> None:
    """`kernel[grid](*args, **constants, num_warps=num_warps)` on the current device, which is that
    of `args`."""
    key, known = _look_up(kernel, args, constants, num_warps)
    if known is not None:
        known.launch(grid, stream_on(device_of(args)), args)
        return
    compiled, constants = _launch_by_triton(kernel, grid, args, constants, num_warps)
    rest = kernel.arg_names[len(args) :]
    # None: a hook has stopped the compilation; other names: an argument has its default
    if key is not None and compiled is not None and constants.keys() == set(rest):
        _known[key] = Known(
            kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata,
            tuple(constants[name] for name in rest),
        )  # fmt: skip


def _launch_by_triton(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel, and the constants that it has: with fewer stages where a Triton that
    heuristics do not know needs more shared memory for them than there is.

    Raises:
        OutOfResources: one stage is too many.
    """
    fewer: dict[str, int] = {}
    while True:
        try:
            compiled = kernel[grid](*args, **constants, num_warps=num_warps)
        except OutOfResources as error:
            stages = {name: n for name, n in constants.items() if name.endswith("STAGES") and n > 1}
            if not stages:
                raise
            why = error
            fewer |= {name: n - 1 for name, n in stages.items()}
            constants = {**constants, **fewer}
        else:
            if fewer:
                warnings.warn(
                    f"{kernel.__name__} as Triton {triton.__version__} compiles it: {why}. It runs "
                    f"with {fewer}, and may be slower",
                    stacklevel=2,
                )
            return compiled, constants


def find(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int
) -> Known | None:
    """What `launch` would launch for such arguments; None where Triton has to see it."""
    return _look_up(kernel, args, constants, num_warps)[1]


def stream_on(device: torch.device) -> int:
    """The current one."""
    return driver.active.get_current_stream(device.index)


def settings() -> tuple[Any, ...] | None:
    """All settings of Triton's that a launch depends on; None where something must see launches."""
    runtime = knobs.runtime
    if (
        _has_calls(runtime.launch_enter_hook)
        or _has_calls(runtime.launch_exit_hook)
        # Triton 3.6 knows it while it compiles only
        or runtime.add_stages_inspection_hook is not None
    ):
        return None
    return runtime.debug, knobs.compilation.instrumentation_mode, driver.active


def _look_up(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int
) -> tuple[tuple[Any, ...] | None, Known | None]:
    try:
        key = _key(kernel, args, constants, num_warps)
        return key, None if key is None else _known.get(key)
    except TypeError:  # an argument that has no rule below, a constant without a hash
        return None, None


def _key(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int
) -> tuple[Any, ...] | None:
    """All that Triton compiles a kernel by; None where it must see the launch itself: an
    interpreted kernel, a hook.

    Finer than Triton in arguments of `do_not_specialize` and in addresses, which it only knows as
    multiples of 16 or not.

    Raises:
        TypeError: an argument is neither tensor nor number nor None.
    """
    device = device_of(args)
    if device.type not in DEVICES or type(kernel) is not JITFunction:
        return None
    # globals are constants of a kernel; Triton looks whether they are still what they were
    if kernel.pre_run_hooks or kernel.used_global_vals:
        return None
    in_force = settings()
    if in_force is None:
        return None
    return (
        id(kernel), device, num_warps, kernel.debug, *in_force,
        tuple(constants), tuple(constants.values()), *_kinds_of(args),
    )  # fmt: skip


def _kinds_of(args: tuple[Any, ...]) -> list[Any]:
    """What Triton specialises each argument on."""
    # a loop in one expression: at every launch, over up to 120 tensors
    return [
        (arg.dtype if arg.data_ptr() & 15 == 0 else (arg.dtype, arg.data_ptr() & 15))
        if isinstance(arg, torch.Tensor)
        else _kinds[arg]
        if type(arg) is int
        else tuple(_kinds_of(arg))
        if type(arg) is tuple
        else _kind_of_other(arg)
        for arg in args
    ]


class _Kinds(dict[int, int]):
    """What Triton specialises an integer on: 1 is a constant; else the width and whether 16 divides
    it."""

    def __missing__(self, value: int) -> int:
        wide = 0 if -(2**31) <= value < 2**31 else 2 if value < 2**63 else 4
        kind = -1 if value == 1 else wide | (value & 15 == 0)
        # sizes of maps and grids: few in a process, unless it makes new ones for ever
        if len(self) < _MOST_INTEGERS:
            self[value] = kind
        return kind


_kinds = _Kinds()


def _kind_of_other(arg: Any) -> Any:
    """Of what is neither tensor nor integer nor tuple.

    Raises:
        TypeError: there is no rule for it here.
    """
    if arg is None:
        return None
    if type(arg) is float:
        return float
    raise TypeError(f"no rule for a {type(arg).__name__}")


def _has_calls(hook: Any) -> bool:
    """Whether a hook would be called: Triton's chains of hooks may be empty."""
    return bool(getattr(hook, "calls", hook))

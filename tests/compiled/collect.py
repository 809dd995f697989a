"""Which specialisations an operator launches: its real script on tensors without data, and no GPU.

Triton itself binds and specialises the arguments; a hook takes what it is about to compile and
stops it there.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_inception.ops import problem
from fused_inception.tuning.targets import TARGETS


@dataclass(frozen=True)
class Specialisation:
    """All that determines one compilation."""

    module: str
    kernel: str
    target: str
    signature: tuple[tuple[str, str], ...]  # (argument, "*bf16", "i32", "constexpr", ...)
    constants: tuple[tuple[str, Any], ...]
    # (place in the signature, or the place and that in a tuple) -> ...
    attributes: tuple[tuple[int | tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    num_warps: int

    def constant(self, name: str) -> Any:
        """The value of a constexpr; None if the kernel has none of that name."""
        return dict(self.constants).get(name)


def gpu_target(name: str) -> GPUTarget:
    """Triton's description of the target that the library calls `name`."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


class StubDriver:
    """Enough of a driver to specialise a launch; a device index per target, as caches go by it."""

    def __init__(self, target: str) -> None:
        self.index = list(TARGETS).index(target)
        self.target = gpu_target(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _recording(target: str) -> Iterator[dict[Specialisation, None]]:
    """Every launch made inside, in order and without repeats; nothing is compiled or run."""
    found: dict[Specialisation, None] = {}

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        # the size of an argument's tuple is known, none of its elements is
        constants = ((names[place], value) for (place,), value in compile["constants"].items())
        attributes = (
            (path[0] if len(path) == 1 else path, tuple((name, value) for name, value in pairs))
            for path, pairs in compile["configs"][0].items()
            if pairs
        )
        spec = Specialisation(
            module=fn.module,
            kernel=fn.name,
            target=target,
            signature=tuple(compile["signature"].items()),
            constants=tuple(constants),
            attributes=tuple(attributes),
            num_warps=compile["num_warps"],
        )
        found[spec] = None
        return True  # stop here

    # stays active: there is no other driver to return to
    driver.set_active(StubDriver(target))
    with (
        mock.patch.object(problem, "target_of", return_value=TARGETS[target]),
        mock.patch.object(knobs.runtime, "jit_cache_hook", hook),
    ):
        yield found


def collect(launch: Callable[[], object], target: str, *, tf32: bool) -> list[Specialisation]:
    """What `launch`, working on tensors without data, needs compiled on `target`.

    The addresses of such tensors count as aligned to 16 bytes, as torch's are.
    """
    flags = torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32)
    with _recording(target) as found, flags:
        launch()
    return list(found)

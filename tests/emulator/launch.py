"""Launches on CPU tensors, compiled for a GPU and run by the emulator."""

import contextlib
import importlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import driver

from fused_inception.kernels import relaunch
from fused_inception.ops import problem
from fused_inception.tuning.targets import TARGETS
from tests.compiled.collect import StubDriver
from tests.emulator.machine import Machine
from tests.emulator.memory import Global
from tests.emulator.ptx import parse
from tests.emulator.traffic import Traffic


@contextlib.contextmanager
def emulated(
    target: str, traffic: Traffic | None = None, programs: int | None = None
) -> Iterator[set[str]]:
    """Inside the block kernels run on CPU tensors as `target` runs them, in a process where they
    are not interpreted; yields the names of those that have.

    traffic: counts what memory does. programs: of each launch only so many run, evenly spread; its
    results are then of no use.

    Raises:
        EmulatorError: at a launch, what a program does wrong.
    """
    launcher = _Launcher(traffic, programs)
    backend = importlib.import_module("fused_inception.backend")
    driver.set_active(StubDriver(target))
    with (
        mock.patch.object(problem, "target_of", return_value=TARGETS[target]),
        mock.patch.object(backend, "_interpreter_is_on", _yes),
        mock.patch.object(relaunch, "launch", launcher.launch),
    ):
        yield launcher.names


def _yes() -> bool:
    return True


class _Launcher:
    def __init__(self, traffic: Traffic | None, programs: int | None) -> None:
        self.traffic, self.programs = traffic, programs
        self.names: set[str] = set()
        # the compiled kernel beside its machine: its id stays its own
        self.machines: dict[int, tuple[Any, Machine]] = {}

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        num_warps: int,
    ) -> None:
        """As `relaunch.launch`."""
        compiled = kernel.warmup(*args, grid=grid, **constants, num_warps=num_warps)
        if id(compiled) not in self.machines:
            program = parse(compiled.asm["ptx"])
            machine = Machine(program, compiled.metadata.shared, self.traffic)
            self.machines[id(compiled)] = compiled, machine
        machine = self.machines[id(compiled)][1]
        self.names.add(machine.program.name)
        parameters: list[int] = []
        tensors: list[torch.Tensor] = []
        given = dict(zip(kernel.arg_names, args, strict=False))
        for name, kind in compiled.src.signature.items():
            _flatten(given.get(name), kind, parameters, tensors)
        # scratch memory, of which no kernel takes any
        parameters += [0] * (len(machine.program.parameters) - len(parameters))
        chosen = None
        if self.programs is not None:
            count = int(np.prod(grid))
            chosen = np.unique(np.linspace(0, count - 1, self.programs).astype(int)).tolist()
        machine.launch(grid, parameters, Global(tensors), chosen)


def _flatten(value: Any, kind: Any, parameters: list[int], tensors: list[torch.Tensor]) -> None:
    """One argument, as PTX takes it: tuples one by one, constants not at all."""
    if kind == "constexpr":
        return
    if isinstance(value, tuple):
        for part, part_kind in zip(value, kind, strict=True):
            _flatten(part, part_kind, parameters, tensors)
    elif isinstance(value, torch.Tensor):
        tensors.append(value)
        parameters.append(value.data_ptr())
    elif isinstance(value, float):
        parameters.append(struct.unpack("<I", struct.pack("<f", value))[0])
    elif isinstance(value, int):
        parameters.append(value)
    else:
        raise TypeError(f"no parameter from {value!r}")

"""What the instructions of one running program work on."""

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.memory import EmulatorError, Global
from tests.emulator.ptx import Program
from tests.emulator.shared import Shared
from tests.emulator.traffic import Traffic, line_of

TYPES = {"pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
Mask = np.ndarray | None  # threads that execute an instruction; None: all


@dataclass
class State:
    """Registers of all threads, and what they reach."""

    program: Program
    global_memory: Global
    shared: Shared
    traffic: Traffic | None = None
    parameters: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.threads = self.program.threads
        self.at = self.program.instructions[0]
        self.lane = np.arange(self.threads, dtype=np.uint32)  # of each thread, in its program
        # x, y, z; of one element, as operands are
        self.program_id = np.zeros((3, 1), np.uint32)
        self.grid = np.zeros((3, 1), np.uint32)
        self.files = {
            prefix: np.zeros((count, self.threads), TYPES[kind])
            for prefix, (kind, count) in self.program.registers.items()
        }

    def clear(self) -> None:
        """All registers hold NaN as floats of any width, and as addresses what lies far off."""
        for registers in self.files.values():
            if registers.dtype != np.bool_:
                registers.view(np.uint16)[...] = 0x7FA5

    def row(self, name: str) -> np.ndarray:
        """The register of that name, in all threads."""
        digits = name.lstrip("%abcdefghijklmnopqrstuvwxyz")
        return self.files[name.removesuffix(digits)][int(digits)]

    def lanes(self, mask: Mask) -> np.ndarray:
        """The threads that execute."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def count(self, space: str, address: np.ndarray, size: int, lanes: np.ndarray) -> None:
        """`size` bytes of "global" or "shared" memory at the address of each lane."""
        if self.traffic is not None:
            line = line_of(self.program.files, self.at.line)
            key = (self.program.name, line, f"{self.at.opcode[0]}.{space}")
            self.traffic.access(key, space, address, size, lanes)

    def all_threads(self, mask: Mask) -> None:
        """An instruction of the whole program.

        Raises:
            EmulatorError: threads are elsewhere.
        """
        if mask is not None and not mask.all():
            raise EmulatorError("some of the threads only")


def whole_warps(mask: Mask) -> None:
    """An instruction of warps.

    Raises:
        EmulatorError: threads of one are elsewhere.
    """
    if mask is None:
        return
    warps = mask.reshape(-1, 32)
    if (warps.any(1) != warps.all(1)).any():
        raise EmulatorError("part of a warp")

"""Runs a kernel's PTX: one program at a time, all its threads an instruction at a time."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tests.emulator import arithmetic, tensor_cores, transfers
from tests.emulator.memory import EmulatorError, Global
from tests.emulator.operands import reader
from tests.emulator.ptx import Instruction, Program
from tests.emulator.shared import Shared
from tests.emulator.state import Mask, State
from tests.emulator.traffic import Traffic

BUILDERS = arithmetic.BUILDERS | transfers.BUILDERS | tensor_cores.BUILDERS
# what a step returns: None, to the next; where all go; where each thread goes, -1 for the next
Target = int | np.ndarray | None


class Machine:
    """A kernel, ready to run."""

    def __init__(self, program: Program, shared: int, traffic: Traffic | None = None) -> None:
        self.program = program
        self._shared = shared, min(map(_shared_bytes, program.instructions))
        self.state = State(program, Global([]), Shared(*self._shared), traffic)
        self._steps = [self._decode(i) for i in program.instructions]

    def launch(
        self,
        grid: tuple[int, ...],
        parameters: list[int],
        memory: Global,
        programs: Iterable[int] | None = None,
    ) -> None:
        """Run the programs of the grid, by default all.

        Raises:
            EmulatorError: what one does wrong.
        """
        state = self.state
        names = [name for _, name in self.program.parameters]
        state.parameters = dict(zip(names, parameters, strict=True))
        state.global_memory = memory
        nx, ny, nz = (*grid, 1, 1)[:3]
        state.grid[:, 0] = nx, ny, nz
        with np.errstate(all="ignore"):
            for pid in range(nx * ny * nz) if programs is None else programs:
                state.program_id[:, 0] = pid % nx, pid // nx % ny, pid // nx // ny
                state.shared = Shared(*self._shared)
                state.clear()
                self._run()

    def _run(self) -> None:
        """Threads that part ways run one after the other, those that are behind first, until they
        meet again."""
        state, steps = self.state, self._steps
        end = len(steps)
        pc = 0
        places: np.ndarray | None = None  # of each thread, while they are not all at one
        active: Mask = None
        while pc < end:
            state.at = self.program.instructions[pc]
            try:
                target: Target = steps[pc](active)
            except EmulatorError as error:
                raise EmulatorError(self._where(error)) from None
            state.shared.now += 1
            if places is None and not isinstance(target, np.ndarray):
                pc = pc + 1 if target is None else target
                continue
            if places is None:
                places = np.full(state.threads, pc)
            here = places == pc
            following = pc + 1 if target is None else target
            places[here] = (
                np.where(np.less(following, 0), pc + 1, following)[here]
                if isinstance(following, np.ndarray)
                else following
            )
            pc = int(places.min())
            active = places == pc
            if active.all():
                places = active = None

    def _where(self, error: EmulatorError) -> str:
        at, pid = self.state.at, self.state.program_id[:, 0].tolist()
        file = self.program.files.get(at.line[0], "?")
        return f"{self.program.name} {pid}: {error}\n  {at.text}\n  {file}:{at.line[1]}"

    def _decode(self, instruction: Instruction) -> Callable[[Mask], Target]:
        step = self._body(instruction)
        if not instruction.guard:
            return step
        negated = instruction.guard.startswith("!")
        predicate = self.state.row(instruction.guard.lstrip("!"))

        def there(mask: Mask) -> np.ndarray:
            chosen = ~predicate if negated else predicate.copy()
            return chosen if mask is None else chosen & mask

        def guarded(mask: Mask) -> Target:
            chosen = there(mask)
            return step(None if chosen.all() else chosen)

        def branch(mask: Mask) -> Target:
            chosen = there(mask)
            if (chosen if mask is None else chosen[mask]).all():
                return step(None)
            return np.where(chosen, step(None), -1) if chosen.any() else None

        return branch if instruction.opcode[0] in ("bra", "ret") else guarded

    def _body(self, instruction: Instruction) -> Callable[[Mask], Target]:
        name, program = instruction.opcode[0], self.program
        if name == "bra":
            target = program.labels[instruction.operands[0]]
            return lambda mask: target
        if name == "ret":
            end = len(program.instructions)
            return lambda mask: end
        if name == "brx":
            which, table = instruction.operands
            labels = np.array([program.labels[label] for label in program.tables[table]])
            get = reader(self.state, which, "u32")

            def jump(mask: Mask) -> Target:
                targets = labels[np.minimum(get(), labels.size - 1)]
                chosen = targets if mask is None else targets[mask]
                return int(chosen[0]) if (chosen == chosen[0]).all() else targets

            return jump
        if name not in BUILDERS:
            raise ValueError(f"no such instruction: {instruction.text}")
        step: Any = BUILDERS[name](self.state, instruction)
        return step


def _shared_bytes(instruction: Instruction) -> int:
    """How much of shared memory a thread reaches at once, 4 at most."""
    opcode = instruction.opcode
    if opcode[0] not in ("ld", "st") or opcode[1] != "shared":
        return 4
    count = {"v2": 2, "v4": 4}.get(opcode[2], 1)
    return min(4, count * int(opcode[-1][1:]) // 8)

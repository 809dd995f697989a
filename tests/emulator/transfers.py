"""Instructions that move data between registers and memory, and wait for it."""

from collections.abc import Callable

import numpy as np

from tests.emulator.memory import EmulatorError
from tests.emulator.operands import NATIVE, address, reader, vector, writer
from tests.emulator.ptx import Instruction
from tests.emulator.state import Mask, State, whole_warps

Step = Callable[[Mask], None]


def _width(kind: str) -> int:
    return int(kind[1:]) // 8


def _ld(state: State, instruction: Instruction) -> Step:
    opcode = instruction.opcode
    kind = opcode[-1]
    d, place = instruction.operands
    if opcode[1] == "param":
        name = place.strip("[] ")
        put = writer(state, d, kind)
        native = np.dtype(NATIVE[kind])
        bits = 8 * native.itemsize

        def parameter(mask: Mask) -> None:
            value = state.parameters[name] & (2**bits - 1)
            put(np.array(value, f"u{native.itemsize}").view(native), mask)

        return parameter
    names = vector(d) if d.startswith("{") else [d]
    puts = [writer(state, name, kind) for name in names]
    where, width = address(state, place), _width(kind)
    space = opcode[1]

    def step(mask: Mask) -> None:
        lanes = state.lanes(mask)
        at = where()[lanes]
        state.count(space, at, width * len(puts), lanes)
        if space == "shared":
            words = state.shared.load(at, width, len(puts), lanes)
        else:
            words = state.global_memory.load(at, width, len(puts))
        for column, put in enumerate(puts):
            if mask is None:
                put(words[:, column], None)
            else:
                full = np.zeros(state.threads, words.dtype)
                full[lanes] = words[:, column]
                put(full, mask)

    return step


def _st(state: State, instruction: Instruction) -> Step:
    opcode = instruction.opcode
    kind = opcode[-1]
    place, value = instruction.operands
    names = vector(value) if value.startswith("{") else [value]
    gets = [reader(state, name, kind) for name in names]
    where = address(state, place)
    space = opcode[1]
    words = np.zeros((state.threads, len(gets)), f"u{_width(kind)}")

    def step(mask: Mask) -> None:
        lanes = state.lanes(mask)
        for column, get in enumerate(gets):
            words[:, column] = get()
        at = where()[lanes]
        state.count(space, at, words.itemsize * len(gets), lanes)
        if space == "shared":
            state.shared.store(at, words[lanes], lanes)
        else:
            state.global_memory.store(at, words[lanes])

    return step


def _cp(state: State, instruction: Instruction) -> Step:
    what = instruction.opcode[2]
    if what == "commit_group":

        def commit(mask: Mask) -> None:
            state.all_threads(mask)
            state.shared.commit()

        return commit
    if what == "wait_group":
        left = int(instruction.operands[0])

        def wait(mask: Mask) -> None:
            state.all_threads(mask)
            state.shared.wait(left)

        return wait
    to, source, size, *rest = instruction.operands
    target, origin = address(state, to), address(state, source)
    size_bytes = int(size, 0)
    read = reader(state, rest[0], "u32") if rest else None

    def step(mask: Mask) -> None:
        lanes = state.lanes(mask)
        words = np.zeros((lanes.size, size_bytes // 4), np.uint32)
        if read is None:
            used = np.full(lanes.size, size_bytes)
        else:
            used = np.broadcast_to(read(), state.threads)[lanes]
        if not np.isin(used, (0, size_bytes)).all():
            raise EmulatorError("copies a part of its bytes")
        there = used > 0
        at = origin()[lanes[there]]
        state.count("global", at, size_bytes, lanes[there])
        words[there] = state.global_memory.load(at, 4, size_bytes // 4)
        to_shared = target()[lanes]
        state.count("shared", to_shared, size_bytes, lanes)
        state.shared.copy(to_shared, words, lanes)

    return step


def _bar(state: State, instruction: Instruction) -> Step:
    if instruction.opcode[1] == "warp":
        return whole_warps

    def barrier(mask: Mask) -> None:
        state.all_threads(mask)
        state.shared.barrier()

    return barrier


def _fence(state: State, instruction: Instruction) -> Step:
    return lambda mask: state.shared.fence()


BUILDERS: dict[str, Callable[[State, Instruction], Step]] = {
    "ld": _ld,
    "st": _st,
    "cp": _cp,
    "bar": _bar,
    "fence": _fence,
}

"""Matrix instructions, and those that move their fragments."""

from collections.abc import Callable

import numpy as np

from tests.emulator.memory import EmulatorError
from tests.emulator.operands import address, bf16_to_f32, reader, vector
from tests.emulator.ptx import Instruction
from tests.emulator.state import Mask, State, whole_warps

_LANE = np.arange(32)
GROUP, MEMBER = _LANE >> 2, _LANE & 3  # of a fragment: its row, its pair of columns


def _lanes(state: State, mask: Mask) -> np.ndarray:
    whole_warps(mask)
    return state.lanes(mask)


def _rows(state: State, names: list[str]) -> list[np.ndarray]:
    return [state.row(name) for name in names]


def _to_float(words: np.ndarray, kind: str) -> np.ndarray:
    """Elements of 16 bits or TF32 as singles; `words` has their own width."""
    if kind == "bf16":
        return bf16_to_f32(words)
    if kind == "f16":
        return words.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    raise ValueError(f"no tensor core for {kind}")


def _a_fragment(words: np.ndarray, kind: str) -> np.ndarray:
    """[warps, 16, k] from [4, warps, 32] registers of 32 bits."""
    warps = words.shape[1]
    if kind == "tf32":
        a = np.zeros((warps, 16, 8), np.uint32)
        for i in range(4):
            a[:, GROUP + 8 * (i & 1), MEMBER + 4 * (i >> 1)] = words[i]
        return _to_float(a, kind)
    a = np.zeros((warps, 16, 16), np.uint16)
    for i in range(4):
        halves = np.ascontiguousarray(words[i]).view(np.uint16).reshape(warps, 32, 2)
        for half in range(2):
            a[:, GROUP + 8 * (i & 1), 2 * MEMBER + half + 8 * (i >> 1)] = halves[:, :, half]
    return _to_float(a, kind)


def _b_fragment(words: np.ndarray, kind: str) -> np.ndarray:
    """[warps, k, 8] from [2, warps, 32] registers."""
    warps = words.shape[1]
    if kind == "tf32":
        b = np.zeros((warps, 8, 8), np.uint32)
        for i in range(2):
            b[:, MEMBER + 4 * i, GROUP] = words[i]
        return _to_float(b, kind)
    b = np.zeros((warps, 16, 8), np.uint16)
    for i in range(2):
        halves = np.ascontiguousarray(words[i]).view(np.uint16).reshape(warps, 32, 2)
        for half in range(2):
            b[:, 2 * MEMBER + half + 8 * i, GROUP] = halves[:, :, half]
    return _to_float(b, kind)


def _mma(state: State, instruction: Instruction) -> Callable[[Mask], None]:
    *_, shape, _, _, to, kind, _, _ = instruction.opcode
    if (
        shape not in ("m16n8k16", "m16n8k8")
        or to != "f32"
        or (shape == "m16n8k8") != (kind == "tf32")
    ):
        raise ValueError(f"no such instruction: {instruction.text}")
    d, a, b, c = (_rows(state, vector(o)) for o in instruction.operands)

    def step(mask: Mask) -> None:
        lanes = _lanes(state, mask)
        first = np.stack([r[lanes].reshape(-1, 32) for r in a])
        second = np.stack([r[lanes].reshape(-1, 32) for r in b])
        product = _a_fragment(first, kind) @ _b_fragment(second, kind)
        for i in range(4):
            part = product[:, GROUP + 8 * (i >> 1), 2 * MEMBER + (i & 1)]
            sums = c[i].view(np.float32)[lanes] + part.ravel()
            d[i].view(np.float32)[lanes] = sums

    return step


def _wgmma(state: State, instruction: Instruction) -> Callable[[Mask], None]:
    opcode = instruction.opcode
    if opcode[1] != "mma_async":
        return _async_group(state, instruction)
    shape, kind = opcode[4], opcode[6]
    columns, depth = (int(x) for x in shape.removeprefix("m64n").split("k"))
    operands = instruction.operands
    sums = _rows(state, vector(operands[0]))
    in_registers = operands[1].startswith("{")
    if in_registers:
        a_rows = _rows(state, vector(operands[1]))
    else:
        a_descriptor = reader(state, operands[1], "b64")
    b_descriptor = reader(state, operands[2], "b64")
    accumulates = reader(state, operands[3], "pred")
    signs, transposed = operands[4:6], [int(x) for x in operands[6:]]
    if any(sign != "1" for sign in signs) or opcode[-1] != kind or len(sums) != columns // 2:
        raise ValueError(f"no such instruction: {instruction.text}")
    if not transposed:
        transposed = [0, 0]
    a_turned, b_turned = (0, transposed[0]) if len(transposed) == 1 else transposed
    at = np.arange(columns // 2)
    column = 8 * (at // 4) + (at & 1)
    lower = 8 * ((at >> 1) & 1)

    def step(mask: Mask) -> None:
        lanes = _lanes(state, mask)
        for group in lanes.reshape(-1, 128):
            uniform = [b_descriptor()] if in_registers else [a_descriptor(), b_descriptor()]
            for descriptor in uniform:
                if descriptor.size > 1 and (descriptor[group] != descriptor[group[0]]).any():
                    raise EmulatorError("descriptors differ in a warp group")
            b = _operand(state, int(b_descriptor()[group[0]]), columns, depth, kind, b_turned)
            if in_registers:
                words = np.stack([r[group].reshape(4, 32) for r in a_rows])
                a = _a_fragment(words, kind).reshape(64, depth)
            else:
                a = _operand(state, int(a_descriptor()[group[0]]), 64, depth, kind, a_turned)
            product = a @ b.T
            keep = np.broadcast_to(accumulates(), state.threads)[group]
            warp = np.repeat(np.arange(4), 32)
            for i, register in enumerate(sums):
                rows = 16 * warp + np.tile(GROUP, 4) + lower[i]
                part = product[rows, column[i] + np.tile(2 * MEMBER, 4)]
                view = register.view(np.float32)
                view[group] = np.where(keep, view[group], 0) + part

    return step


def _operand(
    state: State, descriptor: int, rows: int, depth: int, kind: str, turned: int
) -> np.ndarray:
    """[rows, depth] of a matrix in shared memory, whose rows are M or N.

    turned: rows lie side by side, not the depth.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    base_offset = descriptor >> 49 & 7
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    size = 4 if kind == "tf32" else 2
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    if base_offset:
        raise EmulatorError("a base offset")
    if turned:
        wide = swizzle // size  # rows side by side
        if swizzle == 16:
            leading, stride = stride, leading
        offset = row % wide * size + row // wide * leading + k % 8 * swizzle + k // 8 * stride
    elif swizzle == 16:
        wide = 16 // size
        offset = row % 8 * 16 + row // 8 * stride + k % wide * size + k // wide * leading
    else:
        offset = row % 8 * swizzle + row // 8 * stride + k * size
    linear = start + offset
    bits = {16: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    place = linear ^ ((linear >> 7 & bits) << 4)
    return _to_float(state.shared.multiply(place, size), kind)


def _async_group(state: State, instruction: Instruction) -> Callable[[Mask], None]:
    what = instruction.opcode[1]
    left = int(instruction.operands[0]) if what == "wait_group" else 0

    def step(mask: Mask) -> None:
        whole_warps(mask)
        if what == "commit_group":
            state.shared.commit_products()
        elif what == "wait_group":
            state.shared.wait_products(left)

    return step


def _matrix(state: State, instruction: Instruction) -> Callable[[Mask], None]:
    """ldmatrix and stmatrix: 8 x 8 elements of 16 bits, a row at the address of a lane."""
    opcode = instruction.opcode
    load = opcode[0] == "ldmatrix"
    count = int(next(x for x in opcode if x in ("x1", "x2", "x4"))[1:])
    turned = "trans" in opcode
    registers, place = instruction.operands if load else instruction.operands[::-1]
    rows = _rows(state, vector(registers))
    where = address(state, place)

    def step(mask: Mask) -> None:
        lanes = _lanes(state, mask)
        at = where()[lanes].reshape(-1, 32)[:, : 8 * count]
        warps = at.shape[0]
        threads = lanes.reshape(-1, 32)
        readers = threads[:, : 8 * count].ravel()
        state.count("shared", at.ravel(), 16, readers)
        if load:
            # by the lanes of the warp: all of them take what these addresses give
            words = state.shared.load(at.ravel(), 4, 4, readers)
            halves = words.view(np.uint16).reshape(warps, count, 8, 8)
            if turned:
                halves = halves.swapaxes(2, 3)
            pairs = np.ascontiguousarray(halves).view(np.uint32).reshape(warps, count, 32)
            for i, register in enumerate(rows):
                register[threads] = pairs[:, i]
            return
        pairs = np.stack([register[threads] for register in rows], 1)  # warps, count, 32
        halves = np.ascontiguousarray(pairs).view(np.uint16).reshape(warps, count, 8, 8)
        if turned:
            halves = halves.swapaxes(2, 3)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 4)
        state.shared.store(at.ravel(), words, readers)

    return step


BUILDERS: dict[str, Callable[[State, Instruction], Callable[[Mask], None]]] = {
    "mma": _mma,
    "wgmma": _wgmma,
    "ldmatrix": _matrix,
    "stmatrix": _matrix,
}

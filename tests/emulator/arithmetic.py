"""Instructions that compute in registers: integers, floats, comparisons, conversions, shuffles."""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.operands import NATIVE, PAIRS, reader, vector, writer
from tests.emulator.operands import put as put_part
from tests.emulator.ptx import Instruction
from tests.emulator.state import Mask, State, whole_warps

Step = Callable[[Mask], None]
Builder = Callable[[State, Instruction], Step]

_WIDER = {"u16": "u4", "s16": "i4", "u32": "u8", "s32": "i8"}
_FLOAT = {"f16", "f32", "bf16", "f16x2", "bf16x2", "f64"}


def _single(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32)


def _binary(function: Callable[[Any, Any], Any]) -> Builder:
    def build(state: State, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        d, a, b = instruction.operands
        put = writer(state, d, kind)
        first, second = reader(state, a, kind), reader(state, b, kind)
        return lambda mask: put(function(first(), second()), mask)

    return build


def _maximum(state: State, instruction: Instruction) -> Step:
    smaller = instruction.opcode[0] == "min"
    if instruction.opcode[-1] not in _FLOAT or "NaN" in instruction.opcode:
        function = np.minimum if smaller else np.maximum
    else:
        function = np.fmin if smaller else np.fmax
    return _binary(function)(state, instruction)


def _unary(function: Callable[[Any], Any]) -> Builder:
    def build(state: State, instruction: Instruction) -> Step:
        kind = instruction.opcode[-1]
        d, a = instruction.operands
        put, get = writer(state, d, kind), reader(state, a, kind)
        return lambda mask: put(function(get()), mask)

    return build


def _shift(state: State, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    left = instruction.opcode[0] == "shl"
    d, a, b = instruction.operands
    put, value, amount = writer(state, d, kind), reader(state, a, kind), reader(state, b, "u32")
    bits = int(kind[1:])

    def step(mask: Mask) -> None:
        by = amount()
        x = value()
        if left:
            shifted = x << np.minimum(by, bits - 1).astype(x.dtype)
            put(np.where(by >= bits, 0, shifted), mask)
        elif x.dtype.kind == "i":
            put(x >> np.minimum(by, bits - 1).astype(x.dtype), mask)
        else:
            shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
            put(np.where(by >= bits, 0, shifted), mask)

    return step


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integers, rounded towards zero."""
    if x.dtype.kind == "u" and y.dtype.kind == "u":
        return x // np.maximum(y, 1)
    wide, by = x.astype(np.int64), y.astype(np.int64)
    quotient = np.abs(wide) // np.maximum(np.abs(by), 1)
    return np.where((wide < 0) != (by < 0), -quotient, quotient)


def _div(state: State, instruction: Instruction) -> Step:
    if instruction.opcode[-1] in _FLOAT:
        return _binary(lambda x, y: x / y)(state, instruction)
    return _binary(_divide)(state, instruction)


def _rem(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x - _divide(x, y).astype(x.dtype) * y


def _high(x: np.ndarray, y: np.ndarray, kind: str) -> np.ndarray:
    bits = int(kind[1:])
    if bits == 64:
        product = x.astype(object) * y.astype(object) >> 64
        return product.astype(x.dtype)
    wide = _WIDER[kind]
    return (x.astype(wide) * y.astype(wide)) >> np.array(bits, wide)


def _multiply(state: State, instruction: Instruction) -> Step:
    """mul and mad, of integers and floats."""
    opcode, operands = instruction.opcode, instruction.operands
    kind = opcode[-1]
    form = opcode[1] if kind not in _FLOAT else "lo"
    out = f"{kind[0]}{2 * int(kind[1:])}" if form == "wide" else kind
    put = writer(state, operands[0], out)
    x, y = reader(state, operands[1], kind), reader(state, operands[2], kind)
    z = reader(state, operands[3], out) if len(operands) == 4 else None

    def step(mask: Mask) -> None:
        if form == "wide":
            wide = np.dtype(NATIVE[out])
            product = x().astype(wide) * y().astype(wide)
        elif form == "hi":
            product = _high(x(), y(), kind)
        else:
            product = x() * y()
        put(product if z is None else product + z(), mask)

    return step


def _fma(state: State, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    d, *abc = instruction.operands
    put = writer(state, d, kind)
    x, y, z = (reader(state, o, kind) for o in abc)
    # the product of two singles is exact in a double
    return lambda mask: put(_single(x().astype(np.float64) * y() + z()), mask)


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "neu": lambda a, b: ~(a == b),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}


def _setp(state: State, instruction: Instruction) -> Step:
    _, how, *_, kind = instruction.opcode
    if len(instruction.opcode) > 3 or len(instruction.operands) != 3:
        raise _raising(instruction)
    d, a, b = instruction.operands
    compare = _COMPARE[how]
    x, y = reader(state, a, kind), reader(state, b, kind)
    puts = [writer(state, part, "pred") for part in d.split("|")]
    if kind in PAIRS:

        def step(mask: Mask) -> None:
            found = compare(x(), y())
            for half, put in enumerate(puts):
                put(found[:, half], mask)

        return step
    put = puts[0]
    return lambda mask: put(compare(x(), y()), mask)


def _selp(state: State, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    d, a, b, p = instruction.operands
    put, x, y = writer(state, d, kind), reader(state, a, kind), reader(state, b, kind)
    where = reader(state, p, "pred")
    return lambda mask: put(np.where(where(), x(), y()), mask)


def _mov(state: State, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    d, a = instruction.operands
    if d.startswith("{") or a.startswith("{"):
        whole, parts = (a, d) if d.startswith("{") else (d, a)
        names = vector(parts)
        bits = int(kind[1:]) // len(names)
        pieces = state.row(whole).view(f"u{bits // 8}").reshape(-1, len(names))
        if whole == a:
            puts = [writer(state, name, f"b{bits}") for name in names]

            def unpack(mask: Mask) -> None:
                # a copy: a part may be the whole's register
                for at, value in enumerate(pieces.copy().T):
                    puts[at](value, mask)

            return unpack
        gets = [reader(state, name, f"b{bits}") for name in names]

        def pack(mask: Mask) -> None:
            for at, get in enumerate(gets):
                put_part(pieces[:, at], get(), mask)

        return pack
    put, get = writer(state, d, kind), reader(state, a, kind)
    return lambda mask: put(get(), mask)


def _cvt(state: State, instruction: Instruction) -> Step:
    *_, to, source = instruction.opcode
    if to in PAIRS:  # d, high, low
        d, high, low = instruction.operands
        put = writer(state, d, to)
        first, second = reader(state, low, source), reader(state, high, source)
        both = np.zeros((state.threads, 2), np.float32)

        def step(mask: Mask) -> None:
            both[:, 0], both[:, 1] = first(), second()
            put(both, mask)

        return step
    d, a = instruction.operands
    put, get = writer(state, d, to), reader(state, a, source)
    return lambda mask: put(get(), mask)


def _extract(state: State, instruction: Instruction) -> Step:
    kind = instruction.opcode[-1]
    d, a, b, c = instruction.operands
    put, x = writer(state, d, kind), reader(state, a, kind)
    at, length = int(b), int(c)
    if not 0 < length <= 32 - at:
        raise _raising(instruction)
    up = 32 - at - length

    def step(mask: Mask) -> None:
        value = x()
        put((value << value.dtype.type(up)) >> value.dtype.type(32 - length), mask)

    return step


def _insert(state: State, instruction: Instruction) -> Step:
    d, a, b, c, e = instruction.operands
    put, x, y = writer(state, d, "b32"), reader(state, a, "b32"), reader(state, b, "b32")
    field = np.uint32(((1 << int(e)) - 1) << int(c) & 0xFFFFFFFF)
    shift = np.uint32(int(c))
    return lambda mask: put(((x() << shift) & field) | (y() & ~field), mask)


def _permute(state: State, instruction: Instruction) -> Step:
    d, a, b, c = instruction.operands
    put, x, y = writer(state, d, "b32"), reader(state, a, "b32"), reader(state, b, "b32")
    selector = reader(state, c, "b32")
    pool = np.zeros((state.threads, 8), np.uint8)
    words = pool.view(np.uint32)

    def step(mask: Mask) -> None:
        words[:, 0], words[:, 1] = x(), y()
        chosen = selector()
        result = np.zeros(state.threads, np.uint32)
        for byte in range(4):
            nibble = np.broadcast_to(chosen >> np.uint32(4 * byte), state.threads) & np.uint32(15)
            value = pool[state.lane, nibble & np.uint32(7)]
            sign = np.where(value >= 128, 0xFF, 0).astype(np.uint8)
            value = np.where(nibble & np.uint32(8), sign, value).astype(np.uint32)
            result |= value << np.uint32(8 * byte)
        put(result, mask)

    return step


def _shuffle(state: State, instruction: Instruction) -> Step:
    how = instruction.opcode[2]
    d, a, b, clamp, members = instruction.operands
    if clamp != "31" or members != "-1" or "|" in d or how not in ("bfly", "idx"):
        raise _raising(instruction)
    put, x, by = writer(state, d, "b32"), reader(state, a, "b32"), reader(state, b, "u32")
    lane = state.lane & np.uint32(31)
    first = state.lane - lane

    def step(mask: Mask) -> None:
        whole_warps(mask)
        other = lane ^ by() if how == "bfly" else by() & np.uint32(31)
        put(x()[first + other], mask)

    return step


def _raising(instruction: Instruction) -> ValueError:
    return ValueError(f"no such instruction: {instruction.text}")


BUILDERS: dict[str, Builder] = {
    "add": _binary(lambda x, y: x + y),
    "sub": _binary(lambda x, y: x - y),
    "and": _binary(lambda x, y: x & y),
    "or": _binary(lambda x, y: x | y),
    "xor": _binary(lambda x, y: x ^ y),
    "rem": _binary(_rem),
    "div": _div,
    "max": _maximum,
    "min": _maximum,
    "mul": _multiply,
    "mad": _multiply,
    "fma": _fma,
    "neg": _unary(lambda x: -x),
    "not": _unary(lambda x: ~x),
    "sqrt": _unary(np.sqrt),
    "rsqrt": _unary(lambda x: _single(1 / np.sqrt(x.astype(np.float64)))),
    "ex2": _unary(np.exp2),
    "lg2": _unary(np.log2),
    "shl": _shift,
    "shr": _shift,
    "setp": _setp,
    "selp": _selp,
    "mov": _mov,
    "cvt": _cvt,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "shfl": _shuffle,
}

"""Operands of instructions: how a register or a number is read, and written, as a type."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator.memory import SHARED_BASE
from tests.emulator.state import Mask, State

NATIVE = {
    "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2",
    "u32": "u4", "s32": "i4", "b32": "u4", "u64": "u8", "s64": "i8", "b64": "u8",
    "f32": "f4", "f64": "f8", "f16": "f2",
}  # fmt: skip
PAIRS = {"bf16x2": "bf16", "f16x2": "f16", "s16x2": "s16", "u16x2": "u16"}


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Of their 16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    low = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + low) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def _immediate(text: str) -> int | float:
    text = text.rstrip("U")
    if text.startswith("0f"):
        return struct.unpack("<f", int(text[2:], 16).to_bytes(4, "little"))[0]
    return int(text, 0)


def reader(state: State, operand: str, kind: str) -> Callable[[], Any]:
    """What gives the operand's value as an instruction of type `kind` takes it."""
    if operand in ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x"):
        axis = "xyz".index(operand[-1])
        source = {"%tid": state.lane, "%ctaid": state.program_id[axis]}.get(operand[:-2])
        if source is None:
            source = state.grid[axis]
        return lambda: source
    if operand.startswith("%"):
        row = state.row(operand)
        if kind == "pred":
            return lambda: row
        if kind == "bf16":
            return lambda: bf16_to_f32(row)
        if kind in PAIRS:
            halves = row.view("u2").reshape(-1, 2)
            if kind == "bf16x2":
                return lambda: bf16_to_f32(halves)
            view = halves.view(NATIVE[PAIRS[kind]])
            return lambda: view
        native = np.dtype(NATIVE[kind])
        view = row.view(native)
        if native.itemsize < row.itemsize:  # little-endian: the low part
            view = view[:: row.itemsize // native.itemsize]
        elif native.itemsize > row.itemsize:
            raise ValueError(f"{operand} is too narrow for {kind}")
        return lambda: view
    if operand == "global_smem":
        value: Any = SHARED_BASE
    else:
        value = _immediate(operand)
    if kind == "pred":
        constant = np.full(1, bool(value))
    elif kind == "bf16":
        constant = bf16_to_f32(np.full(1, value & 0xFFFF, np.uint16))
    elif kind == "f16" and isinstance(value, int):
        constant = np.full(1, value & 0xFFFF, np.uint16).view("f2")
    elif kind in PAIRS:
        halves = np.full(1, value & 0xFFFFFFFF, np.uint32).view("u2").reshape(1, 2)
        constant = bf16_to_f32(halves) if kind == "bf16x2" else halves.view(NATIVE[PAIRS[kind]])
    elif isinstance(value, float):
        constant = np.full(1, value, np.float32)
        if kind != "f32":
            constant = constant.view(NATIVE[kind])
    else:
        native = np.dtype(NATIVE[kind])
        unsigned = np.dtype(f"u{native.itemsize}")
        bits = 8 * native.itemsize
        constant = np.full(1, value & (2**bits - 1), unsigned).view(native)
    return lambda: constant


def writer(state: State, operand: str, kind: str) -> Callable[[Any, Mask], None]:
    """What sets a register from a value of type `kind`, in some threads or all."""
    if operand == "_":
        return lambda value, mask: None
    row = state.row(operand)
    if kind == "bf16":
        return lambda value, mask: put(row, f32_to_bf16(value), mask)
    if kind in PAIRS:
        halves = row.view("u2").reshape(-1, 2)
        if kind == "bf16x2":
            return lambda value, mask: put(halves, f32_to_bf16(value), _column(mask))
        view = halves.view(NATIVE[PAIRS[kind]])
        return lambda value, mask: put(view, value, _column(mask))
    if kind == "pred":
        return lambda value, mask: put(row, value, mask)
    native = np.dtype(NATIVE[kind])
    if native.itemsize == row.itemsize:
        view = row.view(native)
        return lambda value, mask: put(view, value, mask)
    # narrower than its register: extended, by its sign if it has one
    wide = row.view("i" + str(row.itemsize)) if native.kind == "i" else row
    return lambda value, mask: put(wide, np.asarray(value).astype(native), mask)


def _column(mask: Mask) -> Mask:
    return None if mask is None else mask[:, None]


def put(view: np.ndarray, value: Any, mask: Mask) -> None:
    """Set a register where `mask` is true."""
    if mask is None:
        np.copyto(view, value, casting="unsafe")
    else:
        np.copyto(view, value, casting="unsafe", where=mask)


def vector(operand: str) -> list[str]:
    """The parts of `{a, b}`."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(state: State, operand: str) -> Callable[[], np.ndarray]:
    """Of `[%rd1+4]`, in all threads."""
    base, _, offset = operand.strip("[] ").partition("+")
    base = base.strip()
    shift = np.int64(int(offset.strip(), 0) if offset else 0)
    if base.startswith("%"):
        row = state.row(base)
        return lambda: row.astype(np.uint64) + np.uint64(shift)
    fixed = np.full(state.threads, SHARED_BASE + shift, np.uint64)
    return lambda: fixed

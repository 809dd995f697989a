"""Memory of an emulated GPU: tensors at their own addresses, and a program's shared memory."""

import ctypes

import numpy as np
import torch

SHARED_BASE = 1024  # as on sm_90; a multiple of 1024, which swizzled operands need


class EmulatorError(AssertionError):
    """What a kernel did that it should not have done."""


class Space:
    """A piece of memory, `size` bytes from address `base` on."""

    def __init__(self, base: int, data: np.ndarray, size: int, what: str) -> None:
        """data: its bytes, behind those that lie between the last multiple of 8 and `base`."""
        self.base, self.size, self.what = base, size, what
        self.shift = data.size - size
        self.words = {n: data[: data.size // n * n].view(f"u{n}") for n in (1, 2, 4, 8)}

    def index(self, address: np.ndarray, width: int, count: int, verb: str) -> np.ndarray:
        """[lanes, count] positions among words of `width` bytes.

        Raises:
            EmulatorError: one lies outside, or is not aligned to all it accesses.
        """
        offset = address.astype(np.int64) - self.base
        total = width * count
        if offset.size and (offset.min() < 0 or offset.max() + total > self.size):
            bad = int(offset.min() if offset.min() < 0 else offset.max())
            raise EmulatorError(f"{verb} {total} bytes at {bad} of {self.size} of {self.what}")
        if (address & np.uint64(total - 1)).any():
            raise EmulatorError(f"{verb} {total} bytes at an address that they do not divide")
        first = (offset + self.shift) // width
        return first[:, None] + np.arange(count)


class Global:
    """Every storage that the arguments of a launch lie in, in place."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self._tensors = tensors  # their memory stays
        self.spaces: list[Space] = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            base, size = storage.data_ptr(), storage.nbytes()
            if size and base not in [space.base for space in self.spaces]:
                shift = base % 8
                memory = (ctypes.c_uint8 * (shift + size)).from_address(base - shift)
                data = np.ctypeslib.as_array(memory)
                self.spaces.append(Space(base, data, size, f"a tensor {tensor.shape}"))

    def _parts(self, address: np.ndarray, verb: str) -> list[tuple[Space, np.ndarray | None]]:
        """The spaces that lanes reach, and which lanes; None: all."""
        for space in self.spaces:
            inside = (address >= space.base) & (address < space.base + space.size)
            if inside.all():
                return [(space, None)]
        parts: list[tuple[Space, np.ndarray | None]] = []
        rest = np.ones(address.size, bool)
        for space in self.spaces:
            inside = (address >= space.base) & (address < space.base + space.size)
            if inside.any():
                parts.append((space, np.flatnonzero(inside)))
                rest &= ~inside
        if rest.any():
            raise EmulatorError(f"{verb} {int(address[rest][0]):#x}, in no tensor")
        return parts

    def load(self, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """[lanes, count] words."""
        if not address.size:
            return np.zeros((0, count), f"u{width}")
        parts = self._parts(address, "reads")
        if parts[0][1] is None:
            space = parts[0][0]
            return space.words[width][space.index(address, width, count, "reads")]
        words = np.zeros((address.size, count), f"u{width}")
        for space, lanes in parts:
            at = space.index(address[lanes], width, count, "reads")
            words[lanes] = space.words[width][at]
        return words

    def store(self, address: np.ndarray, words: np.ndarray) -> None:
        """Write [lanes, count] words."""
        if not address.size:
            return
        width, count = words.dtype.itemsize, words.shape[1]
        for space, lanes in self._parts(address, "writes"):
            chosen = address if lanes is None else address[lanes]
            at = space.index(chosen, width, count, "writes")
            space.words[width][at] = words if lanes is None else words[lanes]

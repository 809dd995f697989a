"""A program's shared memory, and who may touch which of it when.

Between two barriers of the program, what one warp writes no other may read or write (but with the
value that is there), and what one reads no other may write. What cp.async brings may not be read
before its group has been waited for; what wgmma reads may not be written before that, and stores
must have been fenced (Triton 3.6 fences no copies, later ones both).
"""

import numpy as np

from tests.emulator.memory import SHARED_BASE, EmulatorError, Space

NOBODY, MANY = -1, -2


class Shared:
    """Shared memory of one program; `unit` is the smallest access in bytes."""

    def __init__(self, size: int, unit: int) -> None:
        # NaN in all types until it is written
        self.space = Space(SHARED_BASE, np.full(size, 0xFF, np.uint8), size, "shared memory")
        self.unit = unit
        units = -(-size // unit)
        self.writer = np.full(units, NOBODY, np.int32)  # warp, since the last barrier
        self.reader = np.full(units, NOBODY, np.int32)
        self.written = np.zeros(units, np.int64)  # when stored; 0 where a copy has been since
        self.coming = np.zeros(units, np.int16)  # copies under way
        self.multiplied = np.zeros(units, np.int16)  # products under way
        self.copies: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[]]
        self.products: list[list[np.ndarray]] = [[]]
        self.now = 1
        self.fenced = 0

    def _units(self, at: np.ndarray, size: int) -> np.ndarray:
        """[lanes, units] of `size` bytes at each address."""
        first = (at.astype(np.int64) - SHARED_BASE) // self.unit
        return first[:, None] + np.arange(max(1, size // self.unit))

    def load(self, at: np.ndarray, width: int, count: int, lanes: np.ndarray) -> np.ndarray:
        """[lanes, count] words of `width` bytes."""
        index = self.space.index(at, width, count, "reads")
        units = self._units(at, width * count)
        warps = np.broadcast_to((lanes >> 5).astype(np.int32)[:, None], units.shape)
        self._may_read(units, warps)
        reader = self.reader[units]
        self.reader[units] = np.where((reader == NOBODY) | (reader == warps), warps, MANY)
        # of this very access, by several warps
        self.reader[units[self.reader[units] != warps]] = MANY
        return self.space.words[width][index]

    def _may_read(self, units: np.ndarray, warps: np.ndarray | int) -> None:
        if self.coming[units].any():
            raise EmulatorError("reads what a copy is still bringing")
        writer = self.writer[units]
        if ((writer != NOBODY) & (writer != warps)).any():
            raise EmulatorError("reads what another warp has written, without a barrier")

    def _may_write(self, units: np.ndarray, warps: np.ndarray) -> None:
        if self.multiplied[units].any():
            raise EmulatorError("writes what a product is still reading")
        reader = self.reader[units]
        if ((reader != NOBODY) & (reader != warps)).any():
            raise EmulatorError("writes what another warp has read, without a barrier")

    def store(self, at: np.ndarray, words: np.ndarray, lanes: np.ndarray) -> None:
        """Write [lanes, count] words."""
        width, count = words.dtype.itemsize, words.shape[1]
        units = self._units(at, width * count)
        warps = np.broadcast_to((lanes >> 5).astype(np.int32)[:, None], units.shape)
        if self.coming[units].any():
            raise EmulatorError("writes where a copy is still writing")
        self._may_write(units, warps)
        self._store(at, words, units, warps)
        self.written[units] = self.now

    def _store(
        self, at: np.ndarray, words: np.ndarray, units: np.ndarray, warps: np.ndarray
    ) -> None:
        width, count = words.dtype.itemsize, words.shape[1]
        index = self.space.index(at, width, count, "writes")
        memory = self.space.words[width]
        writer = self.writer[units]
        foreign = (writer != NOBODY) & (writer != warps)
        if foreign.any() and (memory[index] != words)[foreign.any(1)].any():
            raise EmulatorError("writes what another warp has written, without a barrier")
        memory[index] = words
        if (memory[index] != words).any():
            raise EmulatorError("writes different values to one place")
        self.writer[units] = warps
        self.writer[units[self.writer[units] != warps]] = MANY

    def copy(self, at: np.ndarray, words: np.ndarray, lanes: np.ndarray) -> None:
        """cp.async: the write happens when its group is waited for, as late as it may."""
        units = self._units(at, words.dtype.itemsize * words.shape[1])
        warps = np.broadcast_to((lanes >> 5).astype(np.int32)[:, None], units.shape)
        self._may_write(units, warps)
        writer = self.writer[units]
        if ((writer != NOBODY) & (writer != warps)).any():
            raise EmulatorError("copies over what another warp has written, without a barrier")
        self.coming[units] += 1
        self.copies[-1].append((at, words, lanes))

    def commit(self) -> None:
        self.copies.append([])

    def wait(self, left: int) -> None:
        """All but the last `left` groups of copies are there."""
        while len(self.copies) - 1 > left:
            for at, words, lanes in self.copies.pop(0):
                units = self._units(at, words.dtype.itemsize * words.shape[1])
                warps = np.broadcast_to((lanes >> 5).astype(np.int32)[:, None], units.shape)
                self.coming[units] -= 1
                self._store(at, words, units, warps)
                self.written[units] = 0

    def multiply(self, place: np.ndarray, size: int) -> np.ndarray:
        """What wgmma takes, at addresses of any shape."""
        index = self.space.index(place.ravel().astype(np.uint64), size, 1, "multiplies")
        units = np.unique(self._units(place.ravel(), size))
        self._may_read(units, NOBODY)
        if (self.written[units] > self.fenced).any():
            raise EmulatorError("multiplies what no fence has followed")
        self.multiplied[units] += 1
        self.products[-1].append(units)
        return self.space.words[size][index].reshape(place.shape)

    def commit_products(self) -> None:
        self.products.append([])

    def wait_products(self, left: int) -> None:
        """All but the last `left` groups of products are done."""
        while len(self.products) - 1 > left:
            for units in self.products.pop(0):
                self.multiplied[units] -= 1
                self.reader[units] = MANY

    def fence(self) -> None:
        self.fenced = self.now

    def barrier(self) -> None:
        self.writer[...] = NOBODY
        self.reader[...] = NOBODY

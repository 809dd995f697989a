"""What the memory system does for a kernel's instructions: sectors of global memory that requests
reach into, passes over the banks of shared memory."""

import dataclasses
from pathlib import Path

import numpy as np

SECTOR = 32  # bytes: the least that moves between global memory, L2 and L1
BANKS = 32  # of 4 bytes
PASS = 128  # bytes of shared memory at once


@dataclasses.dataclass
class Counts:
    """Of one line of a kernel, and one kind of instruction."""

    requests: int = 0  # instructions, a warp each
    units: int = 0  # sectors, or passes
    least: int = 0  # of them, were the same bytes side by side

    @property
    def ratio(self) -> float:
        """1 where nothing is wasted."""
        return self.units / max(self.least, 1)


class Traffic:
    """Counts by (kernel, file and line, instruction)."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], Counts] = {}

    def access(
        self,
        key: tuple[str, str, str],
        space: str,
        address: np.ndarray,
        size: int,
        lanes: np.ndarray,
    ) -> None:
        """`size` bytes at the address of each lane, in "global" or "shared" memory."""
        if address.size:
            count = _sectors if space == "global" else _passes
            requests, units, least = count(address.astype(np.int64), size, lanes.astype(np.int64))
            of = self.counts.setdefault(key, Counts())
            of.requests += requests
            of.units += units
            of.least += least

    def table(self) -> str:
        """Lines that waste most first."""
        order = sorted(self.counts.items(), key=lambda item: item[1].least - item[1].units)
        return "\n".join(
            f"{kernel:28} {line:28} {what:16} {of.units:9} of at least {of.least:9} {of.ratio:6.2f}"
            for (kernel, line, what), of in order
        )


def _sectors(start: np.ndarray, size: int, lanes: np.ndarray) -> tuple[int, int, int]:
    """Requests, sectors, and the fewest of them."""
    warp = lanes >> 5 << 50
    sectors = (start[:, None] + np.arange(0, size, min(size, SECTOR))) // SECTOR
    requests = np.unique(warp).size
    distinct = np.unique(warp + start).size * size
    return requests, np.unique(warp[:, None] + sectors).size, max(requests, distinct // SECTOR)


def _passes(start: np.ndarray, size: int, lanes: np.ndarray) -> tuple[int, int, int]:
    """Requests, passes, and the fewest: one serves as many lanes as fill it, and takes one word of
    each bank."""
    group = lanes // max(1, min(32, PASS // size))
    words = start[:, None] // 4 + np.arange(max(1, size // 4))
    distinct = np.unique((group[:, None] << 40) + (words % BANKS << 32) + words)
    banks, words_of_bank = np.unique(distinct >> 32, return_counts=True)
    _, first = np.unique(banks >> 8, return_index=True)
    passes = np.maximum.reduceat(words_of_bank, first)
    return np.unique(lanes >> 5).size, int(passes.sum()), passes.size


def line_of(files: dict[int, str], at: tuple[int, int]) -> str:
    """File and line."""
    return f"{Path(files.get(at[0], '?')).name}:{at[1]}"

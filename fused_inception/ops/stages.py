"""Options of the operators that stand for a stage of the network: as the layers have them, and as
integers and constants, which is what schemas can hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fused_inception.geometry import Window, conv_out

NormNumbers = tuple[int, float, float, float]  # size, alpha, beta, k


@dataclass(frozen=True)
class Stem:
    """Options of the layers of the stem."""

    stride: int  # of conv1
    padding: int
    pool1: Window
    norm1: NormNumbers
    norm2: NormNumbers
    pool2: Window

    @property
    def integers(self) -> list[int]:
        """All that are integers."""
        windows = [
            n
            for w in (self.pool1, self.pool2)
            for n in (w.kernel, w.stride, w.padding, int(w.ceil_mode))
        ]
        return [self.stride, self.padding, *windows, self.norm1[0], self.norm2[0]]

    @property
    def constants(self) -> list[float]:
        """Alpha, beta, k of both norms."""
        return [*map(float, (*self.norm1[1:], *self.norm2[1:]))]

    @staticmethod
    def of(integers: Sequence[int], constants: Sequence[float]) -> "Stem":
        """The inverse of both."""
        stride, padding, *windows, size1, size2 = integers
        pool1, pool2 = (
            Window(kernel, step, border, bool(ceil))
            for kernel, step, border, ceil in (windows[:4], windows[4:])
        )
        alpha1, beta1, k1, alpha2, beta2, k2 = constants
        return Stem(
            stride, padding, pool1, (size1, alpha1, beta1, k1), (size2, alpha2, beta2, k2), pool2
        )

    def sides(self, side: int, kernel: int) -> tuple[int, int, int]:
        """Sides behind conv1, pool1 and pool2 of an image's side; `kernel` is conv1's."""
        first = conv_out(side, kernel, self.stride, self.padding)
        second = self.pool1.out(first)
        return first, second, self.pool2.out(second)


CONVS = 6  # of a module


@dataclass(frozen=True)
class Trunk:
    """What stands behind the modules of a trunk, as integers.

    Attributes:
        pools: the max pool behind a module, by the module's number.
        taps: numbers of the modules whose output the operator returns too.
        mean: whether the global average pool is behind the last one.
    """

    pools: dict[int, Window]
    taps: tuple[int, ...]
    mean: bool

    @property
    def integers(self) -> list[int]:
        """All of it; never an empty list, which autograd takes for one of tensors."""
        windows = [
            n
            for at, w in self.pools.items()
            for n in (at, w.kernel, w.stride, w.padding, int(w.ceil_mode))
        ]
        return [int(self.mean), len(self.taps), *self.taps, *windows]

    @staticmethod
    def of(integers: Sequence[int]) -> "Trunk":
        """The inverse."""
        mean, taps, *rest = integers
        pools = {}
        for i in range(taps, len(rest), 5):
            at, kernel, stride, padding, ceil = rest[i : i + 5]
            pools[at] = Window(kernel, stride, padding, bool(ceil))
        return Trunk(pools, tuple(rest[:taps]), bool(mean))


def of_modules(flat: Sequence[Any]) -> list[list[Any]]:
    """Filters, biases or what belongs to them, six for each module."""
    return [list(flat[i : i + CONVS]) for i in range(0, len(flat), CONVS)]

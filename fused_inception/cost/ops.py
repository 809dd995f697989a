"""Operators as records: what they read, write and multiply, and how long that takes."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from fused_inception.cost.device import COLUMN_SHARE, TILE_ELEMENTS, TILE_ROWS, Device
from fused_inception.geometry import align_up, power_of_two

FORWARD, BACKWARD = "forward", "backward"
OURS = ("triton", "packing")  # sources of our own launches
# A launch of filter gradients ends with its last program, and each split writes and reads partial
# sums: with p pixels and n elements of all its gradients a program of a full tile is best given
# SPLIT_SHARE * sqrt(p * n) pixels, and not below SPLIT_PIXELS. It is sqrt(16 bytes / (rate of the
# memory * seconds of a pixel)), of one H200 as tuning.wgrad_heuristic sees it
SPLIT_SHARE = 0.0195
SPLIT_PIXELS = 512


class Tensor(NamedTuple):
    """A tensor that an operator touches; equal names are the same memory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Gemm:
    """One product: [rows, depth] times [depth, columns]."""

    rows: int
    columns: int
    depth: int
    itemsize: int
    kind: str  # "pointwise", "window" or "filters"
    partials: int = 0  # elements of all filter gradients of its launch; 0: of this one
    useful: int = 0  # products that are none of a padded filter; 0: all

    @property
    def multiply_adds(self) -> int:
        """Products; taps on the padding of a map count, as they do in the paper."""
        return self.useful or self.rows * self.columns * self.depth

    @property
    def splits(self) -> int:
        """Parts of the reduction that run side by side; more than one in filter gradients."""
        if self.kind != "filters":
            return 1
        partials = self.partials or self.rows * self.columns
        return filter_splits(self.rows, self.columns, self.depth, partials)


@dataclass(frozen=True)
class Op:
    """One operator: a launch or, of a library, as many as it takes."""

    name: str
    layer: str
    phase: str  # FORWARD or BACKWARD
    source: str  # "triton": ours, "packing": ours, of filters; "inductor"; "library"
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]
    gemms: tuple[Gemm, ...] = ()
    launches: int = 1
    kernel: str = ""  # our Triton kernel
    scatters: bool = False  # reaches only `scatter_share` of the memory's rate

    @property
    def multiply_adds(self) -> int:
        """Products of all GEMMs."""
        return sum(gemm.multiply_adds for gemm in self.gemms)

    @property
    def flops(self) -> int:
        """Two for each multiply-add; bias, ReLU, pooling and normalisation are left out."""
        return 2 * self.multiply_adds

    @property
    def read_bytes(self) -> int:
        """Each operand once."""
        return sum(tensor.bytes for tensor in self.reads)

    @property
    def write_bytes(self) -> int:
        """Each result once."""
        return sum(tensor.bytes for tensor in self.writes)

    def seconds(self, device: Device, cached: int = 0) -> float:
        """The slowest of memory, operand stream, products and the floor of a launch.

        `cached` bytes of the operands are found in the L2 cache.
        """
        share = device.scatter_share if self.scatters else device.memory_share
        moved = self.read_bytes + self.write_bytes
        memory = (moved - cached) / (device.memory_rate.value * share.value)
        stream = moved / (device.stream_rate.value * share.value)
        products = _products_seconds(self.gemms, self.source in OURS, device)
        return max(memory, stream, products, self.launches * device.launch_seconds.value)


@dataclass(frozen=True)
class Saved:
    """Memory that lives from a layer's forward to its backward."""

    name: str
    layer: str
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What a module or a network costs under one plan."""

    ops: tuple[Op, ...]
    saved: tuple[Saved, ...]

    def part(self, *, layer: str | None = None, phase: str | None = None) -> "Cost":
        """Only the operators (and saved memory) of a layer, of a phase."""
        ops = tuple(
            op for op in self.ops if layer in (None, op.layer) and phase in (None, op.phase)
        )
        return Cost(ops, tuple(kept for kept in self.saved if layer in (None, kept.layer)))

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in the order of the forward pass."""
        return tuple(dict.fromkeys(op.layer for op in self.ops))

    @property
    def multiply_adds(self) -> int:
        """Products of all operators."""
        return sum(op.multiply_adds for op in self.ops)

    @property
    def flops(self) -> int:
        """Two for each multiply-add."""
        return 2 * self.multiply_adds

    @property
    def read_bytes(self) -> int:
        """Bytes that the operators read, each operand once, wherever it lies."""
        return sum(op.read_bytes for op in self.ops)

    @property
    def write_bytes(self) -> int:
        """Bytes that the operators write."""
        return sum(op.write_bytes for op in self.ops)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for backward: distinct memory, the input included, parameters and buffers
        not."""
        return sum(kept.bytes for kept in self.saved)

    def launches(self, *sources: str) -> int:
        """Kernels launched, of the named sources or of all.

        Sources: "triton", "packing", "inductor", "library".
        """
        return sum(op.launches for op in self.ops if not sources or op.source in sources)

    def timeline(self, device: Device) -> list[tuple[Op, float]]:
        """Every operator with its predicted seconds inside a CUDA graph, in order.

        An operand is found in the L2 cache where fewer bytes than it holds passed through it since
        the operand was last touched; writes always reach memory.
        """
        passed = 0
        last: dict[str, int] = {}
        result = []
        for op in self.ops:
            cached = sum(
                t.bytes
                for t in op.reads
                if t.name in last and passed - last[t.name] + t.bytes <= device.cache_bytes.value
            )
            for tensor in (*op.reads, *op.writes):
                passed += tensor.bytes
                last[tensor.name] = passed
            result.append((op, op.seconds(device, cached)))
        return result

    def seconds(self, device: Device) -> float:
        """Predicted seconds inside a CUDA graph."""
        return sum(seconds for _, seconds in self.timeline(device))

    def eager_seconds(self, device: Device, *, norm: bool = False) -> float:
        """Predicted seconds where the CPU launches every kernel; `norm` says whether convolutions
        have BatchNorm."""
        ours = self.launches(*OURS)
        compiled = self.launches("inductor") > 0
        theirs = device.compiled_host_seconds if compiled else device.host_seconds
        each = device.our_host_norm_seconds if norm else device.our_host_seconds
        if any(op.phase == BACKWARD for op in self.ops):
            each = device.our_host_training_seconds
        host = ours * each.value + (self.launches() - ours) * theirs.value
        return max(self.seconds(device), host)


class Recorder:
    """Collects operators and saved memory while a plan walks through a network.

    Forward is written down as it is walked; each step leaves behind what its backward does, and
    `cost` plays these back in reverse.
    """

    def __init__(self, batch: int, itemsize: int, *, training: bool) -> None:
        self.batch = batch
        self.itemsize = itemsize
        self.training = training
        self._phase = FORWARD
        self._ops: list[Op] = []
        self._saved: dict[str, Saved] = {}
        self._steps: list[Callable[[], None]] = []

    def tensor(self, name: str, pixels: int, channels: int, itemsize: int | None = None) -> Tensor:
        """An activation of `pixels` pixels an image."""
        size = self.itemsize if itemsize is None else itemsize
        return Tensor(name, self.batch * pixels * channels * size)

    def parameter(self, name: str, elements: int, itemsize: int | None = None) -> Tensor:
        """A filter, a bias or a gradient of one."""
        return Tensor(name, elements * (self.itemsize if itemsize is None else itemsize))

    def gemm(self, pixels: int, columns: int, depth: int, kind: str) -> Gemm:
        """A product with one row for every pixel of the batch."""
        return Gemm(self.batch * pixels, columns, depth, self.itemsize, kind)

    def filters_gemm(self, rows: int, columns: int, pixels: int, partials: int = 0) -> Gemm:
        """A filter gradient: a reduction over every pixel of the batch, in a launch with `partials`
        elements of gradients."""
        return Gemm(rows, columns, self.batch * pixels, self.itemsize, "filters", partials)

    def op(
        self,
        name: str,
        layer: str,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        gemms: Iterable[Gemm] = (),
        *,
        source: str = "library",
        launches: int = 1,
        kernel: str = "",
        scatters: bool = False,
    ) -> None:
        """Write one operator down."""
        self._ops.append(
            Op(
                name, layer, self._phase, source, tuple(reads), tuple(writes), tuple(gemms),
                launches, kernel, scatters,
            )
        )  # fmt: skip

    def save(self, layer: str, *tensors: Tensor) -> None:
        """Keep tensors for backward; memory that an earlier layer keeps counts once."""
        if self.training:
            for tensor in tensors:
                self._saved.setdefault(tensor.name, Saved(tensor.name, layer, tensor.bytes))

    def later(self, step: Callable[[], None]) -> None:
        """Do `step` when backward comes back here."""
        self._steps.append(step)

    def cost(self) -> Cost:
        """All that was written down; in training with the backward pass."""
        if self.training:
            self._phase = BACKWARD
            while self._steps:
                self._steps.pop()()
        return Cost(tuple(self._ops), tuple(self._saved.values()))


def gradient(tensor: Tensor) -> Tensor:
    """That of a loss, as large as the tensor itself."""
    return Tensor("d " + tensor.name, tensor.bytes)


def filter_splits(rows: int, columns: int, pixels: int, partials: int) -> int:
    """Splits of a filter gradient in a launch with so many elements of them."""
    widest = max(TILE_ROWS)
    tile_rows, tile_columns = (min(widest, max(16, power_of_two(n))) for n in (rows, columns))
    tile = min(TILE_ELEMENTS, tile_rows * tile_columns)
    most = max(SPLIT_PIXELS, SPLIT_SHARE * (pixels * partials) ** 0.5)
    return max(1, ceil(pixels * tile / (most * TILE_ELEMENTS)))


def _products_seconds(gemms: tuple[Gemm, ...], ours: bool, device: Device) -> float:
    """Products of one launch: tiles dealt to the processors, or the stream of their operands."""
    if not gemms or not all(gemm.multiply_adds for gemm in gemms):
        return 0.0
    tiles: list[tuple[int, float]] = []
    streamed = 0
    for gemm in gemms:
        gemm_tiles, gemm_bytes = _tiling(gemm, ours, device)
        tiles += gemm_tiles
        streamed += gemm_bytes
    return max(_makespan(tiles, device), streamed / device.stream_rate.value)


@functools.lru_cache(maxsize=65536)
def _tiling(gemm: Gemm, ours: bool, device: Device) -> tuple[list[tuple[int, float]], int]:
    """([(tiles, seconds of one)], bytes streamed to them) of the cheapest tile shape."""
    if ours:
        shares = {
            "pointwise": device.pointwise_share,
            "window": device.window_share,
            "filters": device.filter_share,
        }
        share = shares[gemm.kind].value
    elif gemm.kind == "filters":
        share = device.library_filter_share.value
    else:
        share = device.library_share.value
    rate = device.flops(gemm.itemsize) * share / device.processors.value
    depth = align_up(ceil(gemm.depth / gemm.splits), 16)
    best: tuple[float, list[tuple[int, float]], int] | None = None
    for rows in TILE_ROWS:
        for columns in COLUMN_SHARE:
            if rows * columns > TILE_ELEMENTS:
                continue
            count = gemm.splits * ceil(gemm.rows / rows)
            tiles = []
            streamed = 0
            for width, number in _widths(gemm.columns, columns, ours):
                products = 2 * rows * width * depth / (rate * COLUMN_SHARE[width])
                tiles.append((count * number, products + device.tile_seconds.value))
                streamed += count * number * (rows + width) * depth * gemm.itemsize
            seconds = max(_makespan(tiles, device), streamed / device.stream_rate.value)
            if best is None or seconds < best[0]:
                best = seconds, tiles, streamed
    assert best is not None  # for the type checker: there are tile shapes
    return best[1], best[2]


def _widths(columns: int, tile: int, ours: bool) -> list[tuple[int, int]]:
    """(tile width, how many) that cover `columns`; ours end with a tile that fits the rest."""
    if not ours:
        return [(tile, ceil(columns / tile))]
    whole, rest = divmod(columns, tile)
    tail = [(next(width for width in COLUMN_SHARE if width >= rest), 1)] if rest else []
    return ([(tile, whole)] if whole else []) + tail


def _makespan(tiles: list[tuple[int, float]], device: Device) -> float:
    """Time until the last of all tiles is done."""
    processors = device.processors.value
    number = sum(count for count, _ in tiles)
    longest = max(seconds for _, seconds in tiles)
    if number <= processors:
        return longest
    if len(tiles) == 1:
        return ceil(number / processors) * longest
    shortest = min(seconds for _, seconds in tiles)
    return max(longest, sum(n * seconds for n, seconds in tiles) / processors + shortest / 2)

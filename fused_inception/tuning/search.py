"""The search for a better configuration than the heuristic's: which candidates there are, and which
of them is the fastest by somebody else's measurement.

One part of a configuration after another, a tile, warps and stages, the number of splits, is varied
around the best one so far: all parts at once would be thousands of kernels a problem.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

from fused_inception.geometry import InceptionDims, NaiveDims, align_up
from fused_inception.tuning.chosen import FAMILIES, Problem
from fused_inception.tuning.configs import Tile, WgradJob, split_width
from fused_inception.tuning.conv_heuristic import PACKED_POSITIONS
from fused_inception.tuning.limits import why_not

# padded products of a tile, against those of the heuristic's
MAX_WASTE = 1.25
# fp32 sums of a thread; with twice as many nothing is left for addresses and operands
MAX_SUMS = 128
# what is not faster than this is noise
MARGIN = 0.99

Extents = tuple[int, int, int]


class Bench(Protocol):
    """Who compiles and measures."""

    def usable(self, configs: list[Any]) -> list[Any]:
        """Those that compile without spills, compiled."""

    def seconds(self, config: Any) -> float:
        """The time of the problem's launches; infinite if they fail."""


@dataclass(frozen=True)
class Winner:
    """The best configuration found for a problem.

    Attributes:
        seconds: its time; `heuristic_seconds` that of the heuristic's choice, in the same run.
        tried: candidates measured, the heuristic's included.
        complete: whether every part was varied before the time was over.
    """

    problem: Problem
    config: Any
    seconds: float
    heuristic_seconds: float
    tried: int
    complete: bool


def search(problem: Problem, bench: Bench, in_time: Callable[[], bool]) -> Winner | None:
    """The fastest of the candidates, the heuristic's choice unless another beats it by MARGIN; None
    where not even that could be measured before `in_time()` said no."""
    start = FAMILIES[problem.family].by_heuristic(problem)
    if not in_time():
        return None
    best, best_seconds = start, bench.seconds(start)
    heuristic_seconds = best_seconds
    if not math.isfinite(best_seconds):
        return None
    tried, complete = 1, True
    for name in parts(start):
        for config in bench.usable(variants(problem, best, name)) if in_time() else ():
            if not in_time():
                break
            seconds = bench.seconds(config)
            tried += 1
            if seconds < best_seconds * MARGIN:
                best, best_seconds = config, seconds
        complete = in_time()
        if not complete:
            break
    return Winner(problem, best, best_seconds, heuristic_seconds, tried, complete)


def parts(config: Any) -> list[str]:
    """What is varied at a time: fields, and "launch" for warps and stages together."""
    names = [f.name for f in dataclasses.fields(config)]
    launch = [name for name in names if _of_launch(name)]
    return [name for name in names if name not in launch] + (["launch"] if launch else [])


def variants(problem: Problem, config: Any, part: str) -> list[Any]:
    """Configurations that differ from `config` in that part alone, can be launched, do not pad much
    more than the heuristic's, and leave registers for more than their sums."""
    heuristic = FAMILIES[problem.family].by_heuristic(problem)
    extents = extents_of(problem)
    found = []
    for candidate in dict.fromkeys(_varied(config, part)):
        if candidate == config or why_not(candidate, problem.itemsize, problem.target):
            continue
        if _sums_of_a_thread(candidate) > max(MAX_SUMS, _sums_of_a_thread(heuristic)):
            continue
        own, usual = padded(candidate, extents), padded(heuristic, extents)
        if all(own[name] <= MAX_WASTE * usual[name] for name in own):
            found.append(candidate)
    return found


def candidates(problem: Problem) -> list[Any]:
    """All variants around the heuristic's choice: what a search begins with."""
    start = FAMILIES[problem.family].by_heuristic(problem)
    return [start, *(c for part in parts(start) for c in variants(problem, start, part))]


def products(problem: Problem) -> int:
    """Of the tiles of the heuristic's choice, padding included; 0 where there are none."""
    config = FAMILIES[problem.family].by_heuristic(problem)
    return sum(padded(config, extents_of(problem)).values())


def padded(config: Any, extents: dict[str, Extents]) -> dict[str, int]:
    """Products of each tile's launch, those of the padding included."""
    found = {}
    for name, extent in extents.items():
        value = getattr(config, name)
        tile = value.tile if isinstance(value, WgradJob) else value
        rows, columns, depth = extent
        # a tail is the last column tile of these
        tail = getattr(config, "tail_n", 0) if name in ("gemm", "conv3", "forward") else 0
        wide, tail = split_width(columns, tile.block_n, tail)
        columns = wide * tile.block_n + tail
        found[name] = align_up(rows, tile.block_m) * columns * align_up(depth, tile.block_k)
    return found


def extents_of(problem: Problem) -> dict[str, Extents]:
    """Rows, columns and depth (of each tap, where there are taps) of the tiles whose padding is
    looked at; pixels where they are columns of a split are never padded much."""
    dims = problem.arguments[0]
    if isinstance(dims, InceptionDims):
        pixels = problem.arguments[1]
        s_in, c3, c5 = (align_up(c) for c in (dims.in_channels, dims.ch3x3red, dims.ch5x5red))
        s1, s3, s5, sp = (align_up(c) for c in dims.branch_widths)
        taps5 = dims.kernel_5x5**2
        rows = {
            "pointwise": {
                "gemm": (pixels, s1 + dims.reduced_channels, s_in),
                "pool": (pixels, dims.pool_proj, s_in),
            },
            "branches": {"conv3": (pixels, dims.ch3x3, c3), "conv5": (pixels, dims.ch5x5, c5)},
            "dgrad": {
                "conv3": (pixels, dims.ch3x3red, s3),
                "conv5": (pixels, dims.ch5x5red, s5),
                "pool": (pixels, dims.in_channels, sp),
            },
            "input_grad": {"gemm": (pixels, dims.in_channels, s1 + dims.reduced_channels)},
            "wgrad": {
                "conv3": (9 * c3, s3, pixels),
                "conv5": (taps5 * c5, s5, pixels),
                "branch1": (s_in, s1, pixels),
                "reduces": (s_in, dims.reduced_channels, pixels),
                "projection": (s_in, sp, pixels),
            },
        }
        return rows[problem.family]
    if isinstance(dims, NaiveDims):
        pixels = problem.arguments[1]
        depth = align_up(dims.in_channels)
        widths = dict(zip(("conv1", "conv3", "conv5"), dims.conv_widths, strict=True))
        if problem.family == "naive":
            return {name: (pixels, width, depth) for name, width in widths.items()}
        if problem.family == "naive_wgrad":
            taps = {"conv1": 1, "conv3": 9, "conv5": 25}
            return {n: (taps[n] * depth, align_up(w), pixels) for n, w in widths.items()}
    if problem.family == "conv":
        c_in, c_out, kernel, pixels, *_ = problem.arguments
        return {
            "forward": (pixels, c_out, align_up(c_in)),
            "dgrad": (pixels, c_in, align_up(c_out)),
            "wgrad": (kernel * kernel * align_up(c_in), align_up(c_out), pixels),
        }
    if problem.family == "stem_conv":
        c_out, pixels, _ = problem.arguments
        return {"forward": (pixels, c_out, PACKED_POSITIONS)}
    if problem.family == "stem_wgrad":
        (c1, c2, c3), pixels1, pixels, _ = problem.arguments
        return {
            "conv1": (PACKED_POSITIONS, c1, pixels1),
            "conv2": (c1, c2, pixels),
            "conv3": (9 * c2, c3, pixels),
        }
    if problem.family == "image_conv":
        positions, c_out, pixels, _ = problem.arguments
        # one position more is the gradient of the bias
        return {"forward": (pixels, c_out, positions), "wgrad": (c_out, positions + 1, pixels)}
    return {}


def _of_launch(name: str) -> bool:
    return name.endswith("warps") or name == "num_stages"


def _varied(config: Any, part: str) -> Iterator[Any]:
    if part == "launch":
        names = [f.name for f in dataclasses.fields(config) if _of_launch(f.name)]
        steps = [_around(name, getattr(config, name)) for name in names]
        for values in product(*steps):
            yield replace(config, **dict(zip(names, values, strict=True)))
        return
    for value in _around(part, getattr(config, part)):
        yield replace(config, **{part: value})


def _around(name: str, value: Any) -> list[Any]:
    """`value` and its neighbours: half and double, one stage more or less, the other flag."""
    if isinstance(value, Tile):
        sides = (value.block_m, value.block_n, value.block_k)
        return [Tile(*shape) for shape in product(*([n, n // 2, n * 2] for n in sides))]
    if isinstance(value, WgradJob):
        tiles = [replace(value, tile=tile) for tile in _around("tile", value.tile)]
        return [*tiles, *(replace(value, splits=n) for n in _around("splits", value.splits))]
    if dataclasses.is_dataclass(value):
        inner = [v for part in parts(value) for v in _varied(value, part)]
        return [value, *inner]
    if isinstance(value, bool):
        return [value, not value]
    if name == "num_stages":
        return [value, value - 1, value + 1]
    if name == "tail_n":
        return [value, *(n for n in (0, 32, 64, 128) if n != value)]
    if name == "taps":
        return [value]
    return [value, value // 2, value * 2]


def _sums_of_a_thread(config: Any) -> float:
    warps = [getattr(config, f.name) for f in dataclasses.fields(config) if "warps" in f.name]
    tiles = [
        value.tile if isinstance(value, WgradJob) else value
        for value in (getattr(config, f.name) for f in dataclasses.fields(config))
        if isinstance(value, Tile | WgradJob)
    ]
    largest = max((t.block_m * t.block_n for t in tiles), default=0)
    return largest / (32 * max(warps))

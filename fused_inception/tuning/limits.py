"""What no configuration may go beyond, whoever chose it."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from fused_inception.geometry import ALIGN
from fused_inception.tuning.configs import (
    AvgPoolProjectConfig,
    BranchesConfig,
    ConvConfig,
    DgradConfig,
    MarchConfig,
    MaskConfig,
    NormConfig,
    PointwiseConfig,
    StemConvConfig,
    Tile,
    VectorConfig,
)
from fused_inception.tuning.targets import Target

MAX_STAGES = 8
MAX_SPLITS = 4096
# of a window, loaded at a time: each is unrolled
MAX_TAPS = 64
# elements of a tile for each thread, which has 255 registers: beyond them compilers take minutes
MAX_VALUES = 256
# elements of a tile's side; Triton itself stops at 2^20 elements a tile
MAX_EXTENT = 1024
WARPS = (1, 2, 4, 8, 16)


def why_not(config: Any, itemsize: int, target: Target) -> str | None:
    """Why `config` cannot be launched on `target` for operands of `itemsize` bytes; None where
    nothing is known against it."""
    for name, value in _leaves(config):
        if why := _why_not_field(name, value):
            return why
    for part in (config, *vars(config).values()):
        if isinstance(part, MaskConfig | NormConfig) and part.pixels % part.block_p:
            return f"pixels {part.pixels} is no multiple of block_p {part.block_p}"
        if isinstance(part, MaskConfig) and part.block_c < ALIGN:
            return f"block_c {part.block_c} is below {ALIGN}, the channels of a byte of a mask"
    if isinstance(config, PointwiseConfig | BranchesConfig | DgradConfig | ConvConfig):
        of = {PointwiseConfig: "gemm", ConvConfig: "forward"}
        wide = getattr(config, of.get(type(config), "conv3"))
        if config.tail_n >= wide.block_n:
            return f"tail_n {config.tail_n} is not below block_n {wide.block_n}"
    if isinstance(config, StemConvConfig) and config.forward.block_k > 64:
        return f"block_k must divide 64, got {config.forward.block_k}"
    needed = shared_bytes(config, itemsize)
    if needed > target.shared_bytes:
        return f"needs {needed} bytes of shared memory, {target.name} has {target.shared_bytes}"
    threads = 32 * max((n for name, n in _leaves(config) if name.endswith("warps")), default=1)
    largest = max(_held(config), default=0)
    if largest > MAX_VALUES * threads:
        return f"a tile of {largest} elements is too large for {threads} threads"
    return None


def shared_bytes(config: Any, itemsize: int) -> int:
    """Least shared memory of its pipelines: both operands of one step, in every stage."""
    steps = [(t.block_m + t.block_n) * t.block_k * itemsize for t in tiles(config)]
    return getattr(config, "num_stages", 1) * max(steps, default=0)


def tiles(config: Any) -> list[Tile]:
    """All tiles in it whose operands are pipelined: the pool branch of launch A is not."""
    if isinstance(config, Tile):
        return [config]
    if not dataclasses.is_dataclass(config):
        return []
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, PointwiseConfig):
        del values["pool"]
    return [tile for value in values.values() for tile in tiles(value)]


def _held(config: Any) -> Iterator[int]:
    """Elements of the tiles that programs hold: sums, and what is loaded for them."""
    if isinstance(config, Tile):
        yield config.block_m * config.block_n
        yield max(config.block_m, config.block_n) * config.block_k
    if isinstance(config, MaskConfig | NormConfig):
        yield config.block_p * config.block_c
    if isinstance(config, VectorConfig | MarchConfig):
        yield config.block_v * 32  # 8 channels of several taps and neighbours
    if isinstance(config, AvgPoolProjectConfig):
        yield config.block_pixel * config.dgrad.block_m
    for part in vars(config).values():
        if dataclasses.is_dataclass(part):
            yield from _held(part)


def _why_not_field(name: str, value: int) -> str | None:
    power = value > 0 and value & (value - 1) == 0
    if name.endswith("warps"):
        good, want = value in WARPS, f"one of {WARPS}"
    elif name == "num_stages":
        good, want = 1 <= value <= MAX_STAGES, f"between 1 and {MAX_STAGES}"
    elif name == "splits":
        good, want = 1 <= value <= MAX_SPLITS, f"between 1 and {MAX_SPLITS}"
    elif name == "taps":
        good, want = 1 <= value <= MAX_TAPS, f"between 1 and {MAX_TAPS}"
    elif name == "tail_n" and value == 0:
        return None
    elif name in ("block_m", "block_n", "block_k", "tail_n"):
        good, want = power and 16 <= value <= MAX_EXTENT, "a power of two from 16 on"
    elif name.startswith("block_"):
        good, want = power and value <= MAX_EXTENT, "a power of two"
    else:
        good, want = value >= 1 or isinstance(value, bool), "1 or more"
    return None if good else f"{name} must be {want}, got {value}"


def _leaves(config: Any) -> Iterator[tuple[str, Any]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield f.name, value

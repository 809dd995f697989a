"""What was compiled, group by group, as tables: one row per kind of launch."""

import json
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from tests.compiled import matrix
from tests.compiled.bounds import VECTOR_BYTES, tile_loads, violations
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import ROOT
from tests.compiled.matrix import IMAGE

# kernels of which a launch has some parts, by a constant each
RANGES = {"pointwise": ("GEMM", "POOL"), "gradients": ("INPUT", "FILTERS")}


@dataclass(frozen=True)
class Row:
    """All configurations of one kind of launch for one target and precision: the worst of each."""

    target: str
    precision: str
    launch: str
    kernels: int
    broken: int  # kernels that break a bound
    registers: int
    stack: int
    loop_spills: int  # instructions in inner loops that reach it
    shared: int
    tensor_cores: str
    load_bytes: int | None  # narrowest load of tiles of which a thread has 16 bytes or more
    # function -> fewest and most instructions of one step of its loops, and per tensor-core cycle
    steps: dict[str, tuple[float, float]]
    issue_ratios: dict[str, tuple[float, float]]
    seconds: float  # of the longest compilation


def launch_name(spec: Specialisation) -> str:
    """The kernel, and which program ranges it has: launch A of products and pool, L2 and L3 as one
    of input and filters."""
    name = spec.kernel.removeprefix("_").removesuffix("_kernel")
    if name not in RANGES:
        return name
    there = (flag.lower() for flag in RANGES[name] if spec.constant(flag))
    return f"{name} ({' + '.join(there)})"


def rows(target: str, precision: str, builds: Iterable[Build]) -> Iterator[Row]:
    """One row per kind of launch."""
    kinds: dict[str, list[Build]] = {}
    for build in builds:
        kinds.setdefault(launch_name(build.spec), []).append(build)
    for launch, same in kinds.items():
        codes = [b.code for b in same if b.code is not None]
        loops = [loop for code in codes for loop in code.loops]
        wide = [width for b in same for _, width, n in tile_loads(b) if n >= VECTOR_BYTES]
        multiplying = [loop for loop in loops if loop.tensor_cycles]
        yield Row(
            target,
            precision,
            launch,
            len(same),
            sum(bool(violations(b)) for b in same),
            max((code.registers for code in codes), default=0),
            max((code.stack for code in codes), default=0),
            max((loop.spills for loop in loops), default=0),
            max(b.shared for b in same),
            " ".join(sorted({name for code in codes for name in code.tensor_cores})),
            min(wide, default=None),
            _ranges((loop.function, loop.instructions) for loop in loops),
            _ranges((loop.function, round(loop.issue_ratio, 2)) for loop in multiplying),
            round(max(b.seconds for b in same), 1),
        )


def _ranges(values: Iterable[tuple[str, float]]) -> dict[str, tuple[float, float]]:
    each: dict[str, list[float]] = {}
    for name, value in values:
        each.setdefault(name, []).append(value)
    return {name: (min(found), max(found)) for name, found in each.items()}


def add(folder: Path, group: str, table: list[Row]) -> None:
    """Put a group into triton-VERSION.json and triton-VERSION.md, in place of what was known of it;
    the other groups stay, each with the commit that it was compiled at."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"triton-{triton.__version__}.json"
    groups: dict[str, Any] = json.loads(path.read_text())["groups"] if path.exists() else {}
    groups[group] = {"commit": _commit(), "rows": [asdict(row) for row in table]}
    order = {name: place for place, name in enumerate(matrix.names())}
    groups = dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))
    path.write_text(json.dumps({"triton": triton.__version__, "groups": groups}, indent=1) + "\n")
    path.with_suffix(".md").write_text("\n".join(_markdown(groups)) + "\n")


def _commit() -> str:
    """The last that changed what compiled code depends on; "-dirty" where files differ from it."""
    last = _git("log", "-1", "--format=%h", "--", *_SOURCES)
    return f"{last}-dirty" if _git("status", "--porcelain", "--", *_SOURCES) else last


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


_SOURCES = [f"fused_inception/{name}" for name in ("kernels", "ops", "tuning", "geometry.py")]
_HEADER = (
    "launch", "kernels", "broken", "registers", "stack", "spills", "shared",
    "tensor cores", "load", "instructions a step", "issue ratio", "seconds",
)  # fmt: skip


def _markdown(groups: dict[str, Any]) -> Iterator[str]:
    kernels = sum(row["kernels"] for group in groups.values() for row in group["rows"])
    broken = sum(row["broken"] for group in groups.values() for row in group["rows"])
    yield f"""# GoogLeNet's kernels, compiled ahead of time with Triton {triton.__version__}

The configurations that the heuristics return at {IMAGE} pixels: {len(groups)} groups of matrix.py,
{kernels} kernels, of which {broken} break a bound.

Each row holds the worst of its kernels: the most registers of a thread, bytes of its stack,
instructions of an inner loop that reach the stack, and bytes of shared memory of a program; all
tensor-core instructions; the narrowest load, in bytes, of tiles of which a thread has 16 bytes or
more; the instructions of one step of each inner loop that was not unrolled, and these per cycle of
sm_90's tensor cores (above 1 instructions bind); the seconds of the longest compilation (few where
it was compiled before)."""
    for name, group in groups.items():
        yield f"\n## {name}, at {group['commit']}\n"
        yield f"| {' | '.join(_HEADER)} |"
        yield f"|{'---|' * len(_HEADER)}"
        for row in (Row(**fields) for fields in group["rows"]):
            cells = (
                row.launch, row.kernels, row.broken, row.registers, row.stack, row.loop_spills,
                row.shared, row.tensor_cores, row.load_bytes or "", _text(row.steps),
                _text(row.issue_ratios), row.seconds,
            )  # fmt: skip
            yield f"| {' | '.join(map(str, cells))} |"


def _text(ranges: dict[str, tuple[float, float]]) -> str:
    each = (
        f"{name.strip('_')} {low if low == high else f'{low}-{high}'}"
        for name, (low, high) in ranges.items()
    )
    return "<br>".join(each)

"""What is counted in compiled kernels, kept in a file of each Triton version, and compared with it.

A kernel is known by what determines its compilation; one whose configuration changed is a new one.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import triton

from tests.compiled.bounds import VECTOR_BYTES, tile_loads
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation, gpu_target
from tests.compiled.table import launch_name

KEEP = "python -m tests.compiled --keep-counts"
FOLDER = Path(__file__).parent / "counts"
# instructions of a step may grow by this much: the assembler orders them anew at any change
MORE_INSTRUCTIONS = 0.02


@dataclass(frozen=True)
class Limits:
    """What programs share on one processor."""

    registers: int
    shared: int  # bytes
    threads: int
    programs: int


# CUDA's programming guide, table of technical specifications; CDNA3's: 4 units of 512 registers
# and 8 wavefronts
PROCESSORS = {
    "sm_80": Limits(65536, 167936, 2048, 32),
    "sm_89": Limits(65536, 102400, 1536, 24),
    "sm_90": Limits(65536, 233472, 2048, 32),
    "sm_100": Limits(65536, 233472, 2048, 32),
    "sm_120": Limits(65536, 102400, 1536, 24),
    "gfx942": Limits(4 * 512 * 64, 65536, 2048, 32),
}
RESERVED = 1024  # bytes of shared memory that CUDA keeps of each program


@dataclass(frozen=True)
class Counts:
    """One compiled kernel."""

    registers: int
    stack: int
    shared: int
    programs: int  # that fit a processor at a time
    load_bytes: int | None  # narrowest load of tiles of which a thread has 16 bytes or more
    # each loop: function, instructions of a step, spills among them, cycles of sm_90's tensor cores
    loops: tuple[tuple[str, int, int, int], ...]


def programs_of(target: str, registers: int, shared: int, num_warps: int) -> int:
    """Programs that a processor holds: of registers in units of a warp, shared memory, threads."""
    limits = PROCESSORS[target]
    warp = gpu_target(target).warp_size
    of_warp = -(-max(registers, 1) * warp // 256) * 256
    own = shared + (RESERVED if gpu_target(target).backend == "cuda" else 0)
    by_memory = limits.shared // own if own else limits.programs
    return min(
        limits.registers // (of_warp * num_warps),
        by_memory,
        limits.threads // (warp * num_warps),
        limits.programs,
    )


def counts_of(build: Build) -> Counts:
    """Of a kernel that compiled."""
    assert build.code is not None
    spec, code = build.spec, build.code
    wide = [width for _, width, n in tile_loads(build) if n >= VECTOR_BYTES]
    return Counts(
        code.registers,
        code.stack,
        build.shared,
        programs_of(spec.target, code.registers, build.shared, spec.num_warps),
        min(wide, default=None),
        tuple(
            (loop.function, loop.instructions, loop.spills, loop.tensor_cycles)
            for loop in code.loops
        ),
    )


def key_of(spec: Specialisation) -> str:
    """The kernel, and a digest of all that determines its compilation."""
    parts = (spec.module, spec.signature, spec.constants, spec.attributes, spec.num_warps)
    return f"{launch_name(spec)} {hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"


def worse(before: Counts, now: Counts) -> Iterator[str]:
    """In what `now` is worse than `before`; nothing if it is as good or better."""
    if now.stack > before.stack:
        yield f"stack {before.stack} -> {now.stack} bytes"
    if now.programs < before.programs:
        yield (
            f"{before.programs} -> {now.programs} programs a processor: registers "
            f"{before.registers} -> {now.registers}, shared {before.shared} -> {now.shared}"
        )
    if (now.load_bytes or VECTOR_BYTES) < (before.load_bytes or 0):
        yield f"loads of {before.load_bytes} -> {now.load_bytes} bytes"
    old, new = _steps(before), _steps(now)
    if [(name, cycles) for name, _, _, cycles in old] != [
        (name, cycles) for name, _, _, cycles in new
    ]:
        yield f"other loops: {_text(old)} -> {_text(new)}"
        return
    for (name, were, spilled, _), (_, are, spills, _) in zip(old, new, strict=True):
        if are > were * (1 + MORE_INSTRUCTIONS) or spills > spilled:
            yield f"{name}: {were} -> {are} instructions a step, {spilled} -> {spills} spills"


def _steps(counts: Counts) -> list[tuple[str, int, int, int]]:
    return sorted(counts.loops, key=lambda loop: (loop[0], loop[3], loop[1]))


def _text(loops: Iterable[tuple[str, int, int, int]]) -> str:
    return ", ".join(f"{name} {steps} ({cycles} cycles)" for name, steps, _, cycles in loops)


def file_of(group: str) -> Path:
    """Where the counts of a group are, for this Triton."""
    return FOLDER / f"triton-{triton.__version__}" / f"{group}.json"


@functools.cache
def _read(path: Path) -> dict[str, Counts]:
    kept = json.loads(path.read_text())
    return {
        key: Counts(*numbers, loops=tuple(tuple(loop) for loop in loops))
        for key, (*numbers, loops) in kept.items()
    }


def write(group: str, builds: Iterable[Build]) -> None:
    """Keep the counts of a group, one line a kernel, in the order of the fields of `Counts`."""
    path = file_of(group)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"{json.dumps(key_of(b.spec))}: {json.dumps(astuple(counts_of(b)))}"
        for b in builds
        if b.code is not None
    ]
    path.write_text("{\n" + ",\n".join(sorted(lines)) + "\n}\n")


def regressions(group: str, build: Build) -> Iterator[str]:
    """What became worse since the counts of the group were kept; `file_of` has none of other
    versions of Triton."""
    path = file_of(group)
    if build.code is None or not path.exists():
        return
    before = _read(path).get(key_of(build.spec))
    if before is None:
        yield f"no counts are kept of this configuration; {KEEP} {group}"
        return
    for text in worse(before, counts_of(build)):
        yield f"{text}; if it is worth it, {KEEP} {group}"

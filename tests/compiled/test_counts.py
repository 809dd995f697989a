"""Counts that are kept of compiled kernels: what is worse is seen, what is better is not."""

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.compiled import counts, matrix
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.counts import Counts, programs_of, regressions, worse
from tests.compiled.machine_code import Load, Loop, MachineCode

BEFORE = Counts(
    registers=120,
    stack=0,
    shared=98304,
    programs=2,
    load_bytes=16,
    loops=(("convolve", 100, 0, 256), ("convolve", 80, 0, 32)),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stack": 8}, "stack 0 -> 8 bytes"),
        (
            {"programs": 1, "registers": 140},
            "2 -> 1 programs a processor: registers 120 -> 140, shared 98304 -> 98304",
        ),
        ({"load_bytes": 4}, "loads of 16 -> 4 bytes"),
        (
            {"loops": (("convolve", 103, 0, 256), ("convolve", 80, 0, 32))},
            "convolve: 100 -> 103 instructions a step, 0 -> 0 spills",
        ),
        (
            {"loops": (("convolve", 100, 2, 256), ("convolve", 80, 0, 32))},
            "convolve: 100 -> 100 instructions a step, 0 -> 2 spills",
        ),
        (
            {"loops": (("convolve", 80, 0, 32),)},
            "other loops: convolve 80 (32 cycles), convolve 100 (256 cycles)"
            " -> convolve 80 (32 cycles)",
        ),
    ],
)
def test_worse_is_said(change: dict[str, object], said: str) -> None:
    assert list(worse(BEFORE, replace(BEFORE, **change))) == [said]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"registers": 128},
        {"shared": 90000, "programs": 3},
        {"loops": (("convolve", 80, 0, 32), ("convolve", 102, 0, 256))},
        {"loops": (("convolve", 50, 0, 256), ("convolve", 80, 0, 32))},
    ],
)
def test_as_good_or_better_is_not(change: dict[str, object]) -> None:
    assert not list(worse(BEFORE, replace(BEFORE, **change)))  # type: ignore[arg-type]


def test_programs_of_a_processor() -> None:
    # of threads, of registers (168 are 65536 / (168 * 256) of 8 warps), of shared memory
    assert programs_of("sm_90", 16, 0, 8) == 8
    assert programs_of("sm_90", 168, 0, 8) == 1
    assert programs_of("sm_90", 128, 0, 8) == 2
    assert programs_of("sm_90", 32, 98304, 4) == 2
    assert programs_of("sm_89", 32, 98304, 4) == 1
    assert programs_of("gfx942", 128, 0, 4) == 4


def test_a_group_is_held_to_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "FOLDER", tmp_path)
    spec = Specialisation("m", "_k_kernel", "sm_90", (("x_ptr", "*bf16"),), (("B", 64),), (), 4)
    load = Load("file", 1, 1, 16, 16)
    code = MachineCode(64, 0, {}, (load,), (Loop("f", 50, 0, 32),))
    build = Build(spec, 0.0, code=code)
    assert not list(regressions("a group", build))
    counts.write("a group", [build])
    assert not list(regressions("a group", build))
    slower = replace(build, code=replace(code, loops=(Loop("f", 60, 0, 32),)))
    assert list(regressions("a group", slower)) == [
        "f: 50 -> 60 instructions a step, 0 -> 0 spills; if it is worth it, "
        "python -m tests.compiled --keep-counts a group"
    ]
    other = replace(build, spec=replace(spec, constants=(("B", 128),)))
    assert list(regressions("a group", other)) == [
        "no counts are kept of this configuration; python -m tests.compiled --keep-counts a group"
    ]


def test_counts_are_kept_of_groups_that_every_run_compiles() -> None:
    kept = {path.stem for path in counts.FOLDER.glob("*/*.json")}
    assert kept
    assert kept <= matrix.EVERY_RUN.keys()

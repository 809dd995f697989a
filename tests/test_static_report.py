"""The report of compiled kernels: a row a configuration, the padding behind them."""

import pytest

pytest.importorskip("triton")

from benchmarks.static_report import HEAD, markdown, row_of
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import Loop, MachineCode

CONSTANTS = (
    ("N3", 288),
    ("P3", 128),
    ("CO3", 256),
    ("TAIL_3", 32),
    ("C_IN", 144),
    ("NUM_STAGES", 3),
)
SPEC = Specialisation(
    module="m",
    kernel="_branches_kernel",
    target="sm_90",
    signature=(("r_ptr", "*bf16"),),
    constants=CONSTANTS,
    attributes=(),
    num_warps=8,
)


def test_a_row_shows_tiles_and_counts() -> None:
    loops = (Loop("_convolve", 120, 2, 256), Loop("_convolve", 90, 0, 0))
    code = MachineCode(200, 16, {"HGMMA": 4}, loads=(), loops=loops)
    row = row_of("a group", Build(SPEC, 1.0, code=code, shared=98304))
    cells = dict(zip(HEAD, row.cells(), strict=True))
    assert cells["launch"] == "branches"
    assert cells["tiles"] == "P3=128 CO3=256 TAIL_3=32 NUM_STAGES=3"
    assert (cells["registers"], cells["stack"], cells["spills"]) == (200, 16, 2)
    # 200 registers of 256 threads: one program
    assert cells["programs"] == 1
    assert cells["instructions a step / tensor-core cycles"] == "convolve 120/256; convolve 90"
    text = markdown([row])
    assert "| a group | branches | P3=128 CO3=256 TAIL_3=32 NUM_STAGES=3 | 8 | 200 |" in text
    assert "L3 reduces" in text


def test_what_does_not_compile_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="_branches_kernel does not compile: ValueError: no"):
        row_of("a group", Build(SPEC, 1.0, error="ValueError: no"))

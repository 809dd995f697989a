"""The kernels compiled ahead of time for each target: is their machine code within bounds?

Compilation needs a process where kernels are not interpreted: `python -m tests.compiled`.
"""

import ast
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import PARALLEL

pytest.importorskip("triton")

from tests.compiled import matrix, table
from tests.compiled.bounds import violations
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import Load, MachineCode, moved_loads, source_file
from tests.processes import ROOT, run_python

# broken kernel -> what must be said of it
BROKEN = {
    "spills": r"\d+ bytes of stack with 255 registers",
    "shared-memory": r"\d+ bytes of shared memory, sm_90 has 232448",
    "no-hgmma": r"no HGMMA",
    "hmma-beside-hgmma": r"\{'HMMA': \d+\}: a tile is too small for HGMMA$",
    "unaligned-pointers": r"`x_tile = .*` loads 2 bytes at a time, a thread has \d+",
    "odd-pixel-stride": r"`g_tile = .*` loads 2 bytes at a time, a thread has \d+",
    "tile-no-power-of-two": r"does not compile: ValueError: arange's range must be a power of 2",
    "amd-spills": r"\d+ bytes of stack",
    "amd-shared-memory": r"\d+ bytes of shared memory, gfx942 has 65536",
    "amd-unaligned-pointers": r"`x_tile = .*` loads 2 bytes at a time, a thread has \d+",
}


def compile_in_own_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m tests.compiled` without the interpreter."""
    # pytest's own workers share the cores already
    workers = "1" if PARALLEL else str(os.cpu_count())
    return run_python("-m", "tests.compiled", *arguments, "--workers", workers)


@pytest.mark.parametrize("group", matrix.EVERY_RUN)
def test_machine_code_is_within_bounds(group: str) -> None:
    result = compile_in_own_process(group)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert re.search(rf"^{group}: [1-9]\d* kernels", result.stdout, re.MULTILINE), result.stdout


def test_each_bound_is_seen_to_fail() -> None:
    result = compile_in_own_process("broken")
    assert result.returncode == 0, result.stderr
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert said.keys() == BROKEN.keys()
    missed = {
        case: said[case] for case, words in BROKEN.items() if not re.search(words, said[case])
    }
    assert not missed


def test_exact_fp32_must_stay_off_tensor_cores() -> None:
    spec = Specialisation(
        module="",
        kernel="_dgrad_kernel",
        target="sm_90",
        signature=(("dz_ptr", "*fp32"),),
        constants=(("PRECISION", "ieee"),),
        attributes=(),
        num_warps=4,
    )
    for found, broken in (({}, []), ({"HGMMA": 4}, ["exact fp32 on tensor cores: {'HGMMA': 4}"])):
        code = MachineCode(registers=64, stack=0, tensor_cores=found, loads=(), loops=())
        assert violations(Build(spec, 0.0, code=code)) == broken


def test_a_kernel_that_another_checkout_compiled_is_read_from_this_one() -> None:
    # Triton's cache on disk knows a kernel by its source: what it keeps may name a removed folder
    here = str(ROOT / "fused_inception" / "kernels" / "conv.py")
    assert source_file("/removed/checkout/fused_inception/kernels/conv.py") == here
    assert source_file("/elsewhere/triton/language/core.py") == "/elsewhere/triton/language/core.py"
    with pytest.raises(LookupError, match="has no source in line 1"):
        assert Load("/removed/conv.py", 1, instructions=1, narrowest=16, widest=16).text


def test_a_load_whose_assembly_counts_as_lines_is_found_in_its_own() -> None:
    # as Triton 3.8 writes them: line 38, into four registers and into one; a copy; as 3.7 does
    ptx = """
    .loc 2 38 12 // vectors.py:38:12
    // begin inline asm
    .loc\t2 38 12, function_name $L__info_string0, inlined_at 1 133 31 // vectors.py:38:12
    mov.u32 %r2, %r6;
    .loc\t2 39 12, function_name $L__info_string0, inlined_at 1 133 31 // vectors.py:39:12
    mov.u32 %r3, %r6;
    .loc\t2 40 12, function_name $L__info_string0, inlined_at 1 133 31 // vectors.py:40:12
    mov.u32 %r4, %r6;
    .loc\t2 41 12, function_name $L__info_string0, inlined_at 1 133 31 // vectors.py:41:12
    mov.u32 %r5, %r6;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd2 + 0 ];
    // end inline asm
    // begin inline asm
    .loc\t2 38 12, function_name $L__info_string0, inlined_at 1 133 31 // vectors.py:38:12
    mov.u32 %r7, %r6;
    @%p1 ld.global.b32 { %r7 }, [ %rd3 + 0 ];
    // end inline asm
    // begin inline asm
    .loc\t1 91 18
    cp.async.cg.shared.global [ %r410 + 0 ], [ %rd144 + 0 ], 0x10, %r411;
    // end inline asm
    // begin inline asm
    mov.u16 %rs1, 0x0;
    ld.global.v2.b32 { %r8, %r9 }, [ %rd4 + 0 ];
    // end inline asm
    .file\t1 "/removed/checkout/fused_inception/kernels/conv.py"
    .file\t2 "/removed/checkout/fused_inception/kernels/vectors.py"
    """
    vectors = str(ROOT / "fused_inception" / "kernels" / "vectors.py")
    assert moved_loads(ptx) == {(vectors, 41, 16): [38]}


def test_every_kernel_is_compiled() -> None:
    result = compile_in_own_process("list")
    assert result.returncode == 0, result.stderr
    compiled: dict[tuple[str, str], set[str]] = {}
    for line in result.stdout.splitlines():
        name, kernels = line.split(": ", 1)
        group = matrix.EVERY_RUN[name]
        compiled.setdefault((group.target, group.precision), set()).update(kernels.split())
    missing = {kind: every_kernel() - names for kind, names in compiled.items()}
    assert missing == {kind: set() for kind in missing}
    assert len(missing) == 10


def test_results_of_other_groups_stay(tmp_path: Path) -> None:
    """A run of some groups replaces what was known of them alone."""
    spec = Specialisation("", "_pack_kernel", "sm_80", (("x", "*bf16"),), (), (), 4)
    code = MachineCode(registers=32, stack=0, tensor_cores={}, loads=(), loops=())
    for group, stack in (("sm_80-bf16", 0), ("sm_90-fp16", 0), ("sm_80-bf16", 8)):
        build = Build(spec, 0.0, code=replace(code, registers=255, stack=stack))
        table.add(tmp_path, group, list(table.rows("sm_80", "bf16", [build, build])))
    (path,) = tmp_path.glob("*.json")
    groups = json.loads(path.read_text())["groups"]
    # in the order of the matrix
    assert {name: group["rows"][0]["stack"] for name, group in groups.items()} == {
        "sm_90-fp16": 0, "sm_80-bf16": 8,
    }  # fmt: skip
    assert [*groups] == ["sm_90-fp16", "sm_80-bf16"]
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", groups["sm_80-bf16"]["commit"])
    text = path.with_suffix(".md").read_text()
    assert "2 groups of matrix.py,\n4 kernels, of which 2 break a bound." in text
    assert text.index("## sm_90-fp16, at") < text.index("## sm_80-bf16, at")


def every_kernel() -> set[str]:
    """Kernels that are launched: of the @triton.jit functions those whose name says so."""
    return {
        node.name
        for path in (ROOT / "fused_inception" / "kernels").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }

"""compute-sanitizer over small shapes of every kernel."""

import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu.parts import Item, Turn

# memory out of bounds, races in shared memory, wrong barriers. What reads unwritten memory is found
# by tests, which fill it with NaN
TOOLS = ("memcheck", "racecheck", "synccheck")
GROUPS = ("kernels", "modules", "stem")
# memcheck would count what a driver answers to whoever asks for a symbol that it need not have
OPTIONS = {"memcheck": ["--report-api-errors=no"]}
FOUND_SOMETHING = 99
# characters of the beginning and of the end of what a command printed
KEPT = 3000
PLACES = ("/usr/local/cuda*/bin/compute-sanitizer", "/opt/cuda*/bin/compute-sanitizer")


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """The kernels' compilation, then a tool and a group each; one that says so where there is no
    compute-sanitizer."""
    program = find()
    if program is None:
        return [Item("compute-sanitizer", lambda turn: {"found": False, "note": _missing()})]
    compilation = [sys.executable, "-m", "benchmarks.gpu.small_shapes", "--compile", *GROUPS]
    checks = [
        Item(
            f"{tool} {group}", lambda turn, tool=tool, group=group: _run(program, tool, group, turn)
        )
        for tool in TOOLS
        for group in GROUPS
    ]
    return [Item("compile", lambda turn: watched(compilation, {}, turn.end)), *checks]


def find() -> str | None:
    """The program, on the path or where CUDA is usually installed."""
    home = os.environ.get("CUDA_HOME", "")
    places = [os.path.join(home, "bin/compute-sanitizer")] if home else []
    places += [place for pattern in PLACES for place in sorted(glob.glob(pattern))]
    on_path = shutil.which("compute-sanitizer")
    return on_path or next((place for place in places if os.access(place, os.X_OK)), None)


def _missing() -> str:
    text = "compute-sanitizer is not on this machine: nothing was checked by it"
    print(text, flush=True)
    return text


def _run(program: str, tool: str, group: str, turn: Turn) -> dict[str, Any]:
    command = [
        program, f"--tool={tool}", f"--error-exitcode={FOUND_SOMETHING}", *OPTIONS.get(tool, ()),
        sys.executable, "-m", "benchmarks.gpu.small_shapes", group,
    ]  # fmt: skip
    # each tensor is an allocation of its own: a read behind one is then out of bounds
    return watched(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, turn.end)


def watched(command: Sequence[str], variables: dict[str, str], end: float) -> dict[str, Any]:
    """Run a command until `end`, when all that it has started is ended too; a failure is told with
    the first and the last that it printed."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    in_time = True
    try:
        output, _ = process.communicate(timeout=max(1.0, end - time.time()))
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        # the program that a sanitizer runs, and the compilers of a search, are processes of theirs
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if not in_time:
        output, _ = process.communicate()
        return {"complete": False, "tail": output[-KEPT:]}
    facts: dict[str, Any] = {"exit_status": process.returncode, "tail": output[-KEPT:]}
    if process.returncode:
        del facts["tail"]
        facts["failures"] = [f"exit status {process.returncode}:\n{_ends(output)}"]
    return facts


def _ends(text: str) -> str:
    left_out = len(text) - 2 * KEPT
    if left_out <= 0:
        return text
    return f"{text[:KEPT]}\n... {left_out} characters ...\n{text[-KEPT:]}"

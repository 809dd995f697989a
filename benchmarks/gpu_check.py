"""What to run first on a machine with a GPU: are the kernels right there, and how fast are they?

    python -m benchmarks.gpu_check --only parity --budget-s 540 --out results

Every part ends inside its budget and writes what it has, with the environment, to OUT/PART.json.
Exit status: 0 all ran and passed, 1 something failed, 2 it cannot run here, 3 nothing failed but
the time was not enough for all.
"""

import argparse
import json
import os
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import parity
from benchmarks.environment import environment, gpu_facts
from benchmarks.harness import DIRECTIONS, DTYPES, LineUp, Problem, best_device, settings
from benchmarks.providers import PROVIDERS
from benchmarks.results import Row, table, write
from fused_inception.geometry import GOOGLENET

PARTS = ("parity", "modules")
PASSED, FAILED, CANNOT, CUT = 0, 1, 2, 3
# from the end of the last measurement to the end of the process
CLOSING_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, in order; the worst of their exit statuses."""
    options = _parse(arguments)
    # compiled kernels and the library's own choice are what is asked about
    for name in ("TRITON_INTERPRET", "FUSED_INCEPTION_BACKEND"):
        os.environ.pop(name, None)
    device = best_device()
    if device.type != "cuda":
        print(f"gpu_check needs a CUDA GPU; torch {torch.__version__} finds none here, so nothing "
              "was run or measured", file=sys.stderr)  # fmt: skip
        return CANNOT
    wanted = ["triton", *(["pytest"] if "parity" in options.parts else [])]
    if missing := [name for name in wanted if find_spec(name) is None]:
        print(f"gpu_check needs {', '.join(missing)}, which this Python lacks", file=sys.stderr)
        return CANNOT
    if find_spec("pytest_benchmark") is None:
        _say("pytest-benchmark is missing: gpu_check does without, `pytest benchmarks/` needs it")
    head = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.gpu_check", *(arguments or sys.argv[1:])]
        ),
        "environment": environment(device),
    }
    print(json.dumps(head["environment"], indent=1), flush=True)
    # kernels that hang cannot be interrupted, and all that was measured is written by then
    watchdog = threading.Timer(options.budget_s, _give_up)
    watchdog.daemon = True
    watchdog.start()
    start = time.time()
    statuses = []
    for i, part in enumerate(options.parts):
        left = start + options.budget_s - CLOSING_SECONDS - time.time()
        end = time.time() + left / (len(options.parts) - i)
        statuses.append(_run(part, options, device, head, end))
    watchdog.cancel()
    return next((s for s in (FAILED, CUT) if s in statuses), PASSED)


def run_parity(
    head: dict[str, Any], tests: Sequence[str], workers: int, end: float, out: Path
) -> int:
    """The tests that take the device, until `end`, a `time.time()`; OUT/parity.json."""
    start = time.time()
    _say(f"parity: {' '.join(tests)} in {workers} processes")
    summary = parity.run(tests, workers, end, _say)
    seconds = round(time.time() - start, 1)
    write(out / "parity.json", {"part": "parity", **head, "seconds": seconds, **summary})
    for failure in [*summary["failures"], *summary["unreadable"]]:
        _say(f"failed: {failure.get('test', failure.get('file'))}\n{failure['message']}")
    for process in summary.get("processes", []):
        _say(f"a process ended with status {process['status']}:\n{process['tail']}")
    complete = "complete" if summary["complete"] else "incomplete"
    _say(f"parity: {summary['counts']}, {complete}, {seconds} s")
    if summary["failures"] or summary["unreadable"] or "processes" in summary:
        return FAILED
    return PASSED if summary["complete"] else CUT


def run_modules(
    head: dict[str, Any],
    problems: Sequence[Problem],
    providers: Sequence[str],
    seconds: float,
    end: float,
    out: Path,
) -> int:
    """Each direction of the problems, `seconds` a provider, until `end`; OUT/modules.json."""
    start = time.time()
    rows: list[Row] = []
    failures: list[dict[str, Any]] = []
    longest = 0.0
    complete = False
    device = problems[0].device

    def save() -> None:
        facts: dict[str, Any] = {"complete": complete, "seconds": round(time.time() - start, 1)}
        if device.type == "cuda":
            # warm, unlike those of the environment
            facts["gpu_after"] = gpu_facts(device)
        path = out / "modules.json"
        write(path, {"part": "modules", **head, **facts, "failures": failures}, rows)

    for problem in problems:
        began = time.time()
        if began + longest > end:
            _say(f"modules: the time is spent before {problem.module}, batch {problem.batch}")
            break
        measured, failed = _module(problem, providers, seconds)
        rows += measured
        failures += failed
        longest = max(longest, time.time() - began)
        save()
        if measured:
            _say(table(measured))
        for failure in failed:
            _say(f"failed: {failure}")
        if failed and not _usable(device):
            _say("modules: the device does not answer after that failure")
            break
    else:
        complete = True
    save()
    _say(f"modules: {len(rows)} rows, {'complete' if complete else 'incomplete'}")
    if failures:
        return FAILED
    return PASSED if complete else CUT


def _module(
    problem: Problem, providers: Sequence[str], seconds: float
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of one problem, and what failed in it."""
    rows: list[Row] = []
    failures: list[dict[str, Any]] = []
    place = {"module": problem.module, "batch": problem.batch}
    what = "the reference"
    try:
        line_up = LineUp(problem)
        for name in providers:
            what = name
            try:
                line_up.admit(name)
            except Exception as error:
                failures.append({**place, "what": name, "error": _brief(error)})
        for direction in DIRECTIONS:
            what = direction
            timings = line_up.timings(direction, providers, seconds)
            rows += [row for row, _ in timings.values()]
    except Exception as error:
        failures.append({**place, "what": what, "error": _brief(error)})
    if problem.device.type == "cuda" and not failures:
        torch.cuda.empty_cache()
    return rows, failures


def _usable(device: torch.device) -> bool:
    """Whether the device still answers; a kernel's illegal access ends its context."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _run(
    part: str, options: argparse.Namespace, device: torch.device, head: dict[str, Any], end: float
) -> int:
    if part == "parity":
        tests = options.tests or parity.device_tests()
        return run_parity(head, tests, options.workers, end, options.out)
    problems = [
        Problem(module, batch, options.dtype, device)
        for batch in options.batches
        for module in GOOGLENET
    ]
    with settings(options.dtype):
        return run_modules(head, problems, options.providers, options.seconds, end, options.out)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = os.cpu_count() or 1
    add = parser.add_argument
    add("--only", choices=PARTS, help="one part; default: both, the budget shared")
    add("--budget-s", type=float, default=540.0, help="seconds for all (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the JSON files")
    add("--tests", nargs="+", help="parity: test files; default: those with tests of the device")
    add("--workers", type=int, default=max(1, min(8, cores // 2)), help="parity: processes")
    add("--dtype", choices=list(DTYPES), default="bf16", help="modules (default: %(default)s)")
    add("--batches", type=_numbers, default=[256, 32], help="modules: default 256,32")
    add("--providers", type=_providers, default=list(PROVIDERS), help="modules: names with commas")
    add("--seconds", type=float, default=0.5, help="modules: time of a provider and direction")
    options = parser.parse_args(arguments)
    options.parts = [options.only] if options.only else list(PARTS)
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise ValueError
    return numbers


def _providers(text: str) -> list[str]:
    names = text.split(",")
    if set(names) - set(PROVIDERS):
        raise argparse.ArgumentTypeError(f"choose from {', '.join(PROVIDERS)}")
    return names


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:3000]


def _say(text: str) -> None:
    print(text, flush=True)


def _give_up() -> None:
    _say("gpu_check: the budget is spent; what was measured is written, the rest is given up")
    os._exit(CUT)


if __name__ == "__main__":
    sys.exit(main())

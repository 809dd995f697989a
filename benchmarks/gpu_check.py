"""What to run first on a machine with a GPU: are the kernels right there, and how fast are they?

    python -m benchmarks.gpu_check --only parity --budget-s 540 --out results

Every part ends inside its budget and writes what it has, with the environment, to OUT/PART.json. A
second run with the same OUT goes on behind what is there, where environment and options agree.
Exit status: 0 all ran and passed, 1 something failed, 2 it cannot run here, 3 nothing failed but
the time was not enough for all.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.gpu.parts import Part, say
from benchmarks.gpu.record import MismatchError, Record
from benchmarks.gpu.supervisor import supervise
from benchmarks.gpu.table import PARTS
from benchmarks.gpu.timings import FAMILIES
from benchmarks.harness import best_device
from benchmarks.problems import CASES, DTYPES
from benchmarks.providers import PROVIDERS
from fused_inception.tools.sample import sizes

PASSED, FAILED, CANNOT, CUT = 0, 1, 2, 3
# packages beyond Triton, by part
NEEDS = {"parity": "pytest", "tune": "tqdm"}
# from the end of the last measurement to the end of the process
CLOSING_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, in order; the worst of their exit statuses."""
    start = time.time()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    device = best_device()
    if device.type != "cuda":
        print(f"gpu_check needs a CUDA GPU; torch {torch.__version__} finds none here, so nothing "
              "was run or measured", file=sys.stderr)  # fmt: skip
        return CANNOT
    wanted = ["triton", *(name for part, name in NEEDS.items() if part in options.parts)]
    if missing := [name for name in wanted if find_spec(name) is None]:
        print(f"gpu_check needs {', '.join(missing)}, which this Python lacks", file=sys.stderr)
        return CANNOT
    if missing_tools := _missing_tools():
        print(f"gpu_check needs {missing_tools}, by which Triton launches kernels", file=sys.stderr)
        return CANNOT
    if find_spec("pytest_benchmark") is None:
        say("pytest-benchmark is missing: gpu_check does without, `pytest benchmarks/` needs it")
    # compiled kernels and the library's own choice are what is asked about
    for name in ("TRITON_INTERPRET", "FUSED_INCEPTION_BACKEND"):
        os.environ.pop(name, None)
    session = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *arguments]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "environment": environment(device),
    }
    print(json.dumps(session["environment"], indent=1), flush=True)
    statuses = []
    for i, name in enumerate(options.parts):
        left = start + options.budget_s - CLOSING_SECONDS - time.time()
        end = time.time() + left * share_of(options.parts[i:])
        statuses.append(run(PARTS[name], what(name, options), session, end, options.out))
    return next((s for s in (FAILED, CANNOT, CUT) if s in statuses), PASSED)


def _missing_tools() -> str:
    """What Triton's launcher is built with and this machine lacks."""
    compilers = (os.environ.get("CC"), "gcc", "clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    lacking = [] if any(shutil.which(name) for name in compilers if name) else ["a C compiler"]
    lacking += [] if header.exists() else [f"{header} (the package python3-dev)"]
    return " and ".join(lacking)


def share_of(names: Sequence[str]) -> float:
    """Of the time that is left for the parts `names`, that of the first."""
    shares = [PARTS[name].share for name in names]
    return shares[0] / sum(shares)


def run(
    part: Part, options: Mapping[str, Any], session: Mapping[str, Any], end: float, out: Path,
    device: str = "cuda", **command: Sequence[str],
) -> int:  # fmt: skip
    """One part until `end`, a `time.time()`; OUT/PART.json. `device` and the `command` of the
    worker are others in tests."""
    try:
        path = out.resolve() / f"{part.name}.json"
        record = Record.begin(path, part.name, options, dict(session))
    except MismatchError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return CANNOT
    record = supervise(record, end, part.item_seconds, device, say, **command)
    left = "complete" if record.complete else "incomplete: the same command goes on"
    say(f"{part.name}: {len(record.items)} items, {len(record.failures)} failed, {left}")
    if record.failures:
        return FAILED
    return PASSED if record.complete else CUT


def what(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what a part does: a run with others is another run."""
    if part == "parity":
        return {"tests": options.tests, "workers": options.workers}
    if part == "tune":
        arguments = shlex.split(options.tune_arguments)
        searched = {"batches": options.batches, "dtypes": options.dtype}
        return {"tune_arguments": arguments, **searched}
    if part == "profile":
        return {"providers": options.providers}
    if part == "sanitize":
        return {}
    chosen: dict[str, Any] = {"seconds": options.seconds}
    if part != "ceilings":
        chosen |= {"batches": options.batches, "dtypes": options.dtype, "cases": options.cases}
        chosen |= {"families": options.families}
        # measured launches that are in force
        chosen |= {"tables": os.environ.get("FUSED_INCEPTION_CACHE")}
    return chosen


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parts = "".join(f"  {part.name:<10}{part.text}\n" for part in PARTS.values())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=f"{__doc__}\nParts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    cores = os.cpu_count() or 1
    cases = [case for group in CASES.values() for case in group]
    add = parser.add_argument
    add("--only", choices=list(PARTS), help="one part; default: all, the budget shared")
    add("--budget-s", type=float, default=540.0, help="seconds for all (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the JSON files")
    add("--tests", nargs="+", help="parity: test files; default: those with tests of the device")
    add("--workers", type=int, default=max(1, min(14, cores - 2)), help="parity: processes")
    title = "kernels, modules, network; --dtype and --batches also tune"
    timing = parser.add_argument_group(title).add_argument
    timing("--dtype", type=_some(DTYPES), default=["bf16"], help="default: bf16")
    timing("--batches", type=sizes, default=[256, 32, 1, 8, 128], help="default: 256,32,1,8,128")
    timing("--cases", type=_some(cases), help="names with commas; default: all")
    timing("--families", type=_some(FAMILIES), default=list(FAMILIES),
           help="quick: ours, eager; plain: and torch.compile; tuned: max-autotune; others: eager "
           "NCHW, ours with library convolutions; tuned-others: max-autotune's variants; "
           "default: all")  # fmt: skip
    add("--seconds", type=float, default=0.5, help="of a provider and direction, of a ceiling")
    add("--providers", type=_some(PROVIDERS), help="profile: names with commas; default: all")
    add(
        "--tune-arguments",
        default="--model paper",
        help="tune: further ones (%(default)s), of which a --dtype counts more than that above; "
        "its tables are in OUT/tune.json: `python -m benchmarks.gpu.search OUT/tune.json FOLDER` "
        "writes them, and FUSED_INCEPTION_CACHE=FOLDER uses them",
    )
    options = parser.parse_args(arguments)
    options.parts = [options.only] if options.only else list(PARTS)
    return options


def _some(known: Any) -> Any:
    def names(text: str) -> list[str]:
        chosen = text.split(",")
        if set(chosen) - set(known):
            raise argparse.ArgumentTypeError(f"choose from {', '.join(known)}, got {text}")
        return chosen

    return names


if __name__ == "__main__":
    sys.exit(main())

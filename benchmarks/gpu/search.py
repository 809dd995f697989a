"""The search for launches, by the package's own command."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Item, Turn
from benchmarks.gpu.record import MismatchError, Record
from benchmarks.gpu.sanitize import watched
from benchmarks.problems import DTYPES

# imports, and the end of what is being measured
CLOSING_SECONDS = 20.0
# of its budget: a search that took less has nothing left to measure
FINISHED = 0.9
NO_IEEE = "tune searches fp32 as PyTorch's convolutions multiply by default: take tf32"


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """`python -m fused_inception tune`, a dtype, a batch size and a mode each: training, then
    inference."""
    return [
        _item(dtype, batch, mode, options["tune_arguments"])
        for mode in ("", " --eval")
        for dtype in options["dtypes"]
        for batch in options["batches"]
    ]


def _item(dtype: str, batch: int, mode: str, further: list[str]) -> Item:
    key = f"{dtype} batch {batch}{mode}"
    if dtype == "fp32":
        return Item(key, lambda turn: {"failures": [NO_IEEE]})
    name = str(DTYPES[dtype]).removeprefix("torch.")
    arguments = [f"--dtype={name}", *further, f"--batch-size={batch}", *mode.split()]
    return Item(key, lambda turn: run(arguments, turn))


def run(arguments: list[str], turn: Turn) -> dict[str, Any]:
    """It goes on with the tables of the searches before it, and what it leaves stands in its
    results: one file of a part comes home, and a new machine has no other."""
    seconds = int(turn.end - time.time() - CLOSING_SECONDS)
    if seconds < 1:
        return {**_tables_of(turn.previous), "complete": False}
    command = [sys.executable, "-m", "fused_inception", "tune", *arguments]
    start = time.time()
    with tempfile.TemporaryDirectory() as cache:
        write_tables(turn.others, Path(cache))
        variables = {"FUSED_INCEPTION_CACHE": cache}
        facts = watched([*command, f"--budget-s={seconds}"], variables, turn.end)
        paths = sorted(Path(cache).glob("tables/*.json"))
        facts["tables"] = {path.name: json.loads(path.read_text()) for path in paths}
    facts["tables_at"] = time.time()
    if time.time() - start > FINISHED * seconds and not facts.get("failures"):
        facts["complete"] = False
    return facts


def _tables_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("tables", "tables_at") if name in facts}


def write_tables(items: Mapping[str, Mapping[str, Any]], folder: Path) -> list[Path]:
    """The newest tables of a part's items, as `FUSED_INCEPTION_CACHE` of `folder` finds them."""
    newest = max(items.values(), key=lambda facts: facts.get("tables_at", 0.0), default={})
    paths = []
    for name, content in newest.get("tables", {}).items():
        paths.append(folder / "tables" / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text(json.dumps(content, indent=1))
    return paths


def main(arguments: Sequence[str]) -> int:
    """Write the tables that the part "tune" has found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.search")
    parser.add_argument("results", type=Path, help="tune.json of gpu_check")
    parser.add_argument("folder", type=Path, help="FUSED_INCEPTION_CACHE of later runs")
    options = parser.parse_args(arguments)
    try:
        paths = write_tables(Record.read(options.results).items, options.folder)
    except (OSError, MismatchError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if not paths:
        parser.exit(2, f"{parser.prog}: error: {options.results} holds no tables of tune\n")
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

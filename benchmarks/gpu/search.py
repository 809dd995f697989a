"""The search for launches, by the package's own command."""

import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Item, Turn
from benchmarks.gpu.sanitize import watched
from fused_inception.__main__ import COMMANDS

# imports, and the end of what is being measured
CLOSING_SECONDS = 20.0
# of its budget: a search that took less has nothing left to measure
FINISHED = 0.9


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """`python -m fused_inception tune`, a batch size and a mode each: training, then inference."""
    if "tune" not in COMMANDS:
        return [Item("tune", lambda turn: {"failures": ["this checkout has no tune command"]})]
    return [
        _item(f"batch {batch}{mode}", [f"--batch-size={batch}", *mode.split()], options)
        for mode in ("", " --eval")
        for batch in options["batches"]
    ]


def _item(key: str, flags: list[str], options: dict[str, Any]) -> Item:
    arguments = [*options["tune_arguments"], *flags]
    return Item(key, lambda turn: run(arguments, options["cache"], turn))


def run(arguments: list[str], cache: str, turn: Turn) -> dict[str, Any]:
    """Its tables go to a folder in `cache`; the next search goes on with them."""
    seconds = int(turn.end - time.time() - CLOSING_SECONDS)
    if seconds < 1:
        return {"complete": False}
    command = [sys.executable, "-m", "fused_inception", "tune", *arguments]
    start = time.time()
    facts = watched([*command, f"--budget-s={seconds}"], {"FUSED_INCEPTION_CACHE": cache}, turn.end)
    if time.time() - start > FINISHED * seconds and not facts.get("failures"):
        facts["complete"] = False
    return facts | {"tables": [path.name for path in sorted(Path(cache).glob("tables/*.json"))]}

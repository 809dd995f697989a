"""The search for launches, by the package's own command."""

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import Item, Turn
from benchmarks.gpu.sanitize import watched
from fused_inception.__main__ import COMMANDS


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """`python -m fused_inception tune`, which goes on with the table that it has written."""
    return [Item("tune", lambda turn: run(options["tune_arguments"], options["tables"], turn))]


def run(arguments: list[str], tables: str, turn: Turn) -> dict[str, Any]:
    """Its tables go to `tables`, a folder beside the results."""
    if "tune" not in COMMANDS:
        return {"failures": ["this checkout has no tune command"]}
    command = [sys.executable, "-m", "fused_inception", "tune", *arguments]
    facts = watched(command, {"FUSED_INCEPTION_CACHE": tables}, turn.end)
    return facts | {"tables": [path.name for path in sorted(Path(tables).glob("**/*.json"))]}

"""The kernels' tests, compiled, as a part."""

import time
from typing import Any

import torch

from benchmarks import parity
from benchmarks.gpu.parts import Item, Turn, say


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """One, which goes on with the tests that have no outcome yet."""
    tests = options["tests"] or parity.device_tests()
    return [Item("tests", lambda turn: run(tests, options["workers"], turn))]


def run(tests: list[str], workers: int, turn: Turn) -> dict[str, Any]:
    """Outcomes of earlier runs stand."""
    print(f"parity: {' '.join(tests)} in {workers} processes", flush=True)
    outcomes = turn.previous.get("outcomes", {})
    while True:
        summary = parity.run(
            tests, workers, turn.end, outcomes, say, lambda found: turn.keep(_facts(found))
        )
        progress = len(summary["outcomes"]) > len(outcomes)
        outcomes = summary["outcomes"]
        # a test that killed its process is marked, and the others of its share go on behind it
        left = turn.end - time.time() - parity.GRACE_SECONDS
        if summary["complete"] or summary["unreadable"] or not progress or left < 0:
            break
    return _facts(summary)


def _facts(summary: dict[str, Any]) -> dict[str, Any]:
    failures = [f"{e['test']}: {e['message']}" for e in summary["failures"]]
    failures += [f"{e['file']}: {e['message']}" for e in summary["unreadable"]]
    for process in summary.get("processes", []):
        failures.append(f"a process ended with status {process['status']}:\n{process['tail']}")
    return {**summary, "failures": failures}

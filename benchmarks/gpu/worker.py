"""A process that runs the items of one part; `supervisor` starts it, and ends it if it hangs."""

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import gpu_facts
from benchmarks.gpu.parts import Part, Turn, brief, say
from benchmarks.gpu.record import CUT, FAILED, PASSED, Record

COMPLETE, TIME_SPENT, UNUSABLE = 0, 3, 4
ENDED = 128 + signal.SIGTERM
# so much time begins an item, although the longest took more: it keeps what it finds
WORTH_SECONDS = 30.0


def main(parts: Mapping[str, Part], arguments: Sequence[str]) -> int:
    """Run what is left of a part's items.

    Returns:
        COMPLETE, TIME_SPENT, or UNUSABLE: the device no longer answers in this process.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("path", type=Path)
    parser.add_argument("--end", type=float, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args(arguments)
    # an item that is ended ends what it watches, which has a session of its own
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(ENDED))
    record, device = Record.read(options.path), torch.device(options.device)
    session = record.sessions[-1]
    began = time.time()
    longest = 0.0
    status = COMPLETE
    for item in parts[options.part].items(record.options, device):
        if record.done(item.key):
            continue
        start = time.time()
        if start + min(longest, WORTH_SECONDS) > options.end:
            say(f"{record.part}: the time is spent before {item.key}")
            status = TIME_SPENT
            break
        record.at = item.key
        record.save()
        previous = record.items.get(item.key, {})

        def keep(facts: dict[str, Any], key: str = item.key) -> None:
            spent = record.items.get(key, {}).get("spent", 0.0)
            record.put(key, CUT, **facts, spent=spent)

        try:
            facts = item.run(Turn(options.end, keep, previous, record.items))
        except Exception as error:
            # what it had found until then stands
            facts = {k: v for k, v in record.items.get(item.key, {}).items() if k != "status"}
            facts["failures"] = [*facts.get("failures", []), brief(error)]
        longest = max(longest, time.time() - start)
        facts["seconds"] = round(time.time() - start + previous.get("seconds", 0.0), 1)
        state = FAILED if facts.get("failures") else PASSED
        if not facts.get("complete", True):
            state, status = CUT, TIME_SPENT
        record.at = None
        record.put(item.key, state, **facts)
        say(f"{record.part}: {item.key} {state}, {facts['seconds']} s")
        for failure in facts.get("failures", []):
            say(f"  {failure}")
        if state == FAILED and not usable(device):
            status = UNUSABLE
            break
    session["seconds"] = round(session.get("seconds", 0.0) + time.time() - began, 1)
    if device.type == "cuda" and status != UNUSABLE:
        # warm, unlike those of the environment
        session["gpu_after"] = gpu_facts(device)
    record.complete = status == COMPLETE
    record.save()
    return status


def usable(device: torch.device) -> bool:
    """Whether the device still answers; a kernel's illegal access ends its context."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    from benchmarks.gpu.table import PARTS

    sys.exit(main(PARTS, sys.argv[1:]))

"""Starts the process of a part, ends it with its time or when it hangs, and starts it again behind
what killed it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu.record import CUT, DIED, HUNG, Record
from benchmarks.gpu.worker import COMPLETE, TIME_SPENT, UNUSABLE

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
POLL_SECONDS = 0.2
# an item that ends with its time is given so long to say what it has found
GRACE_SECONDS = 5.0
# a process that is ended is given so long to end what has a session of its own
CLOSING_SECONDS = 1.0


def supervise(
    record: Record,
    end: float,
    item_seconds: float,
    device: str,
    say: Callable[[str], None],
    command: Sequence[str] = WORKER,
) -> Record:
    """Run the part of `record` until `end`, a `time.time()`.

    An item that kills its process, or takes longer than `item_seconds` in all its runs, is marked,
    and a new process goes on behind it. What a kernel that hangs holds can only be had back by
    ending its process.
    """
    while time.time() < end - GRACE_SECONDS:
        arguments = [
            record.part,
            str(record.path),
            f"--end={end - GRACE_SECONDS}",
            f"--device={device}",
        ]
        process = subprocess.Popen([*command, *arguments], cwd=ROOT, start_new_session=True)
        verdict, spent = _wait(process, record.path, end, item_seconds)
        record = Record.read(record.path)
        if verdict is None and process.returncode in (COMPLETE, TIME_SPENT):
            break
        if verdict is None and process.returncode == UNUSABLE:
            say(f"{record.part}: the device does not answer any more; a new process goes on")
            continue
        at = record.at
        if at is None:
            if verdict is None:
                say(f"{record.part}: its process ended with status {process.returncode}")
                record.put("the process itself", DIED, failures=[str(process.returncode)])
            break
        facts = {k: v for k, v in record.items.get(at, {}).items() if k != "status"}
        status = verdict or DIED
        facts["spent"] = round(facts.get("spent", 0.0) + spent, 1)
        if status != CUT:
            word = "took too long" if status == HUNG else f"ended it: {process.returncode}"
            facts["failures"] = [*facts.get("failures", []), word]
        record.at = None
        record.put(at, status, **facts)
        say(f"{record.part}: {at} {status}")
        if status == CUT:
            break
    return record


def _wait(
    process: subprocess.Popen[bytes], path: Path, end: float, item_seconds: float
) -> tuple[str | None, float]:
    """Wait for the process; what it was ended for, if it was, and how long its last item ran."""
    at, since, before = None, time.time(), 0.0
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            record = Record.read(path)
            if record.at != at:
                at, since = record.at, time.time()
                before = record.items.get(at or "", {}).get("spent", 0.0)
            spent = time.time() - since
            if at is not None and before + spent > item_seconds:
                return HUNG, spent
            if time.time() > end:
                return CUT, spent
        return None, time.time() - since
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all processes that it has started."""
    if process.poll() is not None:
        return
    try:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CLOSING_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

"""The tests of the kernels, compiled, on the GPU: several pytest processes, one summary."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

# what a test that has begun before the end may still take
GRACE_SECONDS = 20.0
REPORT_SECONDS = 15.0


def device_tests() -> list[str]:
    """The test files of which some test takes the `device` fixture."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(p.relative_to(ROOT)) for p in paths if "device: torch.device" in p.read_text()]


def run(
    tests: Sequence[str], workers: int, end: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run those of `tests` that take the device until `end`, a `time.time()`.

    Returns:
        "complete", "counts" by outcome, "failures" with messages, "unfinished" tests, the
        "slowest", and what the processes printed where one of them did not end as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.jsonl" for i in range(workers)]
        outputs = [Path(folder) / f"{i}.txt" for i in range(workers)]
        processes = [
            _start(tests, f"{i}/{workers}", logs[i], outputs[i], end - GRACE_SECONDS)
            for i in range(workers)
        ]
        try:
            _wait(processes, logs, end, say)
        finally:
            late = [process for process in processes if process.poll() is None]
            for process in late:
                process.kill()
                process.wait()
        statuses = [process.returncode for process in processes]
        summary = summarise([_events(log) for log in logs])
        # 2: the time was spent; 5: no test in this share
        ended = [p in late or p.returncode in (0, 1, 2, 5) for p in processes]
        if not all(ended) or not sum(summary["counts"].values()):
            tails = {i: outputs[i].read_text(errors="replace")[-3000:] for i in range(workers)}
            summary["processes"] = [{"status": statuses[i], "tail": tails[i]} for i in tails]
    return summary


def summarise(shares: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Counts, failures and gaps of the events that the processes wrote."""
    events = [event for share in shares for event in share]
    sizes = [e["tests"] for e in events if e["event"] == "collected"]
    collected = sum(sizes)
    unreadable = [e for e in events if e["event"] == "unreadable"]
    outcomes: dict[str, dict[str, Any]] = {}
    for e in events:
        if e["event"] in ("passed", "failed", "skipped"):
            # a failure in teardown comes behind the test's own outcome, and counts
            outcomes[e["test"]] = e
    started = [e["test"] for e in events if e["event"] == "started"]
    failures = [e for e in outcomes.values() if e["event"] == "failed"]
    counts = Counter(e["event"] for e in outcomes.values())
    slowest = sorted(outcomes.values(), key=lambda e: -e["seconds"])[:10]
    return {
        # a process that never came to know its share counts for one that did not run it
        "complete": 0 < collected == len(outcomes) and len(sizes) == len(shares) and not unreadable,
        "counts": {**counts, "not run": collected - len(outcomes)},
        "failures": [{"test": e["test"], "message": e["message"]} for e in failures],
        "unreadable": [{"file": e["test"], "message": e["message"]} for e in _once(unreadable)],
        "unfinished": [test for test in started if test not in outcomes],
        "slowest": [{"test": e["test"], "seconds": e["seconds"]} for e in slowest],
    }


def _once(unreadable: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every process meets the same unreadable files."""
    return list({e["test"]: e for e in unreadable}.values())


def _start(
    tests: Sequence[str], share: str, log: Path, output: Path, end: float
) -> subprocess.Popen[bytes]:
    own = [f"--parity-log={log}", f"--parity-share={share}", f"--parity-end={end}"]
    plain = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.parity_plugin", *plain, *own]
    with output.open("wb") as file:
        return subprocess.Popen(
            [*command, *tests], cwd=ROOT, env=_environment(), stdout=file, stderr=file
        )


def _environment() -> dict[str, str]:
    """Without what would change which tests run, or how: all options stand in the command."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}


def _wait(
    processes: list[subprocess.Popen[bytes]],
    logs: list[Path],
    end: float,
    say: Callable[[str], None],
) -> None:
    reported = time.time()
    while time.time() < end and any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if time.time() - reported > REPORT_SECONDS:
            reported = time.time()
            say(str(summarise([_events(log) for log in logs])["counts"]))


def _events(log: Path) -> list[dict[str, Any]]:
    """Whole lines alone: the last one is cut where a process was."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]

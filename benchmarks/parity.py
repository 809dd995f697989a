"""The tests of the kernels, compiled, on the GPU: several pytest processes, one summary."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

# what a test that has begun before the end may still take
GRACE_SECONDS = 20.0
REPORT_SECONDS = 15.0
# a test that has run for so long when the time ends is not tried again
HANG_SECONDS = 120.0
# exit status of a process in which the device no longer answers; pytest's own end with 5
FAULTED = 6


def device_tests() -> list[str]:
    """The test files of which some test takes `device` or `on_device`, or has the marker "gpu"."""
    paths = sorted((ROOT / "tests").glob("test_*.py"))
    return [
        str(path.relative_to(ROOT))
        for path in paths
        for text in [path.read_text()]
        if any(sign in text for sign in ("device: torch.device", '"on_device"', "pytest.mark.gpu"))
    ]


def run(
    tests: Sequence[str],
    workers: int,
    end: float,
    before: Mapping[str, dict[str, Any]],
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda summary: None,
) -> dict[str, Any]:
    """Run those of `tests` that take the device, or need a GPU, until `end`, a `time.time()`.

    `before` are the "outcomes" of an earlier run: those tests are not run again. `keep` gets what
    is known every few seconds: this process, too, may be ended.

    Returns:
        "complete", "outcomes" by test, "counts" of them, "failures" with messages, "unfinished"
        tests, the "slowest", the "warnings" with how often each came, and what the processes
        printed where one of them did not end as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.jsonl" for i in range(workers)]
        outputs = [Path(folder) / f"{i}.txt" for i in range(workers)]
        done = Path(folder) / "done.json"
        done.write_text(json.dumps([*before]))
        last = end - GRACE_SECONDS
        processes = [
            _start(tests, f"{i}/{workers}", done, logs[i], outputs[i], last) for i in range(workers)
        ]
        try:
            _wait(processes, end, lambda: keep(_told(logs, before, say)))
        finally:
            late = [process for process in processes if process.poll() is None]
            for process in late:
                process.kill()
                process.wait()
        # 2: the time was spent; 5: no test in this share
        ended = [p in late or p.returncode in (0, 1, 2, 5, FAULTED) for p in processes]
        shares = [_events(log) for log in logs]
        # what a process that died was at would kill the next one, too
        died = [
            test
            for process, good, share in zip(processes, ended, shares, strict=True)
            for test, at in _unfinished(share).items()
            if not good or (process in late and time.time() - at > HANG_SECONDS)
        ]
        summary = summarise(shares, before, died)
        nothing = not sum(summary["counts"].values()) and not before
        if not all(ended) or nothing:
            summary["processes"] = [
                {"status": p.returncode, "tail": o.read_text(errors="replace")[-3000:]}
                for p, o in zip(processes, outputs, strict=True)
            ]
    return summary


def summarise(
    shares: list[list[dict[str, Any]]],
    before: Mapping[str, dict[str, Any]],
    died: Sequence[str] = (),
) -> dict[str, Any]:
    """Counts, failures and gaps of the events that the processes wrote."""
    events = [event for share in shares for event in share]
    sizes = [e["tests"] for e in events if e["event"] == "collected"]
    unreadable = [e for e in events if e["event"] == "unreadable"]
    found: dict[str, dict[str, Any]] = {test: {"outcome": "died", "seconds": 0.0} for test in died}
    for e in events:
        if e["event"] in ("passed", "failed", "skipped"):
            # a failure in teardown comes behind the test's own outcome, and counts
            found[e["test"]] = {"outcome": e["event"], "seconds": e["seconds"]}
            if e["message"] is not None:
                found[e["test"]]["message"] = e["message"]
    outcomes = {**before, **found}
    counts = Counter(o["outcome"] for o in outcomes.values())
    slowest = sorted(outcomes, key=lambda test: -outcomes[test]["seconds"])[:10]
    failed = {test: o for test, o in outcomes.items() if o["outcome"] in ("failed", "died")}
    return {
        # a process that never came to know its share counts for one that did not run it
        "complete": sum(sizes) + len(before) > 0
        and sum(sizes) == len(found)
        and len(sizes) == len(shares)
        and not unreadable,
        "counts": {**counts, "not run": sum(sizes) - len(found)},
        "failures": [
            {"test": test, "message": o.get("message", "its process died")}
            for test, o in failed.items()
        ],
        "unreadable": [{"file": e["test"], "message": e["message"]} for e in _once(unreadable)],
        "unfinished": [t for share in shares for t in _unfinished(share) if t not in died],
        "slowest": [{"test": test, "seconds": outcomes[test]["seconds"]} for test in slowest],
        "warnings": Counter(e["message"] for e in events if e["event"] == "warning"),
        "outcomes": outcomes,
    }


def _unfinished(events: list[dict[str, Any]]) -> dict[str, float]:
    """Tests that began and have no outcome, and when they began."""
    ended = {e["test"] for e in events if e["event"] in ("passed", "failed", "skipped")}
    begun = {e["test"]: e["at"] for e in events if e["event"] == "started"}
    return {test: at for test, at in begun.items() if test not in ended}


def _once(unreadable: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every process meets the same unreadable files."""
    return list({e["test"]: e for e in unreadable}.values())


def _start(
    tests: Sequence[str], share: str, done: Path, log: Path, output: Path, end: float
) -> subprocess.Popen[bytes]:
    own = [f"--parity-log={log}", f"--parity-share={share}", f"--parity-end={end}"]
    own.append(f"--parity-done={done}")
    plain = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # what PyTorch and its libraries warn of on some device is told, and fails no kernel's test
    plain += ["-W", "default"]
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.parity_plugin", *plain, *own]
    with output.open("wb") as file:
        return subprocess.Popen(
            [*command, *tests], cwd=ROOT, env=_environment(), stdout=file, stderr=file
        )


def _environment() -> dict[str, str]:
    """Without what would change which tests run, or how: all options stand in the command. The
    cores are the processes', which compile on one each."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return own | {"OMP_NUM_THREADS": "1"}


def _told(
    logs: list[Path], before: Mapping[str, dict[str, Any]], say: Callable[[str], None]
) -> dict[str, Any]:
    summary = summarise([_events(log) for log in logs], before)
    say(str(summary["counts"]))
    return summary


def _wait(processes: list[subprocess.Popen[bytes]], end: float, report: Callable[[], None]) -> None:
    reported = time.time()
    while time.time() < end and any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if time.time() - reported > REPORT_SECONDS:
            reported = time.time()
            report()


def _events(log: Path) -> list[dict[str, Any]]:
    """Whole lines alone: the last one is cut where a process was."""
    if not log.exists():
        return []
    lines = log.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]

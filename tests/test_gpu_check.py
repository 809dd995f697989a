"""`gpu_check`: every part ends with its time, says what failed, and goes on where it was."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, results
from benchmarks.environment import environment
from benchmarks.gpu import sanitize, small_shapes, supervisor, timings, worker
from benchmarks.gpu.parts import Item, Part, Turn
from benchmarks.gpu.record import MismatchError, Record
from benchmarks.gpu.table import PARTS
from benchmarks.harness import Subject
from benchmarks.problems import CASES
from benchmarks.providers import PROVIDERS
from fused_inception import backend, record_launches
from fused_inception.tools import sources
from tests.conftest import HAS_TRITON

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ENVIRONMENT = {
    "device": "none", "torch": "2", "commit": "abc", "package": "1f", "tests": "2e",
    "gpu": {"driver_version": "1"},
}  # fmt: skip
SESSION = {"command": "a test", "environment": ENVIRONMENT}

# a part whose items do what their names say
WORKER = """
import os, sys, time
from benchmarks.gpu import worker
from benchmarks.gpu.parts import Item, Part
from benchmarks.gpu.sanitize import watched

def run(name, turn):
    if name == "wrong":
        turn.keep({"rows": [1, 2]})
        raise ValueError("it is wrong")
    if name == "dies":
        os._exit(7)
    if name == "hangs":
        turn.keep({"rows": [1]})
        time.sleep(60)
    if name.startswith("watches"):
        return watched(["sh", "-c", f"echo $$ > {name.split()[1]}; exec sleep 60"], {}, turn.end)
    if name == "long":
        time.sleep(2.5)
    if name == "stepwise":
        steps = turn.previous.get("steps", 0) + 1
        return {"steps": steps, "complete": steps == 2}
    return {"value": turn.previous.get("value", 0) + 1}

def items(options, device):
    return [Item(name, lambda turn, name=name: run(name, turn)) for name in options["names"]]

sys.exit(worker.main({"fake": Part("fake", "", items)}, sys.argv[1:]))
"""


def check(
    out: Path, *names: str, seconds: float = 60.0, item_seconds: float = 30.0, **session: Any
) -> tuple[int, dict[str, Any]]:
    """Exit status and content of a fake part's run."""
    part = Part("fake", "", lambda options, device: [], item_seconds)
    command = (sys.executable, "-c", WORKER)
    end = time.time() + seconds
    options = {"names": list(names)}
    status = gpu_check.run(
        part, options, {**SESSION, **session}, end, out, device="cpu", command=command
    )
    assert time.time() < end + 3
    return status, json.loads((out / "fake.json").read_text())


def states(content: dict[str, Any]) -> dict[str, str]:
    return {key: item["status"] for key, item in content["items"].items()}


def test_failures_and_deaths_leave_the_others_alone(tmp_path: Path) -> None:
    status, content = check(tmp_path, "wrong", "dies", "good")
    assert status == gpu_check.FAILED
    assert states(content) == {"wrong": "failed", "dies": "died", "good": "passed"}
    assert content["items"]["wrong"]["failures"] == ["ValueError: it is wrong"]
    assert content["items"]["wrong"]["rows"] == [1, 2]
    assert content["items"]["dies"]["failures"] == ["ended it: 7"]
    assert (content["complete"], content["at"]) == (True, None)
    assert content["sessions"] == [SESSION | {"seconds": content["sessions"][0]["seconds"]}]


def test_an_item_that_hangs_is_ended(tmp_path: Path) -> None:
    """What it had found is kept; the items behind it run."""
    status, content = check(tmp_path, "hangs", "good", item_seconds=1.0)
    assert status == gpu_check.FAILED
    assert states(content) == {"hangs": "hung", "good": "passed"}
    assert content["items"]["hangs"]["rows"] == [1]
    assert content["items"]["hangs"]["failures"] == ["took too long"]


def test_whoever_ends_an_item_ends_what_it_watches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sanitizer, or a search, is in a session of its own, and holds the GPU."""
    file = tmp_path / "pid"
    right, interrupts = time.sleep, [KeyboardInterrupt]

    def sleep(seconds: float) -> None:
        if interrupts and file.exists() and file.read_text():
            raise interrupts.pop()
        right(seconds)

    monkeypatch.setattr(supervisor.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        check(tmp_path, f"watches {file}")
    end = time.time() + 10
    while alive(int(file.read_text())):
        assert time.time() < end
        time.sleep(0.05)


def test_the_time_ends_a_part_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # most of the time is for a busy machine to start the process
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
    status, content = check(tmp_path, "good", "hangs", "other", seconds=14.0)
    assert status == gpu_check.CUT
    assert states(content) == {"good": "passed", "hangs": "cut"}
    assert content["items"]["hangs"]["spent"] > 1
    assert not content["complete"]
    status, content = check(tmp_path, "good", "hangs", "other", item_seconds=1.0)
    assert states(content) == {"good": "passed", "hangs": "hung", "other": "passed"}
    assert content["items"]["good"]["value"] == 1
    assert content["complete"]
    assert len(content["sessions"]) == 2


def test_no_item_is_started_that_would_not_end(tmp_path: Path) -> None:
    """As far as the longest before it tells; an item may also say itself that it is not ready."""
    record = Record.begin(tmp_path / "fake.json", "fake", {"names": ["long", "good"]}, SESSION)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    arguments = ["fake", str(record.path), f"--end={time.time() + 2}", "--device=cpu"]
    # the process takes longer than two seconds to start: "long" starts, nothing behind it
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *arguments], env=environment, check=False, timeout=60
    )
    assert done.returncode == 3
    assert "good" not in Record.read(record.path).items


def test_the_last_seconds_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the first item took: what the next one finds until the end is kept."""
    names = ["compiles", "short", "late"]
    record = Record.begin(tmp_path / "fake.json", "fake", {"names": names}, SESSION)
    clock = [time.time()]
    monkeypatch.setattr(worker.time, "time", lambda: clock[0])
    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)

    def run(seconds: float) -> dict[str, Any]:
        clock[0] += seconds
        return {}

    found = [
        Item(name, lambda turn, seconds=seconds: run(seconds))
        for name, seconds in zip(names, (200.0, 25.0, 1.0), strict=True)
    ]
    end = clock[0] + 250.0
    status = worker.main(
        {"fake": Part("fake", "", lambda options, device: found)},
        ["fake", str(record.path), f"--end={end}", "--device=cpu"],
    )
    assert status == worker.TIME_SPENT
    assert [*Record.read(record.path).items] == ["compiles", "short"]


def test_an_item_that_is_not_ready_goes_on(tmp_path: Path) -> None:
    status, content = check(tmp_path, "stepwise")
    assert (status, states(content)) == (gpu_check.CUT, {"stepwise": "cut"})
    status, content = check(tmp_path, "stepwise")
    assert (status, states(content)) == (gpu_check.PASSED, {"stepwise": "passed"})


def test_results_of_another_run_are_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(tmp_path, "good")
    before = (tmp_path / "fake.json").read_text()
    for change in ({"package": "3d"}, {"gpu": {"driver_version": "2"}}):
        status, _ = check(tmp_path, "good", environment=ENVIRONMENT | change)
        assert status == gpu_check.CANNOT
    assert "package 1f, now 3d" in capsys.readouterr().err
    status, _ = check(tmp_path, "other")
    assert status == gpu_check.CANNOT
    assert "options" in capsys.readouterr().err
    assert (tmp_path / "fake.json").read_text() == before
    (tmp_path / "fake.json").write_text("[]")
    with pytest.raises(MismatchError, match="holds no results of gpu_check"):
        Record.read(tmp_path / "fake.json")


def test_results_go_by_the_code_not_by_its_commit(tmp_path: Path) -> None:
    """A tree without git has no commit, and a changed one the commit of another."""
    session = {"environment": ENVIRONMENT | {"commit": None}}
    other_tests = {"environment": session["environment"] | {"tests": "4c"}}
    for part in ("network", "parity"):
        Record.begin(tmp_path / f"{part}.json", part, {}, SESSION)
        Record.begin(tmp_path / f"{part}.json", part, {}, session)
    Record.begin(tmp_path / "network.json", "network", {}, other_tests)
    with pytest.raises(MismatchError, match="tests 2e, now 4c"):
        Record.begin(tmp_path / "parity.json", "parity", {}, other_tests)


def test_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    found = [sources.digest(tmp_path / "a")]
    for name, text in (("x.py", "1"), ("x.py", "2"), ("y.py", ""), ("notes.txt", "no code")):
        (tmp_path / "a" / name).write_text(text)
        found.append(sources.digest(tmp_path / "a"))
    (tmp_path / "a/y.py").rename(tmp_path / "a/z.py")
    found.append(sources.digest(tmp_path / "a"))
    assert len(set(found)) == len(found) - 1
    assert found[3] == found[4]
    where = environment(CPU)
    assert where["package"] == sources.digest(ROOT / "fused_inception")
    assert all(len(where[name]) == 16 for name in ("package", "tests"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_check_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in PARTS:
        assert gpu_check.main(["--only", part, "--out", str(tmp_path / "out")]) == gpu_check.CANNOT
        assert capsys.readouterr().err.startswith("gpu_check needs a CUDA GPU")
    assert not (tmp_path / "out").exists()


def test_what_a_part_needs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An item that fails for the want of it would not be tried again."""
    monkeypatch.setattr(gpu_check, "best_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    for part, needs in (("parity", "pytest"), ("tune", "tqdm")):
        assert gpu_check.main(["--only", part, "--out", str(tmp_path / "out")]) == gpu_check.CANNOT
        assert f"needs triton, {needs}, which" in capsys.readouterr().err
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_check.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert gpu_check.main(["--only", "network", "--out", str(tmp_path / "out")]) == gpu_check.CANNOT
    header = tmp_path / "Python.h"
    assert f"needs a C compiler and {header} (the" in capsys.readouterr().err
    header.touch()
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: name if name == "gcc" else None)
    assert gpu_check._missing_tools() == ""
    assert not (tmp_path / "out").exists()


def test_every_part_has_its_options() -> None:
    """Results hold what decides them, as JSON; eight files at the most, one for each part."""
    names = ["parity", "sanitize", "ceilings", "kernels", "modules", "network", "tune", "profile"]
    assert sorted(PARTS) == sorted(names)
    options = gpu_check._parse(
        ["--out", "x", "--dtype", "bf16,tf32", "--batches", "1,8", "--families", "plain,tuned"]
    )
    for name in PARTS:
        json.dumps(gpu_check.what(name, options))
    for name in ("kernels", "modules", "network"):
        items = PARTS[name].items(gpu_check.what(name, options), torch.device("cuda"))
        keys = [item.key for item in items]
        assert len(set(keys)) == len(keys)
        cases = sum(len(CASES[group]) for group in CASES if name in (group, "kernels")) - (
            len(CASES["modules"]) + len(CASES["network"]) if name == "kernels" else 0
        )
        assert len(keys) == cases * 2 * 2 * 2


@pytest.mark.parametrize("batches", ["0", "a", "1,"])
def test_wrong_batches(batches: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check._parse(["--out", "x", f"--batches={batches}"])
    message = f"{batches.removeprefix('1,')} is not a whole number of 1 or more\n"
    assert capsys.readouterr().err.endswith(f"argument --batches: {message}")


def test_what_matters_most_is_measured_first() -> None:
    """Tests, then the paper's network at 256, 32 and 1 against eager, compile and max-autotune;
    against eager alone before anything waits for torch.compile."""
    options = gpu_check._parse(["--out", "x"])
    assert options.parts[:2] == ["parity", "network"]
    items = PARTS["network"].items(gpu_check.what("network", options), torch.device("cuda"))
    keys = [item.key for item in items]
    families = ("quick", "plain", "tuned")
    first = [f"paper bf16 batch {n} {f}" for f in families for n in (256, 32, 1)]
    assert keys[: len(first)] == first
    assert keys[len(first)] == "paper bf16 batch 8 quick"
    halves = keys[: len(keys) // 2], keys[len(keys) // 2 :]
    assert [{key.split()[0] for key in half} for half in halves] == [{"paper"}, {"torchvision"}]
    assert {*timings.FAMILIES["plain"], *timings.FAMILIES["tuned"]} == {
        "fused", "eager", "compile", "max-autotune",
    }  # fmt: skip
    plain = {p.plain for p in PROVIDERS.values()}
    assert set().union(*timings.FAMILIES.values()) == plain
    left, times = 100.0, []
    for i in range(len(options.parts)):
        times.append(left * gpu_check.share_of(options.parts[i:]))
        left -= times[-1]
    assert left == pytest.approx(0.0)
    assert times[1] == pytest.approx(4 * times[-1])


def turn(seconds: float, **previous: Any) -> Turn:
    return Turn(time.time() + seconds, lambda facts: None, previous)


def test_timed_rows_of_all_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider that fails is told, and has no row. Training is not run, nor compiled, before the
    rows of inference are kept."""
    options = {"families": ["plain"], "dtypes": ["fp32"], "batches": [1], "cases": ["5b"]}
    (item,) = timings.items_of("modules")(options | {"seconds": 0.01}, CPU)
    assert item.key == "5b fp32 batch 1 plain"
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: 1 / 0)
    log: list[Any] = []
    right = Subject.results

    def results_of(self: Subject, direction: str) -> Any:
        if self.provider.fused:
            log.append(direction)
        return right(self, direction)

    monkeypatch.setattr(Subject, "results", results_of)
    facts = item.run(Turn(time.time() + 60, lambda facts: log.append(len(facts["rows"]))))
    rows = [results.row_of(row) for row in facts["rows"]]
    assert log == ["forward", "forward", 2, "step", "step", 4, 6]
    assert [(r.direction, r.provider) for r in rows] == [
        (direction, provider)
        for direction in ("forward", "backward", "step")
        for provider in ("fused", "eager")
    ]
    assert all(0 < r.p20_s <= r.median_s <= r.p80_s for r in rows)
    assert [f.partition(":")[0] for f in facts["failures"]] == [
        f"compile, {direction}" for direction in ("forward", "backward", "step")
    ]
    assert "ZeroDivisionError" in facts["failures"][0]


# finds nothing as memcheck, and much as any other tool
SANITIZER = """#!/bin/sh
echo $@
[ $1 = --tool=memcheck ] && exit 0
seq 5000
echo raced
exit 99
"""


def test_sanitizer_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(sanitize, "PLACES", ())
    (item,) = sanitize.items({}, CPU)
    facts = item.run(turn(1))
    assert facts["found"] is False
    assert "nothing was checked" in facts["note"]
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    compilation, memory, *_ = items = sanitize.items({}, CPU)
    assert compilation.key == "compile"
    assert len(items) == 1 + len(sanitize.TOOLS) * len(sanitize.GROUPS)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    checked = memory.run(turn(30))
    assert checked["exit_status"] == 0
    # PyTorch and Triton ask for symbols that a driver need not have
    assert "--report-api-errors=no" in checked["tail"].split()
    race = next(item for item in items if item.key == "racecheck kernels")
    (failure,) = race.run(turn(30))["failures"]
    # the first error explains those behind it
    assert failure.startswith("exit status 99:\n--tool=racecheck --error-exitcode=99 ")
    assert failure.endswith("\nraced\n")
    assert len(failure) < 2.1 * sanitize.KEPT
    assert "--report-api-errors" not in failure


def test_what_is_watched_ends_with_all_that_it_started() -> None:
    """A sanitizer's program is a process of its own, and holds the GPU."""
    code = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen(['sleep', '60'], stdout=-3, stderr=-3); "
        "print(child.pid, flush=True); {end}"
    )
    for end, seconds in (("time.sleep(60)", 3.0), ("sys.exit(5)", 60.0)):
        start = time.time()
        facts = sanitize.watched([sys.executable, "-c", code.format(end=end)], {}, start + seconds)
        assert time.time() - start < 30
        if seconds < 60:
            assert facts["complete"] is False
            pid = int(facts["tail"])
        else:
            assert facts["exit_status"] == 5
            pid = int(facts["failures"][0].split()[-1])
        while alive(pid):
            assert time.time() - start < 40
            time.sleep(0.05)


def alive(pid: int) -> bool:
    """Not ended, nor waiting for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
@pytest.mark.usefixtures("launches_do_nothing")
def test_small_shapes_launch_every_kernel() -> None:
    with backend("triton"), record_launches() as launches:
        for group in sanitize.GROUPS:
            for case in small_shapes.cases(group).values():
                small_shapes.exercise(case, torch.bfloat16, CPU)
    kernels = {
        node.name
        for path in (ROOT / "fused_inception/kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert kernels - {launch.kernel for launch in launches} == set()

"""The part "parity" of `gpu_check`: which of the tests it runs, in which order, what it keeps."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parity, parity_plugin
from benchmarks.gpu import correctness
from benchmarks.gpu.parts import Turn
from tests.test_gpu_check import ROOT, turn

PARITY_TESTS = """
import os
import pytest

@pytest.fixture
def device(): ...

def test_right(device): ...

def test_wrong(device):
    assert 1 == 2

def test_without_device():
    assert 1 == 3

def test_dies(device):
    os._exit(7)

def test_behind_it(device): ...
"""


def some_tests(folder: Path) -> list[str]:
    path = folder / "test_some.py"
    path.write_text(PARITY_TESTS)
    return [str(path)]


def test_warnings_are_told_and_fail_nothing(tmp_path: Path) -> None:
    """What PyTorch says of a device is not known before; the project's own tests end with it."""
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest, warnings\n"
        "@pytest.fixture\n"
        "def device(): ...\n"
        "@pytest.mark.parametrize('i', range(2))\n"
        "def test_warns(device, i): warnings.warn('Plan failed with an error')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    facts = correctness.run([str(path)], 1, turn(90))
    assert (facts["counts"], facts["failures"]) == ({"passed": 2, "not run": 0}, [])
    assert facts["warnings"] == {"UserWarning: Plan failed with an error": 2}


def test_parity_goes_on_behind_what_kills_it(tmp_path: Path) -> None:
    """Failures with their messages; no outcome is measured twice."""
    facts = correctness.run(some_tests(tmp_path), 1, turn(90))
    assert facts["counts"] == {"passed": 2, "failed": 1, "died": 1, "not run": 0}
    assert facts["complete"]
    died, wrong = facts["failures"]
    assert "test_wrong" in wrong
    assert "assert 1 == 2" in wrong
    assert died.endswith("test_dies: its process died")
    outcomes = facts["outcomes"]
    assert {name.partition("::")[2] for name in outcomes} == {
        "test_right", "test_wrong", "test_dies", "test_behind_it",
    }  # fmt: skip
    again = correctness.run(some_tests(tmp_path), 1, turn(60, outcomes=outcomes))
    assert (again["outcomes"], again["complete"]) == (outcomes, True)


FAULTY_TESTS = """
import pytest
import torch
from benchmarks import parity_plugin

faulted = False
torch.cuda.is_initialized = lambda: True
parity_plugin.usable = lambda device: not faulted

@pytest.fixture
def device():
    assert not faulted

def test_right(device): ...

def test_wrong(device):
    assert 1 == 2

def test_faults(device):
    global faulted
    faulted = True
    assert 1 == 3

def test_behind_it(device): ...

def test_last(device): ...
"""


def test_parity_goes_on_in_a_new_process_behind_a_fault(tmp_path: Path) -> None:
    """A kernel's illegal access fails its own test alone; a test that is wrong ends nothing."""
    path = tmp_path / "test_some.py"
    path.write_text(FAULTY_TESTS)
    facts = correctness.run([str(path)], 1, turn(90))
    assert facts["counts"] == {"passed": 3, "failed": 2, "not run": 0}
    assert facts["complete"]
    wrong, faults = facts["failures"]
    assert "test_wrong" in wrong
    assert "test_faults" in faults
    assert "assert 1 == 3" in faults


def test_parity_ends_with_its_time(tmp_path: Path) -> None:
    """After the test that runs when the time is spent."""
    facts = correctness.run(some_tests(tmp_path), 1, turn(parity.GRACE_SECONDS))
    assert facts["counts"] == {"passed": 1, "not run": 3}
    assert (facts["complete"], facts["failures"]) == (False, [])


@pytest.mark.parametrize(
    ("events", "complete"),
    [
        ([{"event": "collected", "tests": 0}], True),
        ([{"event": "collected", "tests": 1}], False),
        ([{"event": "unreadable", "test": "t.py", "message": "no such module"}], False),
        ([], False),
    ],
)
def test_parity_is_complete_where_every_process_ran_its_share(
    events: list[dict[str, Any]], complete: bool
) -> None:
    share = [
        {"event": "collected", "tests": 1},
        {"event": "started", "test": "t", "at": 0.0},
        {"event": "passed", "test": "t", "seconds": 1.0, "message": None},
    ]
    assert parity.summarise([share, events], {})["complete"] is complete


def test_parity_keeps_what_it_has_found_as_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever ends the part in the middle of it loses the test that runs, no more."""
    path = tmp_path / "test_some.py"
    path.write_text(
        "import pytest, time\n"
        "@pytest.fixture\n"
        "def device(): ...\n"
        "def test_wrong(device): assert 1 == 2\n"
        "def test_long(device): time.sleep(2)\n"
    )
    monkeypatch.setattr(parity, "REPORT_SECONDS", 0.5)
    kept: list[dict[str, Any]] = []
    correctness.run([str(path)], 1, Turn(time.time() + 90, kept.append))
    first = next(facts for facts in kept if facts["outcomes"])
    (name,) = first["outcomes"]
    assert name.endswith("::test_wrong")
    assert "assert 1 == 2" in first["failures"][0]


ORDERED_TESTS = """
import pytest
import torch

@pytest.fixture
def device(): ...

{rest}
"""


def test_parity_runs_the_core_first(tmp_path: Path) -> None:
    """bf16 and fp32 of the kernels that every model uses, some of each file in turn; then what only
    a GPU can run; then all others."""
    dtypes = "@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)\n"
    core = dtypes + "def test_a(device, dtype): ...\ndef test_b(device): ...\n"
    # behind as many as are a short core
    many = f"@pytest.mark.parametrize('i', range({parity_plugin.CORE_TESTS - 2}))\n"
    core += many + "def test_m(device, i): ...\ndef test_z(device): ...\n"
    other = "@pytest.mark.gpu\ndef test_gpu(): ...\ndef test_c(device): ...\ndef test_d(): ...\n"
    files = {"test_inception_kernels.py": core, "test_some.py": other, "test_stem_kernels.py": core}
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    for name, rest in files.items():
        (tmp_path / name).write_text(ORDERED_TESTS.format(rest=rest))
    facts = correctness.run([str(tmp_path / name) for name in files], 1, turn(90))
    assert facts["complete"], facts
    kernels = ("inception", "stem")
    found = [
        re.sub(r"test_|_kernels.py|torch.", "", name.split("/")[-1]) for name in facts["outcomes"]
    ]
    assert found == [
        "inception::a[bfloat16]", "stem::a[bfloat16]", "inception::b", "stem::b",
        *[f"{name}::m[{i}]" for i in range(parity_plugin.CORE_TESTS - 2) for name in kernels],
        "some.py::gpu",
        "inception::a[float16]", "some.py::c", "stem::a[float16]", "inception::z", "stem::z",
    ]  # fmt: skip
    assert all((ROOT / "tests" / name).exists() for name in parity_plugin.CORE)


def test_parity_finds_the_tests_of_the_device() -> None:
    found = parity.device_tests()
    assert "tests/test_inception_kernels.py" in found
    assert {"tests/test_gpu.py", "tests/test_graphs.py"} <= {*found}
    assert "tests/test_geometry.py" not in found

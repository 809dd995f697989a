"""The benchmarks' own promises: nothing wrong is timed, every run leaves its numbers behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from benchmarks import gpu_check, parity, results
from benchmarks.harness import DIRECTIONS, LineUp, Problem, Work, Yardstick, in_turn, timed
from benchmarks.providers import PROVIDERS, build
from fused_inception import reference
from fused_inception.geometry import InceptionDims
from tests.torchvision_import import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PROBLEM = Problem("5b", 1, "fp32", CPU)
HEAD = {"command": "a test"}


class Wrong(reference.Inception):
    """An Inception module that is wrong by a thousandth, in training, inference or one gradient."""

    def __init__(self, dims: InceptionDims, where: str) -> None:
        super().__init__(*dims.widths)
        self.where = where
        if where == "gradient":
            self.branch3[1].conv.bias.register_hook(lambda g: g * 1.001)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        now = "training" if torch.is_grad_enabled() else "inference"
        return y * 1.001 if self.where == now else y


def broken(where: str) -> Callable[[InceptionDims], nn.Module]:
    return lambda dims: Wrong(dims, where)


@pytest.fixture(scope="module")
def yardstick() -> Yardstick:
    return Yardstick(PROBLEM)


@pytest.mark.parametrize("name", ["fused", "eager"])
def test_gate_admits_what_is_right(name: str, yardstick: Yardstick) -> None:
    module = build(name, PROBLEM.dims, yardstick.data.filters, yardstick.data.biases)
    assert yardstick.check(name, module) > 0


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("training", "broken, training output: max error"),
        ("inference", "broken, inference output: max error"),
        ("gradient", r"broken, gradient of branch3\.1\.conv\.bias: max error"),
    ],
)
def test_gate_rejects_what_is_wrong(
    where: str, message: str, yardstick: Yardstick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROVIDERS, "broken", broken(where))
    module = build("broken", PROBLEM.dims, yardstick.data.filters, yardstick.data.biases)
    with pytest.raises(AssertionError, match=message):
        yardstick.check("broken", module)


def test_providers_take_turns() -> None:
    """In both orders, each until the slowest has had its time and its rounds."""
    log: list[str] = []
    pieces = {
        "a": Work(None, lambda _: log.append("a")),
        "b": Work(lambda: log.append("prepare"), lambda _: (log.append("b"), time.sleep(0.001))),
    }
    samples = in_turn(pieces, {"a": 2, "b": 1}, CPU, seconds=0.0, min_rounds=3)
    turn = ["prepare", "b"]
    assert log == ["a", "a", *turn, *turn, "a", "a", "a", "a", *turn]
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}
    assert min(samples["b"]) >= 0.001


def test_work_and_traffic_from_geometry() -> None:
    p = Problem("3a", 2, "bf16", CPU)
    # 28x28: the module's multiply-adds of one image are 128,049,152
    assert p.flops("forward") == 2 * 2 * 128_049_152
    assert p.flops("step") == p.flops("forward") + p.flops("backward")
    x, y, weights, biases = 2 * 784 * 192, 2 * 784 * 256, 163_328, 368
    assert p.bytes("forward") == 2 * (x + y + weights + biases)
    assert p.bytes("backward") == 2 * (2 * x + y + 2 * weights + biases)


# a provider that is wrong stands beside those that are right
RUN = """
import sys
import pytest
from benchmarks.providers import PROVIDERS
from tests.test_benchmarks import broken
PROVIDERS["broken"] = broken("training")
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_pytest_run_leaves_numbers_of_what_is_right(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "run.json"
    which = ["-k", "5b and forward", "--batches=1", "--dtype=fp32", "--compile-modules=none"]
    options = ["-q", "--benchmark-max-time=0.01", f"--benchmark-json={out}", *which]
    done = python("-c", RUN, "benchmarks", *options)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "AssertionError: broken, training output: max error" in done.stdout
    assert "(--compile-modules=all)" in done.stdout
    ran = json.loads(out.read_text())["benchmarks"]
    assert [b["extra_info"]["provider"] for b in ran] == ["fused", "eager"]
    for b in ran:
        info = b["extra_info"]
        assert b["group"] == "5b forward, batch 1"
        assert b["stats"]["median"] == pytest.approx(info["median_s"]) != 0
        assert b["stats"]["rounds"] == info["rounds"] >= 5
        assert info["flops"] == PROBLEM.flops("forward")
        assert info["bytes"] == PROBLEM.bytes("forward")
        assert (info["dtype"], info["layout"], info["batch"]) == ("fp32", "channels_last", 1)
        assert info["environment"]["torch"] == torch.__version__
        assert info["environment"]["threads"] >= 1
        assert info["environment"]["device"] == info["device"]
    trimmed = tmp_path / "trimmed.json"
    results.main([str(out), "--out", str(trimmed), "--note", "a test"])
    head, rows = results.read(trimmed)
    assert head["note"] == "a test"
    assert head["environment"]["torch"] == torch.__version__
    assert [row.provider for row in rows] == ["fused", "eager"]
    assert rows[0].median_s == pytest.approx(ran[0]["stats"]["median"], rel=1e-3)


def test_table_compares_with_the_fused_module() -> None:
    facts: dict[str, Any] = dict.fromkeys(results.Row.__dataclass_fields__, 0)
    facts |= {"module": "3a", "batch": 2, "direction": "step"}
    rows = [
        results.Row(**facts | {"provider": "fused", "median_s": 0.002}),
        results.Row(**facts | {"provider": "eager", "median_s": 0.005}),
        results.Row(**facts | {"provider": "eager", "median_s": 0.004, "direction": "forward"}),
    ]
    head, step, forward = (line.split() for line in results.table(rows).splitlines())
    assert head[-2:] == ["fused", "eager"]
    assert step == ["3a", "2", "step", "2.000", "1.00x", "5.000", "2.50x"]
    assert forward == ["3a", "2", "forward", "-", "4.000"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_gpu_check_without_a_gpu(part: str, tmp_path: Path) -> None:
    done = python("-m", "benchmarks.gpu_check", "--only", part, "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check needs a CUDA GPU")
    assert not (tmp_path / "out").exists()


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
"""


def test_parity_summary(tmp_path: Path) -> None:
    """Failures with their messages, and what the process that died was at."""
    tests = tmp_path / "test_some.py"
    tests.write_text(PARITY_TESTS)
    status = gpu_check.run_parity(HEAD, [str(tests)], 1, time.time() + 60, tmp_path)
    assert status == gpu_check.FAILED
    summary = json.loads((tmp_path / "parity.json").read_text())
    assert summary["counts"] == {"passed": 1, "failed": 1, "not run": 1}
    assert not summary["complete"]
    (failure,) = summary["failures"]
    assert failure["test"].endswith("test_wrong")
    assert "assert 1 == 2" in failure["message"]
    assert [test.partition("::")[2] for test in summary["unfinished"]] == ["test_dies"]
    assert summary["processes"][0]["status"] == 7


def test_parity_ends_with_its_time(tmp_path: Path) -> None:
    """After the test that runs when the time is spent; without a failure the status says so."""
    tests = tmp_path / "test_some.py"
    tests.write_text(PARITY_TESTS)
    end = time.time() + parity.GRACE_SECONDS
    assert gpu_check.run_parity(HEAD, [str(tests)], 1, end, tmp_path) == gpu_check.CUT
    summary = json.loads((tmp_path / "parity.json").read_text())
    assert summary["counts"] == {"passed": 1, "not run": 2}


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
        {"event": "started", "test": "t"},
        {"event": "passed", "test": "t", "seconds": 1.0, "message": None},
    ]
    assert parity.summarise([share, events])["complete"] is complete


def test_parity_finds_the_tests_of_the_device() -> None:
    found = parity.device_tests()
    assert "tests/test_inception_kernels.py" in found
    assert "tests/test_geometry.py" not in found


def test_modules_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all directions; a provider that is wrong fails and has none."""
    providers = ["fused", "eager"]

    def run(end: float) -> tuple[int, dict[str, Any], list[results.Row]]:
        status = gpu_check.run_modules(HEAD, [PROBLEM], providers, 0.01, end, tmp_path)
        return status, *results.read(tmp_path / "modules.json")

    status, head, rows = run(time.time() + 60)
    assert (status, head["complete"], head["failures"]) == (gpu_check.PASSED, True, [])
    assert [(r.direction, r.provider) for r in rows] == [
        (direction, provider) for direction in DIRECTIONS for provider in providers
    ]
    assert all(0 < r.p20_s <= r.median_s <= r.p80_s for r in rows)

    monkeypatch.setitem(PROVIDERS, "fused", broken("gradient"))
    status, head, rows = run(time.time() + 60)
    assert status == gpu_check.FAILED
    assert [failure["what"] for failure in head["failures"]] == ["fused"]
    assert {r.provider for r in rows} == {"eager"}


def test_modules_part_ends_with_its_time(tmp_path: Path) -> None:
    status = gpu_check.run_modules(HEAD, [PROBLEM], ["eager"], 0.01, time.time() - 1, tmp_path)
    assert status == gpu_check.CUT
    written = json.loads((tmp_path / "modules.json").read_text())
    assert (written["complete"], written["rows"]) == (False, [])


def test_line_up_times_no_provider_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "broken", broken("inference"))
    line_up = LineUp(PROBLEM)
    for _ in range(2):
        with pytest.raises(AssertionError, match="inference output"):
            line_up.admit("broken")
    timings = line_up.timings("forward", ["broken", "eager"], 0.0, 2)
    assert list(timings) == ["eager"]


def test_torchvision_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run, on a small image; a fused network that is wrong is not timed."""
    pytest.importorskip("pytest_benchmark")
    from benchmarks import bench_torchvision

    import_torchvision("torchvision.models.googlenet")
    monkeypatch.setattr(bench_torchvision, "IMAGE_SIZE", 40)
    pair = bench_torchvision.pair(2, "fp32")
    pieces = {name: pair.work("inference", name) for name in bench_torchvision.PROVIDERS}
    samples = in_turn(pieces, dict.fromkeys(pieces, 1), CPU, 0.0, 2)
    assert bench_torchvision.speedup(samples) > 0
    for name in bench_torchvision.PROVIDERS:
        assert timed(pair.work("step", name), 1, CPU) > 0
    right = fi.MaxPool2d.forward
    monkeypatch.setattr(fi.MaxPool2d, "forward", lambda self, x: 2 * right(self, x))
    with pytest.raises(AssertionError, match="FAILED"):
        bench_torchvision.pair(2, "fp32")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a worker of pytest-xdist says so in the environment
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

"""The host path's benchmark: a part's time is its own, and every operator is launched as on a
GPU."""

import json
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.host_path import PARTS, Clock
from tests.processes import run_python


def test_a_part_does_not_count_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])

    def pass_time(amount: int) -> None:
        now[0] += amount

    clock = Clock()
    inner = clock.wrap("triton", pass_time)

    def outer() -> None:
        pass_time(1)
        inner(10)
        inner(20)
        pass_time(2)

    clock.wrap("run", outer)()
    assert (clock.spent["run"], clock.spent["triton"]) == (3, 30)


def test_operators_launch_without_a_driver(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    result = host_path("--rounds", "1", "--only", "convolution", "max pool", "--out", str(out))
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    launches = {(row["op"], row["direction"]): row["launches"] for row in rows}
    assert launches == {
        # filters are packed anew in training
        ("convolution", "inference"): 1,
        ("convolution", "forward"): 2,
        ("convolution", "backward"): 5,
        ("max pool", "inference"): 1,
        ("max pool", "forward"): 1,
        ("max pool", "backward"): 1,
    }
    assert {row["plain_us"] for row in rows} == {None}
    unit, head = result.stdout.splitlines()[:2]
    assert unit == "us of a call; ours/launch: us of a launch"
    assert head.split() == ["operator", "direction", "launches", "total", *PARTS, "ours/launch",
                            "replayed", "plain"]  # fmt: skip
    for row in rows:
        assert row["parts_us"].keys() == PARTS.keys()
        assert min(row["parts_us"].values()) > 0, row


def test_plain_modules_are_timed_beside_ours(tmp_path: Path) -> None:
    out = tmp_path / "host.json"
    result = host_path("--rounds", "1", "--only", "module with BatchNorm", "--out", str(out))
    assert result.returncode == 0, result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["direction"] for row in rows] == ["inference", "forward", "backward"]
    assert all(row["plain_us"] > 10 for row in rows)


def test_an_unknown_operator_is_named() -> None:
    result = host_path("--only", "convolutions")
    assert result.returncode == 2
    assert "--only takes module, module with BatchNorm, convolution" in result.stderr


def test_a_table_is_printed_though_its_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "host.json")
    result = host_path("--rounds", "1", "--only", "max pool", "--out", out)
    assert result.returncode == 2
    assert "max pool" in result.stdout
    (error,) = result.stderr.splitlines()
    assert f"error: --out {out} cannot be written" in error


def host_path(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "benchmarks.host_path", *arguments)

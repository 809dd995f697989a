"""The part "tune" of `gpu_check`: the searches that it runs, and the tables that come home."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import search
from benchmarks.gpu.parts import Turn
from benchmarks.gpu.record import Record
from tests.test_gpu_check import CPU, SESSION, turn

# a tune command that adds to its table, and says what it was asked
TUNE = """#!/bin/sh
mkdir -p $FUSED_INCEPTION_CACHE/tables
printf '["%s"]' "$(cat $FUSED_INCEPTION_CACHE/tables/sm_90.json | tr -d '"\\n ')$1" \
  > $FUSED_INCEPTION_CACHE/tables/new
mv $FUSED_INCEPTION_CACHE/tables/new $FUSED_INCEPTION_CACHE/tables/sm_90.json
echo $@; exec sleep $SLEEP
"""


def test_tune_runs_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each search goes on with the tables of the one before, which come home in its results."""
    options = {"tune_arguments": ["--model", "paper"], "batches": [8], "dtypes": ["tf32"]}
    program = tmp_path / "python"
    program.write_text(TUNE)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("SLEEP", "0")
    training, inference = search.items(options, CPU)
    first = training.run(turn(search.CLOSING_SECONDS + 30.5))
    command = "-m fused_inception tune --dtype=float32 --model paper --batch-size=8"
    assert first["tail"].endswith(f"{command} --budget-s=30\n")
    assert first["tables"] == {"sm_90.json": ["-m"]}
    assert "complete" not in first
    # a search that has taken all its time has more to do
    monkeypatch.setenv("SLEEP", "1")
    end = time.time() + search.CLOSING_SECONDS + 1.5
    second = inference.run(Turn(end, lambda facts: None, {}, {training.key: first}))
    assert f"{command} --eval --budget-s=1" in second["tail"]
    assert second["complete"] is False
    assert second["tables"] == {"sm_90.json": ["[-m]-m"]}
    # whoever has no time left keeps what it had
    kept = inference.run(turn(search.CLOSING_SECONDS, **second))
    assert kept == {name: second[name] for name in ("tables", "tables_at", "complete")}
    record = Record.begin(tmp_path / "tune.json", "tune", options, dict(SESSION))
    record.put(inference.key, "cut", **second)
    record.put(training.key, "passed", **first)
    assert search.main([str(record.path), str(tmp_path / "cache")]) == 0
    (written,) = capsys.readouterr().out.split()
    assert written == str(tmp_path / "cache/tables/sm_90.json")
    assert json.loads(Path(written).read_text()) == ["[-m]-m"]


def test_results_without_tables_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record.begin(tmp_path / "kernels.json", "kernels", {}, dict(SESSION))
    with pytest.raises(SystemExit) as stopped:
        search.main([str(record.path), str(tmp_path / "cache")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("kernels.json holds no tables of tune\n")


def test_tune_searches_in_every_dtype_that_its_command_has() -> None:
    """In fp32 PyTorch's convolutions, and so what `tune` searches for, are in TF32."""
    arguments = ["--out", "x", "--dtype", "bf16,fp32", "--batches", "1,8"]
    options = gpu_check.what("tune", gpu_check._parse(arguments))
    items = search.items(options, CPU)
    assert [item.key for item in items] == [
        f"{dtype} batch {batch}{mode}"
        for mode in ("", " --eval")
        for dtype in ("bf16", "fp32")
        for batch in (1, 8)
    ]
    (failure,) = items[2].run(turn(1))["failures"]
    assert "take tf32" in failure

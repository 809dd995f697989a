"""A pytest plugin: a share of the tests that run on the device, each outcome written at once."""

import json
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.worker import usable
from benchmarks.parity import FAULTED

# what every model uses: the module's kernels, stem, trunk, pools, BatchNorm
CORE = (
    "test_inception_kernels.py", "test_stem_kernels.py", "test_trunk_kernels.py",
    "test_pooling_kernels.py", "test_batch_norm_kernels.py",
)  # fmt: skip
# of each of these files; all their tests take minutes, most of which compile
CORE_TESTS = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """All are given by `benchmarks.parity`."""
    group = parser.getgroup("parity")
    group.addoption("--parity-log", type=Path, required=True, help="a line of JSON per event")
    group.addoption("--parity-share", default="0/1", help="i/n: every n-th test from the i-th on")
    group.addoption("--parity-done", type=Path, required=True, help="JSON: tests to leave out")
    group.addoption("--parity-end", type=float, required=True, help="time to start no more test")


def pytest_configure(config: pytest.Config) -> None:
    """Start to write."""
    config.pluginmanager.register(_Log(config), "parity-log")


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Some of the core in bf16 and fp32, what only a GPU can run, all others; within each the first
    of every file before the second of any: what is run when the time ends has seen every kernel."""
    seen: Counter[tuple[int, str]] = Counter()
    places: dict[pytest.Item, tuple[int, int]] = {}
    for item in items:
        name = item.path.name
        core = name in CORE and seen[0, name] < CORE_TESTS and torch.float16 not in _dtypes(item)
        rank = 0 if core else 1 if _needs_gpu(item) else 2
        places[item] = rank, seen[rank, name]
        seen[rank, name] += 1
    return sorted(items, key=places.__getitem__)


def _dtypes(item: pytest.Item) -> list[torch.dtype]:
    callspec = getattr(item, "callspec", None)
    params = callspec.params.values() if callspec is not None else ()
    # others may be compared element by element
    return [value for value in params if isinstance(value, torch.dtype)]


def _needs_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def _on_device(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) or _needs_gpu(item)


class _Log:
    def __init__(self, config: pytest.Config) -> None:
        self._file = config.getoption("parity_log").open("w")
        self._first, self._step = map(int, config.getoption("parity_share").split("/"))
        self._done = frozenset(json.loads(config.getoption("parity_done").read_text()))
        self._end = config.getoption("parity_end")

    def _write(self, **event: Any) -> None:
        print(json.dumps(event), file=self._file, flush=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        left = [i for i in items if _on_device(i) and i.nodeid not in self._done]
        share = in_order(left)[self._first :: self._step]
        config.hook.pytest_deselected(items=[item for item in items if item not in share])
        items[:] = share
        self._write(event="collected", tests=len(share))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(
                event="unreadable", test=report.nodeid, message=str(report.longrepr)[-3000:]
            )

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, nodeid: str
    ) -> None:
        text = f"{warning_message.category.__name__}: {warning_message.message}"
        self._write(event="warning", test=nodeid, message=text[:1000])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(event="started", test=nodeid, at=time.time())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = None if report.passed else str(report.longrepr)[-3000:]
            self._write(
                event=report.outcome,
                test=report.nodeid,
                seconds=round(report.duration, 3),
                message=message,
            )
        # an illegal access would fail every later test of this process, too
        if report.failed and torch.cuda.is_initialized() and not usable(torch.device("cuda")):
            os._exit(FAULTED)

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self._end:
            item.session.shouldstop = "the time is spent"

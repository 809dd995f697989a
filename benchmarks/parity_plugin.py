"""A pytest plugin: a share of the tests that run on the device, each outcome written at once."""

import json
import time
from pathlib import Path
from typing import Any

import pytest


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
        on_device = [item for item in items if "device" in getattr(item, "fixturenames", ())]
        on_device = [item for item in on_device if item.nodeid not in self._done]
        share = on_device[self._first :: self._step]
        config.hook.pytest_deselected(items=[item for item in items if item not in share])
        items[:] = share
        self._write(event="collected", tests=len(share))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(
                event="unreadable", test=report.nodeid, message=str(report.longrepr)[-3000:]
            )

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

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.time() > self._end:
            item.session.shouldstop = "the time is spent"

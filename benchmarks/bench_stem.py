"""The stem of the paper's network."""

from typing import Any

import pytest

from benchmarks.suite import MARKS, measure, parametrize

pytestmark = MARKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "stem")


def test_stem(
    benchmark: Any,
    request: pytest.FixtureRequest,
    line_up: Any,
    where: Any,
    problem: Any,
    direction: str,
    provider: str,
) -> None:
    measure(benchmark, request, line_up, where, problem, direction, provider)

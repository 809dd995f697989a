"""Single operators, each beside PyTorch's operators for the same work."""

from typing import Any

import pytest

from benchmarks.suite import MARKS, measure, parametrize

pytestmark = MARKS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, "kernels")


def test_kernels(
    benchmark: Any,
    request: pytest.FixtureRequest,
    line_up: Any,
    where: Any,
    problem: Any,
    direction: str,
    provider: str,
) -> None:
    measure(benchmark, request, line_up, where, problem, direction, provider)

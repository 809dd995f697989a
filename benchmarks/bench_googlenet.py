"""Single operators, the nine modules, the stem and whole networks, each beside all that PyTorch has
for the same work."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import batches, compiled_cases, dtypes, seconds
from benchmarks.harness import LineUp, best_device, settings
from benchmarks.problems import CASES, Problem
from benchmarks.providers import contenders
from benchmarks.replay import replay, replayed_seconds
from benchmarks.results import json_of
from fused_inception.tools.timing import timed

NAMES = ("problem", "direction", "provider")
# third-party warnings of compilers are no failures here
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.benchmark(timer=replayed_seconds),
]
NO_GPU = "needs a CUDA GPU: batches 1 to 256, 16 bits and TF32, torch.compile, CUDA graphs"
# on a CPU; BatchNorm modules differ from the others as 3a-bn does
CPU_CASES = {"modules": [*(case for case in CASES["modules"] if "-bn" not in case), "3a-bn"]}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Problems, directions and providers; the providers of a problem stand side by side.

    Without a GPU what needs one is a case that is skipped.
    """
    group = metafunc.definition.originalname.removeprefix("test_")
    device, config = best_device(), metafunc.config
    cases = [
        pytest.param(p, direction, provider, id=_name(p, direction, provider))
        for case in (CASES[group] if device.type == "cuda" else CPU_CASES.get(group, CASES[group]))
        for dtype in dtypes(config)
        for batch in batches(config)
        for p in [Problem(group, case, batch, dtype, device)]
        for direction in p.directions
        for provider in contenders(group, batch, direction, device)
        if provider != "compile" or device.type == "cuda" or case in compiled_cases(config)
    ]
    if device.type != "cuda":
        skipped = pytest.mark.skip(reason=NO_GPU)
        cases += [
            pytest.param(None, "", "", id=f"{case}-gpu", marks=skipped) for case in CASES[group]
        ]
    metafunc.parametrize(NAMES, cases)


def _name(problem: Problem, direction: str, provider: str) -> str:
    return f"{problem.case}-{direction}-{problem.batch}-{problem.dtype}-{provider}"


def measure(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    line_up: Callable[[Problem], LineUp],
    where: dict[str, Any],
    problem: Problem,
    direction: str,
    provider: str,
) -> None:
    """Time one provider, behind the gate, in turn with all others that were selected."""
    contest = line_up(problem)
    group = f"{problem.group}: {problem.case} {direction}, batch {problem.batch}, {problem.dtype}"
    benchmark.group = group
    work = contest.work(direction, provider)
    if not benchmark.enabled:
        with settings(problem.dtype):
            benchmark(timed, work, 1, problem.device)
        return
    cases = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [case.params for case in cases if case and NAMES[-1] in case.params]
    mine = [p for p in selected if (p.get("problem"), p["direction"]) == (problem, direction)]
    rounds = request.config.getoption("benchmark_min_rounds")
    names = [p["provider"] for p in mine]
    row = contest.timings(direction, names, seconds(request.config), rounds)[provider]
    facts = json_of(row)
    # pytest-benchmark has the samples
    del facts["samples_s"]
    benchmark.extra_info.update(facts, samples_s=[], environment=where)
    with settings(problem.dtype):
        replay(benchmark, row.samples_s, work, problem.device)


# one for each of GROUPS
test_kernels = test_modules = test_stem = test_network = measure

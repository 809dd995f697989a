"""The nine Inception modules, each direction: fused, eager channels last, torch.compile."""

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import batches, compiled_modules, dtype
from benchmarks.environment import environment
from benchmarks.harness import DIRECTIONS, LineUp, Problem, best_device, timed
from benchmarks.providers import PROVIDERS
from benchmarks.replay import replay, replayed_seconds
from fused_inception.geometry import GOOGLENET

# third-party warnings of compilers are no failures here
pytestmark = pytest.mark.filterwarnings("default")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Providers of a group stand side by side."""
    compiled = compiled_modules(metafunc.config)
    cases = [
        pytest.param(
            module, batch, direction, provider, id=f"{module}-{direction}-{batch}-{provider}"
        )
        for module in GOOGLENET
        for batch in batches(metafunc.config)
        for direction in DIRECTIONS
        for provider in PROVIDERS
        if provider != "compile" or module in compiled
    ]
    metafunc.parametrize(("module", "batch", "direction", "provider"), cases)


@pytest.fixture(scope="session")
def where() -> dict[str, object]:
    """The environment, asked once."""
    return environment(best_device())


@pytest.mark.benchmark(timer=replayed_seconds)
def test_module(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    line_up: Callable[[Problem], LineUp],
    where: dict[str, object],
    module: str,
    batch: int,
    direction: str,
    provider: str,
) -> None:
    problem = Problem(module, batch, dtype(request.config), best_device())
    contenders = line_up(problem)
    contenders.admit(provider)
    benchmark.group = f"{module} {direction}, batch {batch}"
    if not benchmark.enabled:
        benchmark(timed, contenders.work(direction, provider), 1, problem.device)
        return
    group = module, batch, direction
    selected = [i for i in request.session.items if getattr(i, "originalname", "") == "test_module"]
    cases = [item.callspec.params for item in selected]  # type: ignore[attr-defined]
    names = [p["provider"] for p in cases if (p["module"], p["batch"], p["direction"]) == group]
    seconds = float(request.config.getoption("benchmark_max_time"))
    rounds = request.config.getoption("benchmark_min_rounds")
    row, samples = contenders.timings(direction, names, seconds, rounds)[provider]
    benchmark.extra_info.update(vars(row), device=str(where["device"]), environment=where)
    replay(benchmark, samples, contenders.work(direction, provider), problem.device)

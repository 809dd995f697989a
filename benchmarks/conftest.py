"""Options of `pytest benchmarks/`, and what of it did not run."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.environment import device_name, environment
from benchmarks.harness import LineUp, best_device
from benchmarks.problems import CASES, DTYPES, Problem

CPU_BATCHES, CUDA_BATCHES = "2", "1,8,32,128,256"
# of a provider and direction; pytest-benchmark's own default is meant for one provider
CPU_SECONDS, CUDA_SECONDS = 0.1, 1.0

# lines that a benchmark wants at the end of the run
NOTES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Defaults depend on the device."""
    group = parser.getgroup("fused_inception")
    group.addoption(
        "--dtype", help=f"some of {','.join(DTYPES)}; default: bf16 on CUDA, fp32 on a CPU"
    )
    group.addoption(
        "--batches", help=f"default: {CUDA_BATCHES} on CUDA, {CPU_BATCHES} on a CPU", metavar="N,N"
    )
    group.addoption(
        "--compile-cases",
        metavar="NAMES",
        help="on a CPU, where compilation takes minutes: cases that torch.compile runs too; all, "
        "none, or names like 3a,5b; default: none",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what cannot run with one sentence."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the benchmarks need pytest-benchmark: pip install pytest-benchmark"
        )
    batches(config)
    dtypes(config)
    compiled_cases(config)


def dtypes(config: pytest.Config) -> list[str]:
    """Keys of DTYPES."""
    default = "bf16" if best_device().type == "cuda" else "fp32"
    names = (config.getoption("dtype") or default).split(",")
    if unknown := set(names) - set(DTYPES):
        raise pytest.UsageError(
            f"--dtype takes some of {','.join(DTYPES)}, got {', '.join(unknown)}"
        )
    return names


def batches(config: pytest.Config) -> list[int]:
    """Batch sizes in the order of the option."""
    default = CUDA_BATCHES if best_device().type == "cuda" else CPU_BATCHES
    text = config.getoption("batches") or default
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise pytest.UsageError(f"--batches takes numbers like 32,256, got {text}")
    return sizes


def compiled_cases(config: pytest.Config) -> list[str]:
    """Names of the cases that torch.compile is measured on, on a CPU."""
    every = [case for group in CASES.values() for case in group]
    text = config.getoption("compile_cases") or "none"
    names = {"all": every, "none": []}.get(text, text.split(","))
    if unknown := set(names) - set(every):
        raise pytest.UsageError(
            f"--compile-cases takes all, none, or names of {', '.join(every)}, "
            f"got {', '.join(sorted(unknown))}"
        )
    return names


def seconds(config: pytest.Config) -> float:
    """Time of a provider and direction: --benchmark-max-time where it is given."""
    given = any("benchmark-max-time" in str(arg) for arg in config.invocation_params.args)
    if given:
        return float(config.getoption("benchmark_max_time"))
    return CUDA_SECONDS if best_device().type == "cuda" else CPU_SECONDS


@pytest.fixture(scope="session")
def where() -> dict[str, Any]:
    """The environment, asked once."""
    return environment(best_device())


@pytest.fixture(scope="session")
def line_up() -> Iterator[Callable[[Problem], LineUp]]:
    """Gives the line-up of a problem; it is kept until another problem comes."""
    held: dict[Problem, LineUp] = {}

    def of(problem: Problem) -> LineUp:
        if problem not in held:
            held.clear()
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()
            held[problem] = LineUp(problem)
        return held[problem]

    yield of
    held.clear()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was measured on what, and what was left out."""
    device = best_device()
    line = terminalreporter.write_line
    kind = f"{device.type}, {torch.get_num_threads()} threads"
    line(f"Measured on {device_name(device)} ({kind}), {','.join(dtypes(config))},")
    line("channels last but for eager-nchw, the providers of a group in turn in one process.")
    for note in NOTES:
        line(note)
    if device.type != "cuda":
        if not compiled_cases(config):
            line("torch.compile was not run (--compile-cases=3a,5b, or all).")
        line("No CUDA device: nothing here says how fast a GPU is.")

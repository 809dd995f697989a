"""Options of `pytest benchmarks/`, and what of it did not run."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.environment import device_name
from benchmarks.harness import DTYPES, LineUp, Problem, best_device, settings
from fused_inception.geometry import GOOGLENET

CPU_BATCHES, CUDA_BATCHES = "2", "32,256"
# C++ compilers take a minute for one module
CPU_COMPILED = "3a,5b"

# lines that a benchmark wants at the end of the run
NOTES: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Defaults depend on the device."""
    group = parser.getgroup("inception modules")
    group.addoption("--dtype", choices=list(DTYPES), help="default: bf16 on CUDA, fp32 on a CPU")
    group.addoption(
        "--batches", help=f"default: {CUDA_BATCHES} on CUDA, {CPU_BATCHES} on a CPU", metavar="N,N"
    )
    group.addoption(
        "--compile-modules",
        metavar="NAMES",
        help=f"modules that torch.compile runs too: all, none, or names like 3a,5b; default: all "
        f"on CUDA, {CPU_COMPILED} on a CPU, where compilation takes minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what cannot run with one sentence."""
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the benchmarks need pytest-benchmark: pip install pytest-benchmark"
        )
    batches(config)
    compiled_modules(config)


def dtype(config: pytest.Config) -> str:
    """Key of DTYPES."""
    return config.getoption("dtype") or ("bf16" if best_device().type == "cuda" else "fp32")


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


def compiled_modules(config: pytest.Config) -> list[str]:
    """Names of the modules that torch.compile is measured on."""
    default = "all" if best_device().type == "cuda" else CPU_COMPILED
    text = config.getoption("compile_modules") or default
    names = {"all": list(GOOGLENET), "none": []}.get(text, text.split(","))
    if unknown := set(names) - set(GOOGLENET):
        raise pytest.UsageError(
            f"--compile-modules takes all, none, or names of {', '.join(GOOGLENET)}, "
            f"got {', '.join(sorted(unknown))}"
        )
    return names


@pytest.fixture(scope="session", autouse=True)
def _settings(pytestconfig: pytest.Config) -> Iterator[None]:
    with settings(dtype(pytestconfig)):
        yield


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
    threads = torch.get_num_threads()
    line(f"Measured on {device_name(device)} ({device.type}, {threads} threads), {dtype(config)},")
    line("channels last, the providers of a group in turn in one process.")
    left_out = [name for name in GOOGLENET if name not in compiled_modules(config)]
    if left_out:
        line(f"torch.compile was not run for {', '.join(left_out)} (--compile-modules=all).")
    for note in NOTES:
        line(note)
    if device.type != "cuda":
        line("No CUDA device: nothing here says how fast a GPU is.")

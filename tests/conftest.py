"""Decides where kernels run: on the GPU if there is one, else in Triton's interpreter."""

import functools
import importlib
import os
import pkgutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    # one thread a worker, for NumPy's libraries too: they read these when they are loaded
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
# launches as the heuristic has them, whatever was measured on this machine; gone with the process
NO_TABLES = tempfile.TemporaryDirectory()
os.environ["FUSED_INCEPTION_CACHE"] = NO_TABLES.name
# deterministic algorithms, which fill uninitialised memory, need it on a GPU
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest  # noqa: E402
import torch  # noqa: E402

from fused_inception.launches import record  # noqa: E402
from fused_inception.tuning import table  # noqa: E402
from fused_inception.tuning.configs import (  # noqa: E402
    FinishConfig,
    MaskConfig,
    NormConfig,
    VectorConfig,
)
from fused_inception.tuning.targets import Target  # noqa: E402
from tests.torchvision_import import import_torchvision  # noqa: E402

_emulated: set[str] = set()
HAS_TRITON = find_spec("triton") is not None

# a target whose compiled kernels run on CPU tensors: EMULATE=sm_90 pytest tests/test_conv2d.py
EMULATED = os.environ.get("EMULATE", "")
if not torch.cuda.is_available() and not EMULATED:
    # Triton reads it when it decorates the first kernel
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED and HAS_TRITON:
    from tests import interpreter_bf16, interpreter_memory, interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()

if PARALLEL:
    torch.set_num_threads(1)


needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
implementations = pytest.mark.parametrize("impl", ["torch", *["triton"] * HAS_TRITON])


@pytest.fixture(scope="session")
def tv() -> ModuleType:
    """torchvision's module of GoogLeNet."""
    return import_torchvision("torchvision.models.googlenet")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session."""
    return torch.device("cpu" if INTERPRETED or EMULATED else "cuda")


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """What a test makes without saying where is made where kernels run."""
    with device:
        yield


@pytest.fixture(scope="session", autouse=True)
def _memory_is_watched() -> Iterator[None]:
    """Every launch of every test."""
    if EMULATED:
        from tests.emulator.launch import emulated

        with emulated(EMULATED) as ran:
            yield
        _emulated.update(ran)
        return
    if not (INTERPRETED and HAS_TRITON):
        yield
        return
    with interpreter_memory.watched():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The kernels that have run as they are compiled for a GPU."""
    for name in sorted(_emulated):
        terminalreporter.write_line(f"emulated: {name}")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported is the same in every run."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _seed_of_a_module() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _scripts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is replayed, as tests change what scripts depend on; those of replays say so."""
    monkeypatch.setattr("fused_inception.ops.replay.DEVICES", frozenset())


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty` and its kin return NaN (or the largest integer): what stays unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _ieee_fp32(request: pytest.FixtureRequest) -> Iterator[None]:
    """fp32 products without TF32 on a GPU, where a test asks for the device: PyTorch's own error is
    the yardstick, and with TF32 the library chooses for itself where to use it.

    The interpreter multiplies exactly anyway, and TF32's tiles are larger.
    """
    if INTERPRETED or "device" not in request.fixturenames:
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Launch tables, shipped and the user's, are read from and written to the returned folder."""
    monkeypatch.setenv(table.ENVIRONMENT_VARIABLE, str(tmp_path / "user"))
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    table.forget()
    yield tmp_path
    table.forget()


@pytest.fixture
def launches_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are recorded, not run: which there are never depends on values."""
    package = importlib.import_module("fused_inception.kernels")

    def note(
        kernel: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any], *, num_warps: int
    ) -> None:
        if 0 not in grid:
            record(getattr(kernel, "fn", kernel).__name__, grid, constants)

    infos = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    # all are imported before one is patched: a later import would take the stub for good
    for module in [importlib.import_module(info.name) for info in infos]:
        if hasattr(module, "run"):
            monkeypatch.setattr(module, "run", note)


@pytest.fixture
def few_large_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small tile as for a large one."""
    if INTERPRETED:
        largest = Target("interpreter", 2**40, 1, 1e40, 1e40, 1, 256 * 256)
        monkeypatch.setattr("fused_inception.ops.problem.target_of", lambda device: largest)
        # two thirds of a whole network's time otherwise
        for name in ("inception_triton", "inception_bn_triton"):
            script = importlib.import_module(f"fused_inception.ops.{name}")
            wide = functools.partial(script.launch_pack, block=2**16)
            monkeypatch.setattr(script, "launch_pack", wide)
        for name in ("inception_bn_triton", "conv2d_bn_triton"):
            monkeypatch.setattr(
                f"fused_inception.ops.{name}.norm_config",
                lambda slots, pixels, target: NormConfig(256, 64, max(256, pixels), 4),
            )
        vectors = VectorConfig(2**12, 4)
        monkeypatch.setattr("fused_inception.ops.pooling_triton.vector_config", lambda *_: vectors)
        monkeypatch.setattr(
            "fused_inception.ops.pooling_triton.masked_pool_config",
            lambda channels, *_: MaskConfig(16, 512, 1024, 4),
        )
        finish = FinishConfig(256, 256, 4)
        monkeypatch.setattr("fused_inception.tuning.heuristic.finish_config", lambda: finish)

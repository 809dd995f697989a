"""torchvision's GoogLeNet as it is and fused by `fuse_`: inference, and a training step.

"eager-nchw" is the network in the layout that torchvision gives it, which `fuse_` replaces; "eager"
the same in channels last, the layout in which the fused one computes.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fused_inception as fi
from benchmarks.conftest import NOTES, batches, dtypes, seconds
from benchmarks.environment import environment
from benchmarks.harness import best_device, settings
from benchmarks.problems import DTYPES, IMAGE_SIZE
from benchmarks.replay import replay, replayed_seconds
from fused_inception.tools.timing import Work, calls_per_round, in_turn, timed
from tests.torchvision_import import import_torchvision

# third-party warnings of compilers are no failures here
pytestmark = pytest.mark.filterwarnings("default")

PROVIDERS = ("fused", "eager", "eager-nchw")
# enough that a median says something on shared processors
MIN_ROUNDS = 40
# what `fuse_` may cost on a CPU, where nothing of ours is compiled: nothing but noise
LEAST_ON_CPU = 0.97
DIRECTIONS = ("inference", "step")
# on a CPU, where a batch size changes nothing about how it is computed
CPU_GATE_IMAGES = 2


@dataclass
class Pair:
    """The models with the same weights, behind the gate, and a batch; channels last but for
    "eager-nchw"."""

    models: dict[str, nn.Module]
    x: Tensor
    labels: Tensor
    amp: torch.dtype | None

    def work(self, direction: str, provider: str) -> Work:
        """One call; a step is forward, loss and backward, without an optimiser."""
        model, step = self.models[provider], direction == "step"
        run = self._step if step else self._inference
        x = self.x.contiguous() if provider == "eager-nchw" else self.x
        return Work(None, lambda _: run(model.train(step), x))

    def _inference(self, model: nn.Module, x: Tensor) -> None:
        with torch.no_grad(), self.autocast():
            model(x)

    def _step(self, model: nn.Module, x: Tensor) -> None:
        with self.autocast():
            loss = sum((F.cross_entropy(y, self.labels) for y in model(x)), torch.zeros(()))
        torch.autograd.grad(loss, [*model.parameters()])

    def autocast(self) -> Any:
        """In the dtype of `--dtype`, where that is a 16-bit one."""
        enabled = self.amp is not None
        return torch.autocast(self.x.device.type, dtype=self.amp, enabled=enabled)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Providers of a group stand side by side."""
    cases = [
        pytest.param(batch, dtype, direction, name, id=f"{direction}-{batch}-{dtype}-{name}")
        for dtype in dtypes(metafunc.config)
        for batch in batches(metafunc.config)
        for direction in DIRECTIONS
        for name in PROVIDERS
    ]
    metafunc.parametrize(("batch", "dtype", "direction", "provider"), cases)


@pytest.fixture(scope="module")
def pair_of() -> Callable[[int, str], Pair]:
    """The pair for a batch and a dtype; one is kept."""
    held: dict[tuple[int, str], Pair] = {}

    def of(batch: int, dtype: str) -> Pair:
        if (batch, dtype) not in held:
            held.clear()
            with settings(dtype):
                held[batch, dtype] = pair(batch, dtype)
        return held[batch, dtype]

    return of


def pair(batch: int, name: str) -> Pair:
    """For images of IMAGE_SIZE; `name` is a key of DTYPES.

    Raises:
        AssertionError: `verify` finds the fused network wrong.
    """
    torch.manual_seed(0)
    device, channels_last = best_device(), torch.channels_last
    theirs = import_torchvision("torchvision.models.googlenet").GoogLeNet(init_weights=False)
    as_it_is = copy.deepcopy(theirs).to(device)
    theirs.to(device, memory_format=channels_last)
    ours = copy.deepcopy(theirs)
    fi.fuse_(ours, strict=True)
    x = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    amp = DTYPES[name] if DTYPES[name] != torch.float32 else None
    x = x.contiguous(memory_format=channels_last)
    both = Pair({"fused": ours, "eager": theirs, "eager-nchw": as_it_is}, x, labels, amp)
    # as they are timed: a GPU's launches depend on the batch size, and inference has its own
    verified = x if device.type == "cuda" else x[:CPU_GATE_IMAGES]
    for training in (True, False):
        with both.autocast(), torch.set_grad_enabled(training):
            print(fi.precompile(ours.train(training), x))
            report = fi.verify(ours, verified, gradients=training)
        assert report.ok, str(report)
    return both


@pytest.mark.benchmark(timer=replayed_seconds)
def test_googlenet(
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    pair_of: Callable[[int, str], Pair],
    samples_of: dict[tuple[int, str, str], dict[str, list[float]]],
    batch: int,
    dtype: str,
    direction: str,
    provider: str,
) -> None:
    """The results carry `speedup` over each; the last lines of the run name it.

    On a CPU the fused network is not slower than the one that `fuse_` replaced, in either layout.
    """
    pair = pair_of(batch, dtype)
    device, work = pair.x.device, pair.work(direction, provider)
    benchmark.group = f"torchvision GoogLeNet, {direction}, batch {batch}, {dtype}"
    with settings(dtype):
        if not benchmark.enabled:
            benchmark(timed, work, 1, device)
            return
        key = batch, dtype, direction
        if key not in samples_of:
            pieces = {name: pair.work(direction, name) for name in PROVIDERS}
            calls = {name: calls_per_round(piece, device) for name, piece in pieces.items()}
            rounds = max(MIN_ROUNDS, request.config.getoption("benchmark_min_rounds"))
            samples_of[key] = in_turn(pieces, calls, device, seconds(request.config), rounds)
            ratios = [f"{n} / fused {speedup(samples_of[key], n):.2f}" for n in PROVIDERS[1:]]
            NOTES.append(f"{benchmark.group}: {', '.join(ratios)}")
        samples = samples_of[key]
        found = {name: speedup(samples, name) for name in PROVIDERS[1:]}
        benchmark.extra_info.update(speedup=found, environment=environment(device))
        replay(benchmark, samples[provider], work, device)
        if provider == "fused" and device.type == "cpu":
            assert min(found.values()) >= LEAST_ON_CPU


@pytest.fixture(scope="module")
def samples_of() -> dict[tuple[int, str, str], dict[str, list[float]]]:
    """What was measured, by batch, dtype and direction."""
    return {}


def speedup(samples: dict[str, list[float]], over: str) -> float:
    """The median, over the rounds, of another's time by fused's."""
    return statistics.median(
        other / fused for other, fused in zip(samples[over], samples["fused"], strict=True)
    )

"""Problems, the gate in front of every timing, and the timing of several providers in turn."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers import build
from benchmarks.results import Row
from fused_inception.geometry import GOOGLENET, InceptionDims, googlenet_sizes
from tests.cases import InceptionCase, InceptionTensors
from tests.tolerances import assert_within

# forward: inference. backward: the gradients of the input and of all parameters, of a forward
# that ran before the clock started. step: forward in training mode and backward, no optimiser
DIRECTIONS = ("forward", "backward", "step")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,  # IEEE products
    "tf32": torch.float32,
}
IMAGE_SIZE = 224
ROUND_SECONDS = 0.02  # a round is about this long: its one synchronisation is below 0.1 % of it
MOST_CALLS = 1000
MOST_GRAPHS = 8  # forwards that a round of backwards keeps
WARM_UP = 3


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Problem:
    """A module of GoogLeNet at its true size, behind an image of 224x224."""

    module: str
    batch: int
    dtype: str
    device: torch.device

    @property
    def dims(self) -> InceptionDims:
        """The module's widths."""
        return GOOGLENET[self.module]

    @property
    def side(self) -> int:
        """Height and width of the map."""
        return googlenet_sizes(IMAGE_SIZE).module(self.module)

    def tensors(self) -> InceptionTensors:
        """Random data, the same at every call: x as behind a ReLU, outputs of deviation 1."""
        case = InceptionCase(self.module, self.dims, self.batch, self.side, self.side)
        return case.tensors(DTYPES[self.dtype], self.device)

    def flops(self, direction: str) -> int:
        """Of the convolutions, 2 for a multiply-add, taps on the padding included."""
        forward = 2 * self.batch * self.dims.multiply_adds(self.side, self.side)
        # each convolution has two gradients, and each costs what the convolution does
        return {"forward": 1, "backward": 2, "step": 3}[direction] * forward

    def bytes(self, direction: str) -> int:
        """Of the operator's inputs and outputs, each once: the least that memory has to move."""
        pixels = self.batch * self.side**2
        x, y = pixels * self.dims.in_channels, pixels * self.dims.out_channels
        parameters = self.dims.weights + self.dims.biases
        elements = {
            "forward": x + parameters + y,
            "backward": y + x + self.dims.weights + x + parameters,
            "step": x + parameters + y + y + x + parameters,
        }
        return elements[direction] * DTYPES[self.dtype].itemsize


@contextmanager
def settings(dtype: str) -> Iterator[None]:
    """cuDNN searches its algorithms; fp32 products are IEEE, or TF32 where `dtype` says so."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark = True
    cudnn.allow_tf32 = matmul.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def all_results(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Both outputs and every gradient by name; `x` requires a gradient."""
    with torch.no_grad():
        inference = module(x)
    y = module(x)
    names = ["x", *(name for name, _ in module.named_parameters())]
    gradients = torch.autograd.grad(y, [x, *module.parameters()], dy)
    named = {f"gradient of {n}": g for n, g in zip(names, gradients, strict=True)}
    return {"inference output": inference, "training output": y.detach(), **named}


class Yardstick:
    """A problem's exact results, in fp64, and PyTorch's own in the problem's dtype."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.data = problem.tensors()
        self.x = self.data.x.requires_grad_()
        self.baseline = all_results(self._eager(self.data), self.x, self.data.dy)
        exact = self.data.to(torch.float64)
        self.want = all_results(self._eager(exact), exact.x.detach().requires_grad_(), exact.dy)

    def _eager(self, data: InceptionTensors) -> nn.Module:
        return build("eager", self.problem.dims, data.filters, data.biases)

    def check(self, name: str, module: nn.Module) -> float:
        """The gate: twice PyTorch's own error for outputs, three times for gradients.

        Returns:
            Seconds of these first calls, in which kernels are compiled.

        Raises:
            AssertionError: something is further from the exact result than that.
        """
        start = now(self.problem.device)
        got = all_results(module, self.x, self.data.dy)
        seconds = now(self.problem.device) - start
        for key, want in self.want.items():
            slack = 3.0 if key.startswith("gradient") else 2.0
            assert_within(f"{name}, {key}", got[key], want, self.baseline[key], slack=slack)
        return seconds


@dataclass(frozen=True)
class Work:
    """What is timed: `run` with what `prepare` returned before the clock started."""

    prepare: Callable[[], Any] | None
    run: Callable[[Any], Any]


def work(direction: str, module: nn.Module, x: Tensor, dy: Tensor) -> Work:
    """One direction of a module; `x` requires a gradient."""
    leaves = [x, *module.parameters()]
    if direction == "backward":
        return Work(lambda: module(x), lambda y: torch.autograd.grad(y, leaves, dy))
    if direction == "step":
        return Work(None, lambda _: torch.autograd.grad(module(x), leaves, dy))

    def inference(_: None) -> None:
        with torch.no_grad():
            module(x)

    return Work(None, inference)


def now(device: torch.device) -> float:
    """Seconds, once all work on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(piece: Work, calls: int, device: torch.device) -> float:
    """Seconds of a call: wall clock over `calls` of them and one synchronisation."""
    states = [piece.prepare() if piece.prepare else None for _ in range(calls)]
    start = now(device)
    while states:
        # a graph is freed when its backward has run, as in training
        piece.run(states.pop())
    return (now(device) - start) / calls


def peak_bytes(piece: Work, device: torch.device) -> int | None:
    """Most device memory that one call needs beyond what was allocated; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed(piece, 1, device)
    return torch.cuda.max_memory_allocated(device) - before


def calls_per_round(piece: Work, device: torch.device) -> int:
    """As many as fill ROUND_SECONDS, as far as memory allows."""
    seconds = min(timed(piece, 1, device) for _ in range(WARM_UP))
    calls = min(MOST_CALLS, math.ceil(ROUND_SECONDS / seconds))
    if piece.prepare:
        calls = min(calls, MOST_GRAPHS)
        if peak := peak_bytes(piece, device):
            free, _ = torch.cuda.mem_get_info(device)
            calls = min(calls, max(1, free // (2 * peak)))
    return calls


def in_turn(
    pieces: dict[str, Work],
    calls: dict[str, int],
    device: torch.device,
    seconds: float,
    min_rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a call, round by round.

    In every round each piece has its turn, the last first in every other one, until each has run
    for `seconds` and `min_rounds`: what disturbs the machine disturbs all alike.
    """
    samples: dict[str, list[float]] = {name: [] for name in pieces}
    spent = dict.fromkeys(pieces, 0.0)
    order = list(pieces)
    while pieces and (min(spent.values()) < seconds or len(samples[order[0]]) < min_rounds):
        for name in order:
            sample = timed(pieces[name], calls[name], device)
            samples[name].append(sample)
            spent[name] += sample * calls[name]
        order.reverse()
    return samples


class LineUp:
    """The providers of one problem; they share their data, and each passes the gate once.

    One line-up at a time: torch.compile forgets what it compiled for another.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.yardstick = Yardstick(problem)
        self._admitted: dict[str, tuple[nn.Module, float] | Exception] = {}
        self._timings: dict[tuple[str, tuple[str, ...]], dict[str, tuple[Row, list[float]]]] = {}

    def admit(self, name: str) -> tuple[nn.Module, float]:
        """The provider's module, behind the gate, and the seconds of its first calls.

        Raises:
            Exception: what building it, running it or the gate raised, at every call.
        """
        if name not in self._admitted:
            data = self.yardstick.data
            if name == "compile":
                # it keeps few graphs of one function, and the modules share theirs
                torch.compiler.reset()
            try:
                module = build(name, self.problem.dims, data.filters, data.biases)
                self._admitted[name] = module, self.yardstick.check(name, module)
            except Exception as error:
                self._admitted[name] = error
        admitted = self._admitted[name]
        if isinstance(admitted, Exception):
            raise admitted
        return admitted

    def work(self, direction: str, name: str) -> Work:
        """One direction of an admitted provider."""
        module, _ = self.admit(name)
        return work(direction, module, self.yardstick.x, self.yardstick.data.dy)

    def timings(
        self, direction: str, names: Sequence[str], seconds: float = 1.0, min_rounds: int = 5
    ) -> dict[str, tuple[Row, list[float]]]:
        """Row and samples of those of `names` that pass the gate, measured in turn, once."""
        key = direction, tuple(names)
        if key not in self._timings:
            pieces = {n: self.work(direction, n) for n in names if self._passes(n)}
            self._timings[key] = self._measure(direction, pieces, seconds, min_rounds)
        return self._timings[key]

    def _passes(self, name: str) -> bool:
        try:
            self.admit(name)
        except Exception:
            return False
        return True

    def _measure(
        self, direction: str, pieces: dict[str, Work], seconds: float, min_rounds: int
    ) -> dict[str, tuple[Row, list[float]]]:
        p = self.problem
        calls = {name: calls_per_round(piece, p.device) for name, piece in pieces.items()}
        timings = {}
        for name, samples in in_turn(pieces, calls, p.device, seconds, min_rounds).items():
            p20, *_, p80 = statistics.quantiles(samples, n=5)
            row = Row(
                module=p.module,
                batch=p.batch,
                direction=direction,
                provider=name,
                dtype=p.dtype,
                layout="channels_last",
                median_s=statistics.median(samples),
                p20_s=p20,
                p80_s=p80,
                rounds=len(samples),
                calls_per_round=calls[name],
                flops=p.flops(direction),
                bytes=p.bytes(direction),
                peak_bytes=peak_bytes(pieces[name], p.device),
                first_calls_s=self.admit(name)[1],
            )
            timings[name] = row, samples
        return timings

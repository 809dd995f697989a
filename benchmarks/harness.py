"""The gate in front of every timing, and the providers of a problem measured in turn."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

import fused_inception as fi
from benchmarks.problems import Problem, loss_of, tensors
from benchmarks.providers import (
    PROVIDERS,
    Provider,
    autotuning_seconds,
    captured,
    compiler_limits,
    laid_out,
    prepared,
)
from benchmarks.results import Row
from fused_inception import reference
from fused_inception.tools.timing import (
    Spread,
    Work,
    calls_per_round,
    cudnn_search,
    in_turn,
    now,
    peak_bytes,
)
from tests.tf32 import Products
from tests.tolerances import assert_within, assert_within_l2

_Key = TypeVar("_Key")
_Made = TypeVar("_Made")


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


class Subject:
    """A provider's module with its input: what is called, and what a call gives."""

    def __init__(self, problem: Problem, provider: Provider, module: nn.Module) -> None:
        self.problem = problem
        self.provider = provider
        self.module = module
        x = problem.x()
        self.x = laid_out(provider, x.detach()).requires_grad_(x.requires_grad)
        self.labels = problem.labels()
        self.dys: list[Tensor] = []  # made when the shapes of the outputs are known

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gradients are taken of, by name."""
        x = {"x": self.x} if self.x.requires_grad else {}
        return {**x, **dict(self.module.named_parameters())}

    def in_mode(self, direction: str) -> "Subject":
        """In eval mode for inference, else in training mode."""
        self.module.train(direction != "forward")
        return self

    def forward(self) -> list[Tensor]:
        """Inference."""
        self._begin()
        with torch.no_grad(), self.provider.in_force():
            return tensors(self.module(self.x))

    def seeded(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """The roots of a backward, and their gradients; a loss has none."""
        with self.provider.in_force():
            outputs = self.module(self.x)
        if self.problem.whole:
            return [loss_of(outputs, self.labels)], None
        outputs = tensors(outputs)
        if not self.dys:
            seeds = self.problem.gradients(outputs)
            self.dys = [laid_out(self.provider, dy) for dy in seeds]
        return outputs, self.dys

    def backward(self, seeded: tuple[list[Tensor], list[Tensor] | None]) -> list[Tensor]:
        """All gradients."""
        roots, seeds = seeded
        with self.provider.in_force():
            return [*roots, *torch.autograd.grad(roots, [*self.leaves.values()], seeds)]

    def step(self) -> list[Tensor]:
        """Forward and backward: the outputs (of a network its loss), and all gradients."""
        self._begin()
        return self.backward(self.seeded())

    @property
    def _own_graphs(self) -> bool:
        """Inductor replays CUDA graphs."""
        return bool((self.provider.inductor or {}).get("triton.cudagraphs"))

    def _begin(self) -> None:
        # Inductor's own graphs ask which results are no longer needed
        if self._own_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def precompile(self, direction: str) -> None:
        """Our kernels, in parallel, as training does; without it they are compiled one by one."""
        if not self.provider.fused or self.x.device.type != "cuda":
            return
        module = self.in_mode(direction).module
        try:
            with self.provider.in_force(), torch.set_grad_enabled(direction != "forward"):
                print(fi.precompile(module, self.x), flush=True)
        except Exception as error:
            print(f"precompile failed, kernels are compiled one by one: {error}", flush=True)

    def named(self, direction: str, results: Sequence[Tensor]) -> dict[str, Tensor]:
        """Results of `forward` or `step` by name."""
        word = "inference" if direction == "forward" else "training"
        names = [f"gradient of {name}" for name in self.leaves] if direction == "step" else []
        count = len(results) - len(names)
        outputs = [f"{word} output" + (f" {i}" if count > 1 else "") for i in range(count)]
        return dict(zip([*outputs, *names], results, strict=True))

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics."""
        buffers = self.module.named_buffers()
        return {name: b.clone() for name, b in buffers if b.is_floating_point()}

    def work(self, direction: str) -> Work:
        """One direction; it has to be in its mode."""
        if direction == "backward":
            return Work(self.seeded, self.backward)
        if direction == "step":
            return Work(None, lambda _: self.step(), allocates=not self._own_graphs)
        return Work(None, lambda _: self.forward(), allocates=not self._own_graphs)

    def results(self, direction: str) -> dict[str, Tensor]:
        """Outputs of inference; of "step" outputs and gradients of training, and what that leaves
        in the running statistics."""
        self.in_mode(direction)
        if direction == "forward":
            return self.named(direction, _copies(self.forward()))
        return self.named(direction, _copies(self.step())) | self.statistics()


def _copies(results: Sequence[Tensor]) -> list[Tensor]:
    # Inductor's own graphs write the next call's results over them
    return [t.detach().clone() for t in results]


def plain(problem: Problem) -> Subject:
    """Plain PyTorch, not yet run."""
    eager = PROVIDERS["eager"]
    return Subject(problem, eager, prepared(eager, problem.module(reference)))


class Yardstick:
    """A problem's exact results, in fp64, and PyTorch's own in the problem's dtype, both from the
    running statistics of `state`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.state = problem.module(reference).state_dict()
        library = plain(problem)
        exact = copy.deepcopy(library)
        exact.module.double()
        exact.x = library.x.detach().double().requires_grad_(library.x.requires_grad)
        self.baselines = [library.results("forward") | library.results("step")]
        exact.dys = [dy.double() for dy in library.dys]
        # fp64 is not timed, and each algorithm that cuDNN would try takes seconds
        with cudnn_search(False):
            self.want = exact.results("forward") | exact.results("step")
        if problem.dtype == "tf32":
            # the library may have chosen IEEE for itself, and is no yardstick for who does not
            with Products():
                cut = plain(problem)
                self.baselines.append(cut.results("forward") | cut.results("step"))

    def check(self, name: str, got: Mapping[str, Tensor]) -> None:
        """The gate: twice PyTorch's own error for outputs and statistics, three times for
        gradients; in the maximum, of networks in L2 and their gradients together. Of TF32 that of
        the library or of operands cut to TF32, whichever is larger.

        Raises:
            AssertionError: something is further from the exact result than that.
        """
        assert_near = assert_within_l2 if self.problem.whole else assert_within
        joined = [key for key in got if self.problem.whole and key.startswith("gradient")]
        for key in got:
            if key in joined:
                continue
            slack = 3.0 if key.startswith("gradient") else 2.0
            want, *baselines = (r[key] for r in (self.want, *self.baselines))
            baseline = _farthest(want, baselines)
            assert_near(f"{name}, {key}", got[key], want, baseline, slack=slack)
        if joined:
            ours, want, *baselines = (
                torch.cat([r[k].reshape(-1) for k in joined])
                for r in (got, self.want, *self.baselines)
            )
            baseline = _farthest(want, baselines)
            assert_near(f"{name}, gradients", ours, want, baseline, slack=3.0)


def _farthest(want: Tensor, baselines: Sequence[Tensor]) -> Tensor:
    return max(baselines, key=lambda baseline: (baseline.double() - want).norm().item())


@dataclass(frozen=True)
class Startup:
    """What the first calls of inference, or of training, take beyond later ones; without what the
    other of the two has compiled or tried before.

    Attributes:
        compile_s: compilation; of eager PyTorch, which compiles nothing, 0.
        tuning_s: trying alternatives: Inductor's templates, by its own count; of eager PyTorch
            cuDNN's search.
    """

    compile_s: float
    tuning_s: float


@dataclass(frozen=True)
class Admitted:
    """A provider that has passed the gate in inference, or in training."""

    subject: Subject
    startup: Startup


def _once(kept: dict[_Key, _Made | Exception], key: _Key, make: Callable[[], _Made]) -> _Made:
    """What `make` has returned or raised at its only call."""
    if key not in kept:
        try:
            kept[key] = make()
        except Exception as error:
            kept[key] = error
    made = kept[key]
    if isinstance(made, Exception):
        raise made
    return made


class LineUp:
    """The providers of one problem; they share their data, and each passes the gates of inference
    and of training once, when a direction needs them: a search that is cut in the second leaves the
    first timed.

    One line-up at a time: torch.compile forgets what it compiled for another.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        with settings(problem.dtype):
            self.yardstick = Yardstick(problem)
        self._subjects: dict[str, Subject | Exception] = {}
        self._admitted: dict[tuple[str, str], Admitted | Exception] = {}
        self._works: dict[tuple[str, str], Work | Exception] = {}
        self._timings: dict[tuple[str, tuple[str, ...]], dict[str, Row]] = {}
        torch.compiler.reset()

    def admit(self, name: str, direction: str) -> Admitted:
        """The provider behind the gate of a direction, that of a backward in a step; a graph's
        provider stands for what it holds.

        Raises:
            Exception: what building it, running it or the gate raised, at every call.
        """
        provider = PROVIDERS[PROVIDERS[name].plain]
        whole = "forward" if direction == "forward" else "step"
        key = provider.name, whole
        return _once(self._admitted, key, lambda: self._gate(provider, whole))

    def _subject(self, provider: Provider) -> Subject:
        library: ModuleType = fi if provider.fused else reference
        module = prepared(provider, self.problem.module(library))
        return Subject(self.problem, provider, module)

    def _restart(self, subject: Subject) -> None:
        # training steps have moved the running statistics that the yardstick began with
        subject.module.load_state_dict(self.yardstick.state)

    def _gate(self, provider: Provider, direction: str) -> Admitted:
        device = self.problem.device
        subject = _once(self._subjects, provider.name, lambda: self._subject(provider))
        self._restart(subject)
        with settings(self.problem.dtype), compiler_limits():
            tuned, start = autotuning_seconds(), now(device)
            subject.precompile(direction)
            got = subject.results(direction)
            middle = now(device)
            tuned = autotuning_seconds() - tuned
            self.yardstick.check(provider.name, got)
            again = now(device)
            subject.results(direction)
            beyond = max(0.0, (middle - start) - (now(device) - again))
        if not provider.fused and not provider.compiled:
            return Admitted(subject, Startup(0.0, beyond))
        tuned = min(tuned, beyond) if provider.compiled else 0.0
        return Admitted(subject, Startup(beyond - tuned, tuned))

    def work(self, direction: str, name: str) -> Work:
        """One direction of an admitted provider; all its works are in the mode of that direction.

        Raises:
            Exception: what admitting it or capturing its graph raised, at every call.
        """
        subject = self.admit(name, direction).subject.in_mode(direction)
        if not PROVIDERS[name].graph:
            return subject.work(direction)
        key = direction, name
        return _once(self._works, key, lambda: self._graph(subject, direction, name))

    def _graph(self, subject: Subject, direction: str, name: str) -> Work:
        self._restart(subject)
        with settings(self.problem.dtype), compiler_limits():
            work, results = captured(subject.work(direction))
        self.yardstick.check(name, subject.named(direction, results))
        return work

    def timings(
        self, direction: str, names: Sequence[str], seconds: float = 1.0, min_rounds: int = 5
    ) -> dict[str, Row]:
        """Rows of those of `names` that pass the gate, measured in turn, once."""
        key = direction, tuple(names)
        if key not in self._timings:
            pieces = {n: self.work(direction, n) for n in names if self._passes(direction, n)}
            with settings(self.problem.dtype), compiler_limits():
                self._timings[key] = self._measure(direction, pieces, seconds, min_rounds)
        return self._timings[key]

    def _passes(self, direction: str, name: str) -> bool:
        try:
            self.work(direction, name)
        except Exception:
            return False
        return True

    def _measure(
        self, direction: str, pieces: dict[str, Work], seconds: float, min_rounds: int
    ) -> dict[str, Row]:
        p = self.problem
        calls = {name: calls_per_round(piece, p.device) for name, piece in pieces.items()}
        rows = {}
        for name, samples in in_turn(pieces, calls, p.device, seconds, min_rounds).items():
            spread = Spread.of(samples)
            startup = self.admit(name, direction).startup
            rows[name] = Row(
                group=p.group,
                case=p.case,
                batch=p.batch,
                direction=direction,
                provider=name,
                dtype=p.dtype,
                layout=PROVIDERS[name].layout,
                median_s=spread.median,
                p20_s=spread.p20,
                p80_s=spread.p80,
                calls_per_round=calls[name],
                flops=p.flops(direction),
                bytes=p.bytes(direction),
                peak_bytes=peak_bytes(pieces[name], p.device),
                compile_s=startup.compile_s,
                tuning_s=startup.tuning_s,
                samples_s=samples,
                beside=[*pieces],
            )
        return rows

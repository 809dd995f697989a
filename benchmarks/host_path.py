"""What a call costs on the host: the Triton path on a CPU, where launches end before the driver.

Nothing is compiled or computed. Tensors lie in host memory; launches are found in their memory, or
by Triton, as for a GPU, with a stub where the compiled kernel would be. Left out are the driver's
own launch and CUDA's allocator. Beside it stands what plain PyTorch takes for the layers of
modules on the CPU, in fp32, 8 channels wide, where to compute is next to nothing.

Totals are processor time of the calling thread; parts are timed in rounds of their own by clocks
that make their sum larger. Of all rounds the fastest counts: what else the machine does only adds.
"""

import argparse
import functools
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

import fused_inception as fi
from benchmarks.environment import environment
from benchmarks.results import write_or_exit
from fused_inception import kernels, ops, reference, tuning
from fused_inception.geometry import GOOGLENET
from fused_inception.ops import replay
from fused_inception.tools.options import positive

SIDE = 4  # of the maps: small allocations, which cost what they cost whatever their size
TARGET = "sm_90"
CALLS = 8  # of a round
# one compiles, one finds that filters are kept, one records
CALLS_UNTIL_REPLAYED = 3
NARROW = (8,) * 7  # the widths of a module whose layers are all but free
# innermost last: the time of a part is without the parts inside it
PARTS = {
    "module": "modules, checks, autograd, operators",
    "script": "scripts and launchers: layouts, grids, constants",
    "config": "look-up of launch configurations",
    "allocation": "torch.empty and its kin",
    "run": "kernels.launch.run",
    "triton": "kernels.relaunch.launch: what a launch was compiled for, or Triton's own binding",
}
ALLOCATORS = ("empty", "empty_like", "empty_strided", "zeros", "zeros_like")


@dataclass(frozen=True)
class Row:
    """One direction of one operator; microseconds of a call."""

    op: str
    direction: str
    launches: int
    total_us: float  # of scripts that are run
    parts_us: dict[str, float]
    replayed_us: float  # in all, where they are replayed
    plain_us: float | None = None  # PyTorch's own operators for the same layers

    @property
    def ours_us(self) -> float:
        """Without finding the compiled kernel, of one launch."""
        return (self.total_us - self.parts_us["triton"]) / max(1, self.launches)


class Clock:
    """Time spent in wrapped functions, by part, without that of those that they call."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(PARTS, 0)
        self._inner = 0

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as `part`."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._inner = self._inner, 0
            start = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter_ns() - start
                self.spent[part] += whole - self._inner
                self._inner = outer + whole

        return timed


@contextmanager
def no_driver() -> Iterator[None]:
    """The Triton path runs on CPU tensors, up to where a compiled kernel would be launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fused_inception.kernels import relaunch
    from tests.compiled.collect import StubDriver

    launched = SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=0, packed_metadata=()
    )

    def compiled(self: Any, key: Any, signature: Any, device: Any, *_: Any) -> SimpleNamespace:
        self.device_caches[device][0][key] = launched
        return launched

    # stays active: there is no other driver to return to
    driver.set_active(StubDriver(TARGET))
    with (
        # a plain function: a mock that records its calls takes longer than what it stands for
        mock.patch("fused_inception.backend._interpreter_is_on", lambda: True),  # noqa: PT008
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(relaunch, "DEVICES", frozenset({"cpu"})),
        fi.backend("triton"),
    ):
        yield


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Everything that belongs to a part is timed."""
    from fused_inception.kernels import launch, relaunch

    part_of: dict[int, tuple[str, Any]] = {}

    def belongs(part: str, function: Any) -> None:
        part_of[id(function)] = (part, function)

    belongs("run", launch.run)
    for module in _modules_of(tuning):
        for name, value in vars(module).items():
            if name.endswith("_config") and callable(value):
                belongs("config", value)
    for module in _modules_of(ops):
        if module.__name__.endswith("_triton"):
            for value in vars(module).values():
                if getattr(value, "__module__", "") == module.__name__ and callable(value):
                    belongs("script", value)
    with ExitStack() as stack:
        for module in (*_modules_of(ops), *_modules_of(kernels), *_modules_of(tuning)):
            for name, value in list(vars(module).items()):
                part, function = part_of.get(id(value), ("", None))
                if part and function is value:
                    timed = clock.wrap(part, value)
                    stack.enter_context(mock.patch.object(module, name, timed))
        for name in ALLOCATORS:
            timed = clock.wrap("allocation", getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, timed))
        timed = clock.wrap("allocation", torch.Tensor.new_empty)
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", timed))
        timed = clock.wrap("triton", relaunch.launch)
        stack.enter_context(mock.patch.object(relaunch, "launch", timed))
        yield


def _modules_of(package: Any) -> list[Any]:
    names = [info.name for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def problems() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Modules and inputs by name, in bf16."""
    dims = GOOGLENET["3a"]
    c = dims.in_channels
    paper, torchvision = (
        fi.googlenet(variant, num_classes=1, aux_logits=False, image_size=64, dropout=0.0)
        for variant in ("paper", "torchvision")
    )
    each: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "module": (fi.Inception(*dims.widths), (1, c, SIDE, SIDE)),
        "module with BatchNorm": (fi.Inception(*dims.widths, norm="batch"), (2, c, SIDE, SIDE)),
        "convolution": (fi.ConvBlock(c, 64, kernel_size=1), (1, c, SIDE, SIDE)),
        "convolution with BatchNorm": (
            fi.ConvBlock(c, 64, kernel_size=1, norm="batch"),
            (2, c, SIDE, SIDE),
        ),
        "max pool": (fi.MaxPool2d(3, 2, ceil_mode=True), (1, c, SIDE, SIDE)),
        "norm and max pool": (fi.LRNMaxPool2d(5, 3, 2, ceil_mode=True), (1, c, SIDE, SIDE)),
        "global pool": (fi.GlobalAvgPool2d(), (1, c, SIDE, SIDE)),
        "network": (paper, (1, 3, 64, 64)),
        "network with BatchNorm": (torchvision, (2, 3, 64, 64)),
    }
    # the library's, which would really compute
    paper.fc = torchvision.fc = nn.Identity()  # type: ignore[assignment]
    channels_last = torch.channels_last
    return {
        name: (
            module.to(torch.bfloat16),
            torch.rand(shape).to(torch.bfloat16, memory_format=channels_last),
        )
        for name, (module, shape) in each.items()
    }


def plain_problems() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """The modules in plain PyTorch, narrow, with inputs."""
    channels_last: Any = {"memory_format": torch.channels_last}
    return {
        name: (
            reference.Inception(*NARROW, norm=norm).to(**channels_last),
            torch.rand(images, NARROW[0], SIDE, SIDE).to(**channels_last),
        )
        for name, norm, images in (("module", None, 1), ("module with BatchNorm", "batch", 2))
    }


def pieces(module: nn.Module, x: torch.Tensor) -> dict[str, tuple[Callable[[], Any], Any]]:
    """Direction -> (what is prepared before the clock starts, what is timed)."""
    x = x.requires_grad_()
    leaves = [x, *module.parameters()]
    dy = torch.ones_like(module(x))

    def inference(_: Any) -> None:
        with torch.no_grad():
            module(x)

    def backward(y: torch.Tensor) -> None:
        torch.autograd.grad(y, leaves, dy)

    return {
        "inference": (module.eval, inference),
        "forward": (module.train, lambda _: module(x)),
        "backward": (lambda: module.train()(x), backward),
    }


def microseconds(prepare: Callable[[], Any], run: Callable[[Any], Any], rounds: int) -> float:
    """Processor time of one call."""
    samples = []
    for _ in range(rounds):
        states = [prepare() for _ in range(CALLS)]
        start = time.thread_time_ns()
        for state in states:
            run(state)
        samples.append((time.thread_time_ns() - start) / CALLS / 1e3)
    return min(samples)


def measure(rounds: int, names: list[str] | None = None) -> Iterator[Row]:
    """One row per operator and direction."""
    torch.set_num_threads(1)  # others wait in turns, which the clock counts
    plain = {
        (name, direction): microseconds(prepare, run, rounds)
        for name, (module, x) in plain_problems().items()
        if not names or name in names
        for direction, (prepare, run) in pieces(module, x).items()
    }
    with no_driver():
        for name, (module, x) in problems().items():
            if names and name not in names:
                continue
            for direction, (prepare, run) in pieces(module, x).items():
                # the first call packs filters that later ones find in the cache
                run(prepare())
                state = prepare()
                with fi.record_launches() as launched:
                    run(state)
                launches = len(launched)
                total = microseconds(prepare, run, rounds)
                parts = _parts(prepare, run, rounds)
                with mock.patch.object(replay, "DEVICES", frozenset({"cpu"})):
                    for _ in range(CALLS_UNTIL_REPLAYED):
                        run(prepare())
                    replayed = microseconds(prepare, run, rounds)
                beside = plain.get((name, direction))
                yield Row(name, direction, launches, total, parts, replayed, beside)


def _parts(prepare: Callable[[], Any], run: Callable[[Any], Any], rounds: int) -> dict[str, float]:
    clock = Clock()
    samples: dict[str, list[float]] = {part: [] for part in PARTS}
    with clocked(clock):
        timed = clock.wrap("module", run)
        for _ in range(rounds):
            states = [prepare() for _ in range(CALLS)]
            clock.spent = dict.fromkeys(PARTS, 0)
            for state in states:
                timed(state)
            for part, spent in clock.spent.items():
                samples[part].append(spent / CALLS / 1e3)
    return {part: min(values) for part, values in samples.items()}


def table(rows: list[Row]) -> str:
    """Microseconds of a call, with "ours/launch" of a launch; "replayed" is a call whose script is
    replayed, those before one whose script is run; "plain" are PyTorch's own layers."""
    head = f"{'operator':<27}{'direction':<10}{'launches':>9}{'total':>8}"
    lines = [
        "us of a call; ours/launch: us of a launch",
        head
        + "".join(f"{part:>11}" for part in PARTS)
        + f"{'ours/launch':>13}{'replayed':>10}{'plain':>8}",
    ]
    for row in rows:
        parts = "".join(f"{row.parts_us[part]:>11.1f}" for part in PARTS)
        start = f"{row.op:<27}{row.direction:<10}{row.launches:>9}{row.total_us:>8.0f}"
        plain = "-" if row.plain_us is None else f"{row.plain_us:.0f}"
        lines.append(f"{start}{parts}{row.ours_us:>13.1f}{row.replayed_us:>10.0f}{plain:>8}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; with --out write it with the environment, too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_path", description=__doc__)
    parser.add_argument("--rounds", type=positive, default=25, help=f"of {CALLS} calls each")
    parser.add_argument("--only", nargs="+", metavar="OPERATOR", help="names of the first column")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args(arguments)
    names = list(problems())
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only takes {', '.join(names)}, got {', '.join(sorted(unknown))}")
    rows = list(measure(options.rounds, options.only))
    print(table(rows))
    for part, meaning in PARTS.items():
        print(f"{part}: {meaning}")
    if options.out:
        head = {"environment": environment(torch.device("cpu")), "parts": PARTS}
        write_or_exit(parser, options.out, head | {"rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

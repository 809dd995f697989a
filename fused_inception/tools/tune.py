"""`tune`: measure the launches of a model on this GPU, and write the winners to a table."""

import argparse
import copy
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_inception.adapters.fuse import fuse_
from fused_inception.backend import assume_triton
from fused_inception.ops import ahead, measured
from fused_inception.ops.ahead import Call
from fused_inception.tools import sample
from fused_inception.tools.errors import UserError, require
from fused_inception.tools.launch_bench import (
    Arguments,
    LaunchBench,
    Timer,
    graph_seconds,
    library_speed_ups,
    plain_speed_up,
)
from fused_inception.tools.options import pick_device, positive
from fused_inception.tools.precompile import precompile, processors
from fused_inception.tools.sources import answer_of, launches_digest, version_of
from fused_inception.tools.text import aligned
from fused_inception.tools.timing import cudnn_search
from fused_inception.tuning import chosen, dispatch, table
from fused_inception.tuning.search import Winner, candidates, products, search
from fused_inception.tuning.targets import Target, target_of

# of the budget, for the choices between our kernels and the library's convolutions, and between
# whole functions and plain PyTorch
DISPATCH_SHARE = 0.2
PLAIN_SHARE = 0.1

Lookups = Mapping[tuple[str, table.Key], Sequence[Call]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the model and its batch, and of the search."""
    sample.add_arguments(parser, model="paper", batch_size=32, dtype="bfloat16")
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE", help="table to add to (default: the user's own)")
    add("--budget-s", type=positive, default=540, help="seconds for all (default: 540)")
    add("--again", action="store_true", help="measure too what the table has already")
    add("--list", action="store_true", help="say what would be searched; needs no GPU")


def run(arguments: argparse.Namespace) -> int:
    """Search, or list; the exit status is 1 where the heuristic's own launches fail, else 0, also
    where the time was not enough for all.

    Raises:
        UserError: there is no CUDA device, or flags that do not fit the model.
    """
    require("triton", "tqdm")
    if not arguments.list and pick_device(arguments.device).type != "cuda":
        raise UserError(
            "tune measures launches on a CUDA device, and there is none here: --list shows what "
            "it would search"
        )
    end = time.monotonic() + arguments.budget_s
    with sample.prepared(arguments) as (model, x):
        fuse_(model)
        target = target_of(x.device)
        if arguments.list:
            with assume_triton():
                calls = ahead.calls_of(model, x, training=model.training)
            print(listing(_lookups(calls, target), target))
            return 0
        path = arguments.out or table.user_path(target.name)
        with torch.cuda.device(x.device):
            tuning = Tuning(target, path, provenance(x.device), graph_seconds, processors())
            tuning.go(model, x, end, again=arguments.again)
    print(tuning)
    return int(bool(tuning.failed))


def listing(lookups: Lookups, target: Target) -> str:
    """What a search for them measures first, by family."""
    problems = problems_of(lookups)
    rows = [["family", "problems", "candidates"]]
    for family in chosen.FAMILIES:
        found = [candidates(problem) for problem in problems if problem.family == family]
        if found:
            rows.append([family, str(len(found)), str(sum(map(len, found)))])
    keys = [key for family, key in lookups if family == dispatch.FAMILY]
    lines = [f"tune: for {target.name}, around the heuristic's choices", *aligned(rows)]
    lines.append(
        f"and library convolutions in the place of ours for {len(keys)} problems; "
        "what compiles with spills is left out when there is a GPU"
    )
    lines.append("at the end each whole function against plain PyTorch, which runs where it wins")
    return "\n".join(lines)


def problems_of(lookups: Iterable[tuple[str, table.Key]]) -> list[chosen.Problem]:
    """Those with a configuration, the most products first: the time may not be enough for all."""
    found = [chosen.problems[lookup] for lookup in lookups if lookup[0] in chosen.FAMILIES]
    return sorted(found, key=lambda problem: -products(problem))


def _compile(model: nn.Module, x: torch.Tensor) -> None:
    """All that is launched before a search compiles its own candidates, in parallel: ours, and what
    goes with the library's convolutions."""
    if x.device.type != "cuda":
        return
    for parts in ((), dispatch.PARTS):
        with dispatch.forced(parts), torch.set_grad_enabled(model.training):
            try:
                print(precompile(model, x), flush=True)
            except RuntimeError as error:
                print(f"kernels are compiled one by one: {error}", flush=True)


def _lookups(calls: Iterable[Call], target: Target) -> Lookups:
    # here, as it loads Triton
    from fused_inception.ops.ahead_triton import lookups_of

    return lookups_of(calls, target)


class Tuning:
    """One search: what it found, and the table that it adds to as it goes.

    Args:
        timer: seconds of some work.
        workers: processes that compile.
    """

    def __init__(
        self, target: Target, path: Path, origin: dict[str, Any], timer: Timer, workers: int
    ) -> None:
        self.target = target
        self.path = path
        self.origin = origin
        self.timer = timer
        self.workers = workers
        self.winners: list[Winner] = []
        self.plans: dict[table.Key, dict[str, float]] = {}
        self.plain: dict[table.Key, float] = {}
        self.left = 0
        self.failed: list[str] = []

    @cudnn_search()
    def go(self, model: nn.Module, x: torch.Tensor, end: float, *, again: bool) -> None:
        """Measure what a step of a copy of `model` over `x` launches, until `end` on the monotonic
        clock."""
        from tqdm import tqdm

        # what is recorded runs by its kernels, also where plain PyTorch has been faster
        with measured.recorded():
            _compile(model, x)
        with measured.recorded() as functions:
            calls = ahead.calls_with_tensors(copy.deepcopy(model), x, training=model.training)
        lookups = _lookups(calls, self.target)
        done = set() if again else self._written()
        todo = [p for p in problems_of(lookups) if (p.family, p.key) not in done]
        keys = [lookup for lookup in lookups if lookup[0] == dispatch.FAMILY and lookup not in done]
        whole = {k: call for k, call in functions.items() if (measured.FAMILY, k) not in done}
        left = end - time.monotonic()
        second_end = end - PLAIN_SHARE * left if whole else end
        first_end = second_end - DISPATCH_SHARE * left if keys else second_end
        total = len(todo) + len(keys) + len(whole)
        with tqdm(total=total, desc="tune", unit="problem") as bar:

            def searched(problem: chosen.Problem, end: float) -> bool:
                bar.set_postfix_str(problem.family)
                pairs = [(call, calls[call]) for call in lookups[problem.family, problem.key]]
                done = self._search(problem, pairs, _before(end))
                bar.update(done)
                return done

            cut = [problem for problem in todo if not searched(problem, first_end)]
            for _, key in keys:
                bar.set_postfix_str(dispatch.FAMILY)
                pairs = [(call, calls[call]) for call in lookups[dispatch.FAMILY, key]]
                self._compare(key, pairs, _before(second_end))
                bar.update()
            # with what was found so far: the tables are read again
            table.forget()
            for key, call in whole.items():
                bar.set_postfix_str(measured.FAMILY)
                self._compare_whole(key, call, _before(end))
                bar.update()
            # in the time that the others did not need
            self.left += sum(not searched(problem, end) for problem in cut)
        table.forget()

    def __str__(self) -> str:
        rows = [["family", "problems", "other than the heuristic's", "median gain"]]
        for family in chosen.FAMILIES:
            found = [w for w in self.winners if w.problem.family == family]
            if found:
                gains = [w.heuristic_seconds / w.seconds for w in found]
                better = sum(gain > 1 for gain in gains)
                median = f"{statistics.median(gains):.3f}x"
                rows.append([family, str(len(found)), str(better), median])
        tried = sum(w.tried for w in self.winners)
        ratios = [x for plan in self.plans.values() for x in plan.values()]
        lines = [f"tune: {tried} configurations measured for {self.target.name}", *aligned(rows)]
        lines.append(
            f"library convolutions are faster in {sum(x > 1 for x in ratios)} of {len(ratios)} "
            "places"
        )
        slower = sorted({str(key[0]) for key, ratio in self.plain.items() if ratio > 1})
        lines.append(
            f"plain PyTorch is faster in {sum(x > 1 for x in self.plain.values())} of "
            f"{len(self.plain)} whole functions, and runs there"
            + (f": {', '.join(slower)}" if slower else "")
        )
        if self.failed:
            lines.append(
                f"{len(self.failed)} problems fail as the heuristic has them, the first one is "
                f"{self.failed[0]}"
            )
        if self.left:
            lines.append(f"the time was not enough for {self.left} problems: run it again to go on")
        if self.winners or self.plans or self.plain:
            lines.append(f"wrote {self.path}")
        return "\n".join(lines)

    def _search(
        self,
        problem: chosen.Problem,
        pairs: Sequence[tuple[Call, Arguments]],
        in_time: Callable[[], bool],
    ) -> bool:
        """Whether nothing is left to do; what was begun is else begun anew."""
        bench = LaunchBench(problem, pairs, self.timer, self.workers)
        winner = search(problem, bench, in_time)
        if winner is None and bench.error is not None:
            self.failed.append(f"{problem.family}: {bench.error}")
            return True
        if winner is None or not winner.complete:
            return False
        self.winners.append(winner)
        facts = {
            "seconds": winner.seconds,
            "heuristic_seconds": winner.heuristic_seconds,
            "tried": winner.tried,
        }
        self._write(problem.family, problem.key, asdict(winner.config), facts)
        return True

    def _compare(
        self,
        key: table.Key,
        pairs: Sequence[tuple[Call, Arguments]],
        in_time: Callable[[], bool],
    ) -> None:
        if not in_time():
            self.left += 1
            return
        try:
            ratios = library_speed_ups(key, self.target, pairs, self.timer)
        except RuntimeError as error:
            print(f"{key[0]} is not compared with the library: {error}", flush=True)
            return
        self.plans[key] = ratios
        self._write(dispatch.FAMILY, key, ratios, {})

    def _compare_whole(
        self, key: table.Key, call: measured.Call, in_time: Callable[[], bool]
    ) -> None:
        if not in_time():
            self.left += 1
            return
        try:
            ratio = plain_speed_up(call, self.timer)
        except RuntimeError as error:
            # some of what plain PyTorch does cannot be captured, as a cumulative average
            print(f"{key[0]} is not compared with plain PyTorch: {error}", flush=True)
            return
        self.plain[key] = ratio
        self._write(measured.FAMILY, key, {"speed_up": ratio}, {})

    def _write(
        self, family: str, key: table.Key, fields: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        entry = table.Entry(family, key, fields, self.origin, facts)
        table.write(self.path, self.target.name, [entry])

    def _written(self) -> set[tuple[str, table.Key]]:
        """What the table has from the same GPU and versions, and from the kernels as they are."""
        names = ("gpu", "torch", "triton", "version", "sources")
        try:
            entries = table.read(self.path, self.target.name) if self.path.exists() else []
        except (ValueError, OSError):
            return set()  # `table.write` warns, and replaces it
        return {
            (entry.family, entry.key)
            for entry in entries
            if all(entry.run.get(name) == self.origin.get(name) for name in names)
        }


def _before(end: float) -> Callable[[], bool]:
    return lambda: time.monotonic() < end


def provenance(device: torch.device) -> dict[str, Any]:
    """Where and by what a table is measured."""
    arguments = shlex.join(["python", "-m", "fused_inception", *sys.argv[1:]])
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "version": version_of("fused-inception"),
        "commit": answer_of("git", "rev-parse", "HEAD"),
        "sources": launches_digest(),
        "command": arguments,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }

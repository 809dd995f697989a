"""Single operators, modules and networks, timed beside all other providers."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.parts import Item, Turn, brief
from benchmarks.harness import LineUp
from benchmarks.problems import CASES, Problem
from benchmarks.providers import PROVIDERS, contenders
from benchmarks.results import Row, json_of, table

# who takes turns, what matters most first; a search takes minutes, and stands beside ours again
FAMILIES = {
    # without torch.compile, which takes minutes of a network
    "quick": ("fused", "eager"),
    "plain": ("fused", "eager", "compile"),
    "tuned": ("fused", "max-autotune"),
    "others": ("fused", "fused-library", "eager-nchw"),
    "tuned-others": ("fused", "max-autotune-layout", "max-autotune-cudagraphs"),
}
# of a network: the first of these families at the first of the batches come before all else
FIRST_FAMILIES, FIRST_BATCHES = 3, 3


def items_of(*groups: str) -> Callable[[dict[str, Any], torch.device], list[Item]]:
    """The items of the cases of `groups`: a case, a dtype, a batch and a family each."""

    def items(options: dict[str, Any], device: torch.device) -> list[Item]:
        found = [
            (Problem(group, case, batch, dtype, device), family)
            for family in FAMILIES
            if family in options["families"]
            for dtype in options["dtypes"]
            for batch in options["batches"]
            for group in groups
            for case in CASES[group]
            if options["cases"] is None or case in options["cases"]
        ]
        if groups == ("network",):
            found.sort(key=lambda one: _network_order(*one, options["batches"]))
        return [_item(problem, family, options) for problem, family in found]

    return items


def _network_order(problem: Problem, family: str, batches: list[int]) -> tuple[int, bool, int]:
    """The paper's network whole before torchvision's."""
    number = list(FAMILIES).index(family)
    first = number < FIRST_FAMILIES and batches.index(problem.batch) < FIRST_BATCHES
    return list(CASES["network"]).index(problem.case), not first, number


def _item(problem: Problem, family: str, options: dict[str, Any]) -> Item:
    key = f"{problem.case} {problem.dtype} batch {problem.batch} {family}"
    return Item(key, lambda turn: _measure(problem, family, options, turn))


def _measure(problem: Problem, family: str, options: dict[str, Any], turn: Turn) -> dict[str, Any]:
    """Rows of all directions; what failed in it is told, and the others are timed."""
    facts: dict[str, Any] = {"failures": [], "rows": []}
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()
    line_up = LineUp(problem)
    for direction in problem.directions:
        names = [
            name
            for name in contenders(problem.group, problem.batch, direction, problem.device)
            if PROVIDERS[name].plain in FAMILIES[family]
        ]
        for name in names:
            try:
                line_up.work(direction, name)
            except Exception as error:
                facts["failures"].append(f"{name}, {direction}: {brief(error)}")
        rows: list[Row] = [*line_up.timings(direction, names, options["seconds"]).values()]
        facts["rows"] += [json_of(row) for row in rows]
        turn.keep(facts)
        print(table(rows), flush=True)
    return facts

"""Which kernels a step of each provider runs, how often, and how long."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.parts import Item
from benchmarks.gpu.timings import FAMILIES
from benchmarks.harness import LineUp, settings
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS, contenders

STEPS = 3
# the step that the targets speak of, one in between, and the inference of one image
WORK = (("step", 32), ("forward", 1), ("step", 256))


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """A direction and batch of the paper's network, and a provider each; ours and eager of
    all first, then plain torch.compile, then the searches, which take minutes."""
    found = [
        (direction, batch, name)
        for direction, batch in WORK
        for name in contenders("network", batch, direction, device)
        if options["providers"] is None or name in options["providers"]
    ]
    found.sort(key=lambda one: _order(one[-1]))
    return [
        Item(
            f"paper {direction} batch {batch} {name}",
            lambda turn, d=direction, b=batch, n=name: run(
                Problem("network", "paper", b, "bf16", device), d, n
            ),
        )
        for direction, batch, name in found
    ]


def _order(name: str) -> tuple[int, bool]:
    """As timings are ordered, and the graphs of a family behind what they hold."""
    provider = PROVIDERS[name]
    families = [provider.plain in family for family in FAMILIES.values()]
    return families.index(True), provider.graph


def run(problem: Problem, direction: str, name: str) -> dict[str, Any]:
    """One step's kernels, the longest first; on a CPU the operators."""
    cuda = problem.device.type == "cuda"
    with settings(problem.dtype):
        work = LineUp(problem).work(direction, name)
        work.run(None)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(STEPS):
                work.run(None)
            if cuda:
                torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        # spans of the device's time line that have a name are no kernels
        if event.device_type == kind and not event.is_user_annotation:
            took = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            kernels.setdefault(event.name, []).append(took)
    rows = [
        {"kernel": k[:200], "count": len(t) / STEPS, "us": float(f"{sum(t) / STEPS:.4g}")}
        for k, t in kernels.items()
    ]
    if not rows:
        return {"failures": ["the profiler has seen no kernel: it may be forbidden here"]}
    rows.sort(key=lambda row: -row["us"])
    return {
        "device_us": float(f"{sum(row['us'] for row in rows):.5g}"),
        "launches": sum(row["count"] for row in rows),
        "kernels": rows,
    }

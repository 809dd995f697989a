"""A device's raw results as a report with plots; nothing in it is typed by hand.

python -m benchmarks.report benchmarks/results/DEVICE             # writes REPORT.md there
python -m benchmarks.report benchmarks/results/DEVICE --summary   # a line a target
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measured import Contest, Measured
from benchmarks.plots import draw
from benchmarks.problems import GROUPS
from benchmarks.providers import PROVIDERS
from benchmarks.targets import TARGETS, module_speedups, told_from

REPORT = "REPORT.md"
PROFILED = 12  # kernels of a profile that are listed
TITLES = {
    "kernels": "Single operators",
    "modules": "Inception modules",
    "stem": "Stem",
    "network": "Whole networks",
}


def summary(measured: Measured) -> list[str]:
    """A line for each target."""
    return [target.line(measured) for target in TARGETS]


def report(measured: Measured, pictures: Sequence[str]) -> str:
    """The whole text."""
    sections = [
        f"# {measured.device}",
        "Made by `python -m benchmarks.report` from the JSON files in this folder. Times are "
        "medians; the providers of a problem took turns in one process, behind the comparison with "
        "fp64. L2 is warm, not cold: calls follow each other over the same input and parameters, "
        "and nothing empties it between them, so that a small problem finds them there.",
        *_environments(measured),
        "## Targets",
        "They are set for one H200 in bf16.",
        "\n".join(f"- {line}" for line in summary(measured)),
        *[f"![{name.removesuffix('.png')}]({name})" for name in pictures],
        *_slower(measured),
        *_parts(measured),
    ]
    for group in GROUPS:
        contests = [*measured.select(group)]
        if contests:
            sections += [f"## {TITLES[group]}", _times(contests)]
    return "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown; numbers right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _environments(measured: Measured) -> list[str]:
    rows = []
    for text, files in measured.environments.items():
        facts = json.loads(text)
        shown = "; ".join(f"{k} {v}" for k, v in facts.items() if v is not None)
        rows.append(f"- {', '.join(files)}: {shown}")
    return ["## Measured with", "\n".join(rows)] if rows else []


def _slower(measured: Measured) -> list[str]:
    """Modules in which something else is faster."""
    found = {key: value for key, value in module_speedups(measured).items() if value < 1}
    every = len(module_speedups(measured))
    if not every:
        return []
    rows = []
    for key in sorted(found, key=lambda key: found[key]):
        case, batch, direction, dtype, graph = key
        graphs = "yes" if graph else "no"
        shown = told_from(1.0, found[key], 2, "f")
        rows.append([case, direction, str(batch), dtype, graphs, f"{shown}x"])
    text = f"In {len(found)} of {every} measured combinations of module, batch and direction."
    head = ["module", "direction", "batch", "dtype", "in graphs", "speed-up over the best other"]
    return ["## Modules where ours is slower", text, *([table(head, rows)] if rows else [])]


def _times(contests: Sequence[Contest]) -> str:
    """Milliseconds and speed-up of ours, provider by provider; memory and start-up beside."""
    names = [n for n in PROVIDERS if any(n in c.rows for c in contests)]
    head = ["problem", "direction", "batch", "dtype", "provider", "ms", "20 to 80 %", "ours is",
            "peak MB", "compile s", "tuning s"]  # fmt: skip
    rows = []
    for contest in contests:
        for name in names:
            if name not in contest.rows:
                continue
            row = contest.rows[name]
            peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"
            rows.append(
                [
                    row.case, row.direction, str(row.batch), row.dtype, name,
                    f"{row.median_s * 1e3:.4g}", f"{row.p20_s * 1e3:.3g} - {row.p80_s * 1e3:.3g}",
                    f"{contest.speedup(name):.2f}x", peak,
                    f"{row.compile_s:.1f}", f"{row.tuning_s:.1f}",
                ]
            )  # fmt: skip
    return table(head, rows)


def _parts(measured: Measured) -> list[str]:
    """What `gpu_check` ran: how far it came, what failed, ceilings, profiles."""
    if not measured.parts:
        return []
    head = ["part", "complete", "items", "with failures", "seconds"]
    rows = [
        [
            name,
            "yes" if part["complete"] else "no",
            str(len(part["items"])),
            str(sum(bool(item.get("failures")) for item in part["items"].values())),
            f"{sum(session.get('seconds', 0.0) for session in part['sessions']):.0f}",
        ]
        for name, part in measured.parts.items()
    ]
    sections = ["## Parts of gpu_check", table(head, rows)]
    failures = [
        f"- {name}, {key}: {failure.splitlines()[0][:200]}"
        for name, part in measured.parts.items()
        for key, item in part["items"].items()
        for failure in item.get("failures", [])
        if failure
    ]
    if failures:
        sections += ["### Failures", "\n".join(failures)]
    sections += [*_tests(measured), *_ceilings(measured), *_profiles(measured)]
    return sections


def _tests(measured: Measured) -> list[str]:
    sections = []
    if counts := measured.parts.get("parity", {}).get("items", {}).get("tests", {}).get("counts"):
        shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        sections.append(f"Tests of the kernels, compiled: {shown}.")
    for item in measured.parts.get("sanitize", {}).get("items", {}).values():
        if "note" in item:
            sections.append(f"{item['note']}.")
    return sections


def _ceilings(measured: Measured) -> list[str]:
    items = measured.parts.get("ceilings", {}).get("items", {})
    rows = [
        [name, f"{item['value']:.4g} {item['unit']}"]
        for name, item in items.items()
        if "value" in item
    ]
    return ["## Ceilings", table(["what", "measured"], rows)] if rows else []


def _profiles(measured: Measured) -> list[str]:
    items: dict[str, Any] = measured.parts.get("profile", {}).get("items", {})
    found = {key: item for key, item in items.items() if "kernels" in item}
    if not found:
        return []
    rows = [[k, f"{i['launches']:.0f}", f"{i['device_us'] / 1e3:.3f}"] for k, i in found.items()]
    sections = ["## Profiles", table(["step", "kernels", "ms on the device"], rows)]
    for key, item in found.items():
        if not key.endswith(" fused"):
            continue
        longest = [
            [f"`{row['kernel'][:80]}`", f"{row['count']:.0f}", f"{row['us']:.1f}"]
            for row in item["kernels"][:PROFILED]
        ]
        sections += [f"### {key}", table(["longest kernels", "times", "us"], longest)]
    return sections


def main(arguments: Sequence[str] | None = None) -> int:
    """Write REPORT.md and its plots, or print the targets; 2 with one line for a wrong folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="holds the JSON files of one device")
    parser.add_argument(
        "--summary", action="store_true", help="print a line a target, write nothing"
    )
    options = parser.parse_args(arguments)
    if not options.summary and find_spec("matplotlib") is None:
        parser.exit(2, f"{parser.prog}: error: the plots need matplotlib; --summary does without\n")
    try:
        measured = Measured.read(options.folder)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if options.summary:
        print("\n".join(summary(measured)))
        return 0
    path = options.folder / REPORT
    try:
        path.write_text(report(measured, draw(measured, options.folder)))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())

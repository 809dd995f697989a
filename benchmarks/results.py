"""Measured rows: written as JSON, read back, shown as a table; a benchmark run trimmed to them."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider, one direction of one problem; seconds are those of one call."""

    group: str
    case: str
    batch: int
    direction: str
    provider: str
    dtype: str
    layout: str
    median_s: float
    p20_s: float
    p80_s: float
    calls_per_round: int
    flops: int
    bytes: int
    peak_bytes: int | None  # beyond what the call began with; on a CPU nothing counts it
    compile_s: float  # of the direction's first calls
    tuning_s: float
    samples_s: list[float] = field(default_factory=list)  # a round each
    beside: list[str] = field(default_factory=list)  # who took turns with it

    @property
    def problem(self) -> tuple[str, str, int, str, str]:
        """What was to be done."""
        return self.group, self.case, self.batch, self.direction, self.dtype


def json_of(row: Row) -> dict[str, Any]:
    """Four digits of what was measured: the next ones are noise."""
    return {key: _shortened(value) for key, value in asdict(row).items()}


def _shortened(value: Any) -> Any:
    if isinstance(value, list):
        return [_shortened(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def row_of(facts: Mapping[str, Any]) -> Row:
    """What `json_of` gave; other keys are passed over.

    Raises:
        KeyError: a field is missing.
    """
    return Row(**{f.name: facts[f.name] for f in fields(Row)})


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A JSON object; of its dictionaries and lists each entry has a line. Never half-written."""
    lines = []
    for key, value in content.items():
        entries: list[str] = []
        if isinstance(value, dict):
            entries = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
        elif isinstance(value, list):
            entries = [json.dumps(v) for v in value]
        if entries:
            ends = "{}" if isinstance(value, dict) else "[]"
            lines.append(f'"{key}": {ends[0]}\n' + ",\n".join(entries) + f"\n{ends[1]}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def write_or_exit(parser: argparse.ArgumentParser, path: Path, content: Mapping[str, Any]) -> None:
    """The same for a command's --out; 2 with one line where that cannot be."""
    try:
        write(path, content)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: --out {path} cannot be written: {error}\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of a file that `pytest --benchmark-json`, `gpu_check` or `main` wrote.

    Rows are those of `bench_googlenet.py`; others are passed over.

    Raises:
        ValueError: the file is none of these.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    with of_the_format(path):
        head, infos = _head_and_infos(path, content)
        return head, [row_of(info) for info in infos if "provider" in info and "beside" in info]


@contextmanager
def of_the_format(path: Path) -> Iterator[None]:
    """Inside, what is looked for in the content of a file and not found there is a ValueError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is not as our benchmarks write results: {what}") from error


def _head_and_infos(path: Path, content: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no results")
    if "benchmarks" in content:
        infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        head = {"environment": infos[0]["environment"]} if infos else {}
    elif "items" in content:
        infos = [row for item in content["items"].values() for row in item.get("rows", [])]
        head = {key: value for key, value in content.items() if key != "items"}
    elif "rows" in content:
        infos = content["rows"]
        head = {key: value for key, value in content.items() if key != "rows"}
    else:
        raise ValueError(f"{path} holds no results")
    return head, infos


def groups_of(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows that were measured in turn, by provider."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((*row.problem, *row.beside), {})[row.provider] = row
    return [*groups.values()]


def table(rows: Iterable[Row]) -> str:
    """Medians in milliseconds, and how many times as long as the fused one each takes."""
    lines = []
    for group in groups_of(rows):
        first = next(iter(group.values()))
        lines.append(
            f"{first.group} {first.case}, {first.direction}, batch {first.batch}, {first.dtype}"
        )
        for name, row in group.items():
            ours = group.get("fused-graph" if name.endswith("-graph") else "fused")
            ratio = f"{row.median_s / ours.median_s:7.2f}x" if ours else ""
            peak = f"{row.peak_bytes / 1e6:10.1f} MB" if row.peak_bytes is not None else ""
            startup = f"{row.compile_s:8.1f} s compile {row.tuning_s:8.1f} s tuning"
            lines.append(f"  {name:<27}{row.median_s * 1e3:10.3f} ms{ratio}{peak}{startup}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Show a result file; with --out write its rows and the environment alone."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.results", description=main.__doc__)
    parser.add_argument("source", type=Path, help="a file of --benchmark-json or of gpu_check")
    parser.add_argument("--out", type=Path, help="where the trimmed file goes")
    parser.add_argument("--note", help="what a reader of the trimmed file has to know")
    options = parser.parse_args(arguments)
    try:
        head, rows = read(options.source)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if not rows:
        parser.exit(2, f"{parser.prog}: error: {options.source} holds no measured row\n")
    if options.note:
        head = {"note": options.note, **head}
    print(table(rows))
    if options.out:
        write_or_exit(parser, options.out, {**head, "rows": [json_of(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())

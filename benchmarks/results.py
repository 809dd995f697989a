"""Measured rows: written as JSON, read back, shown as a table; a benchmark run trimmed to them."""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider, one direction of one problem; seconds are those of one call."""

    module: str
    batch: int
    direction: str
    provider: str
    dtype: str
    layout: str
    median_s: float
    p20_s: float
    p80_s: float
    rounds: int
    calls_per_round: int
    flops: int
    bytes: int
    peak_bytes: int | None  # on a CPU nothing counts it
    first_calls_s: float  # of the gate: compilation, algorithm search


def write(path: Path, head: dict[str, Any], rows: Iterable[Row] | None = None) -> None:
    """A JSON object with `head` and "rows", a line each; the file is never half-written."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, indent=1)}" for key, value in head.items()]
    if rows is not None:
        shortened = [json.dumps(_shortened(asdict(row))) for row in rows]
        lines.append('"rows": [\n' + ",\n".join(shortened) + "\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits of what was measured: the next ones are noise."""
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Head and rows of a file that `write` or `pytest --benchmark-json` wrote.

    Rows are of modules; benchmarks of whole networks are passed over.

    Raises:
        ValueError: the file is neither, or holds no row.
    """
    content = json.loads(path.read_text())
    if "benchmarks" in content:
        infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
        head = {"environment": infos[0]["environment"]} if infos else {}
    else:
        infos = content.get("rows", [])
        head = {key: value for key, value in content.items() if key != "rows"}
    names = [field.name for field in fields(Row)]
    infos = [info for info in infos if "module" in info]
    if not infos:
        raise ValueError(f"{path} holds no measured row")
    return head, [Row(**{name: info[name] for name in names}) for info in infos]


def table(rows: Iterable[Row]) -> str:
    """Medians in milliseconds, and how many times as long as the fused module each takes."""
    groups: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.module, row.batch, row.direction), {})[row.provider] = row
    providers = list(dict.fromkeys(name for group in groups.values() for name in group))
    lines = ["module batch direction" + "".join(f"{name:>18}" for name in providers)]
    for (module, batch, direction), group in groups.items():
        fused = group.get("fused")
        cells = []
        for name in providers:
            if name not in group:
                cells.append(f"{'-':>18}")
                continue
            milliseconds = group[name].median_s * 1e3
            ratio = f" {group[name].median_s / fused.median_s:6.2f}x" if fused else ""
            cells.append(f"{f'{milliseconds:.3f}{ratio}':>18}")
        lines.append(f"{module:<7}{batch:<6}{direction:<9}" + "".join(cells))
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
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    if options.note:
        head = {"note": options.note, **head}
    if options.out:
        write(options.out, head, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

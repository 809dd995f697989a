"""What compiled kernels are made of, configuration by configuration, without a GPU.

GROUP is a name in tests/compiled/matrix.py: of EVERY_RUN, "full", or "full:" and a name in FULL. A
row is one kernel with one configuration: registers and bytes of stack of a thread, shared memory of
a program, programs that fit a processor at a time, the narrowest load of tiles, and of each inner
loop the instructions of a step and sm_90's tensor-core cycles for it. Behind the table comes the
share of padding in all modules' tiles.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import triton
from tqdm import tqdm

from benchmarks import padding
from tests.compiled import matrix
from tests.compiled.__main__ import compiler, groups_of
from tests.compiled.build import Build
from tests.compiled.counts import Counts, counts_of
from tests.compiled.table import launch_name

TILES = ("BLOCK", "TILES", "TAIL", "POOL_", "NUM_STAGES")


@dataclass(frozen=True)
class Row:
    """One kernel with one configuration."""

    group: str
    target: str
    launch: str
    tiles: str
    warps: int
    counts: Counts
    tensor_cores: str

    def cells(self) -> list[object]:
        """In the order of HEAD."""
        c = self.counts
        loops = "; ".join(
            f"{name.strip('_')} {steps}" + (f"/{cycles}" if cycles else "")
            for name, steps, _, cycles in c.loops
        )
        spills = sum(spilled for _, _, spilled, _ in c.loops)
        return [
            *(self.group, self.launch, self.tiles, self.warps, c.registers, c.stack, spills),
            *(c.shared, c.programs, c.load_bytes or "", self.tensor_cores, loops),
        ]


HEAD = (
    *("group", "launch", "tiles", "warps", "registers", "stack", "spills", "shared"),
    *("programs", "load", "tensor cores", "instructions a step / tensor-core cycles"),
)


def row_of(group: str, build: Build) -> Row:
    """Of a kernel that compiled.

    Raises:
        RuntimeError: it did not.
    """
    spec = build.spec
    if build.code is None:
        raise RuntimeError(f"{group}: {spec.kernel} does not compile: {build.error}")
    tiles = " ".join(f"{name}={value}" for name, value in _tiles(spec.constants))
    cores = " ".join(sorted(build.code.tensor_cores))
    return Row(
        group, spec.target, launch_name(spec), tiles, spec.num_warps, counts_of(build), cores
    )


def _tiles(constants: Iterable[tuple[str, object]]) -> Iterable[tuple[str, object]]:
    each = dict(constants)
    for name, value in each.items():
        extent = re.fullmatch(r"(P|CO|CI|M)[135PR]", name)
        # N3 and its like are columns of a tile beside rows M3, else widths
        columns = re.fullmatch(r"N([135PR])", name)
        beside_rows = columns is not None and f"M{columns[1]}" in each
        if name.startswith(TILES) or extent or beside_rows:
            yield name, value


def markdown(rows: Iterable[Row]) -> str:
    """The table and the padding."""
    lines = [
        f"# Compiled kernels, Triton {triton.__version__}",
        "",
        *(line.strip() for line in (__doc__ or "").splitlines()[2:]),
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(map(str, row.cells()))} |" for row in rows),
        "",
        "## Share of padding, per cent of the multiply-adds of a launch: sm_90, bf16, training",
        "",
        "```",
        padding.table(list(padding.rows())),
        "```",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile, print; with --out write static.md and static.csv."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static_report", description=__doc__)
    ours = [name for name in matrix.EVERY_RUN if name.startswith("sm_90-bf16-")]
    parser.add_argument("groups", nargs="*", default=ours, metavar="GROUP")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    compile_all = compiler(options.workers)
    rows: list[Row] = []
    for given in options.groups:
        for name, group in groups_of(given):
            specs = group.specialisations()
            builds = tqdm(compile_all(specs), name, len(specs), disable=None)
            rows += [row_of(name, build) for build in builds]
    text = markdown(rows)
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "static.md").write_text(text)
        with (options.out / "static.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEAD, *(row.cells() for row in rows)])
    return 0


if __name__ == "__main__":
    sys.exit(main())

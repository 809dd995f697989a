"""What compiled kernels are made of, configuration by configuration, without a GPU.

GROUP is a name in tests/compiled/matrix.py: of EVERY_RUN, "full", or "full:" and a name in FULL. A
row is one kernel with one configuration: the layers and batches that launch it; registers and bytes
of stack of a thread, shared memory of a program, programs that fit a processor at a time, the
narrowest load of tiles; of each inner loop the instructions of a step and sm_90's tensor-core
cycles for it; and how much of its multiply-adds is padding, from the least to the most of these
layers: nothing for a kernel that multiplies no tiles. Behind the table comes the share of padding
in all modules' tiles.
"""

import argparse
import csv
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from tqdm import tqdm

from benchmarks import padding, products
from fused_inception.geometry import AUX_CHANNELS, IMAGE_CHANNELS, InceptionDims, NaiveDims
from fused_inception.tuning.heuristic import Operands
from tests.compiled import matrix
from tests.compiled.__main__ import check, compiler, groups_of
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.counts import Counts, counts_of
from tests.compiled.matrix import LAYERS, Use
from tests.compiled.problems import (
    Auxiliary,
    Convolution,
    Gradients,
    Library,
    Module,
    NormConvolution,
    NormModule,
    PackedConvolution,
    Problem,
    Stem,
)
from tests.compiled.table import launch_name

# launches of a module: the first letters of their names in `products.launches`
LETTERS = {
    **{f"pointwise ({ranges})": ("A",) for ranges in ("gemm + pool", "gemm", "pool")},
    **{"branches": ("B ",), "dgrad": ("L1",), "gradients (input)": ("L2",)},
    **{"gradients (filters)": ("L3",), "gradients (input + filters)": ("L2", "L3")},
}
PARTS_OF_A = {"pointwise (gemm)": slice(0, 1), "pointwise (pool)": slice(1, 2)}
TILES = ("BLOCK", "TILES", "TAIL", "POOL_", "NUM_STAGES")


@dataclass(frozen=True)
class Row:
    """One kernel with one configuration."""

    group: str
    target: str
    launch: str
    users: str
    tiles: str
    warps: int
    counts: Counts
    tensor_cores: str
    padding: str  # per cent

    def cells(self) -> list[object]:
        """In the order of HEAD."""
        c = self.counts
        loops = "; ".join(
            f"{name.strip('_')} {steps}" + (f"/{cycles}" if cycles else "")
            for name, steps, _, cycles in c.loops
        )
        spills = sum(spilled for _, _, spilled, _ in c.loops)
        return [
            *(self.group, self.launch, self.users, self.tiles, self.warps, c.registers, c.stack),
            *(spills, c.shared, c.programs, c.load_bytes or "", self.tensor_cores, loops),
            self.padding,
        ]


HEAD = (
    *("group", "launch", "for", "tiles", "warps", "registers", "stack", "spills", "shared"),
    *("programs", "load", "tensor cores", "instructions a step / tensor-core cycles", "padding %"),
)


def row_of(group: str, precision: str, build: Build, uses: Sequence[Use]) -> Row:
    """Of a kernel that compiled, and of what launches it.

    Raises:
        RuntimeError: it did not.
    """
    spec = build.spec
    if build.code is None:
        raise RuntimeError(f"{group}: {spec.kernel} does not compile: {build.error}")
    name = launch_name(spec)
    tiles = " ".join(f"{name}={value}" for name, value in _tiles(spec.constants))
    cores = " ".join(sorted(build.code.tensor_cores))
    each = [padded(spec, precision, use) for use in uses]
    shares = [share for share in each if share is not None]
    low, high = (f"{100 * end(shares, default=0):.0f}" for end in (min, max))
    return Row(
        *(group, spec.target, name, users(uses), tiles, spec.num_warps, counts_of(build), cores),
        padding="" if not shares else low if low == high else f"{low}-{high}",
    )


def users(uses: Iterable[Use]) -> str:
    """Layers @ batches, those with the same batches together: "3a 3b @1,32; 4a @256"."""
    batches: dict[str, dict[int, None]] = {}
    for use in uses:
        batches.setdefault(use.layer, {})[use.batch] = None
    layers: dict[tuple[int, ...], list[str]] = {}
    for layer, of_layer in batches.items():
        layers.setdefault(tuple(of_layer), []).append(layer)
    return "; ".join(
        f"{' '.join(names)} @{','.join(map(str, sizes))}" for sizes, names in layers.items()
    )


def padded(spec: Specialisation, precision: str, use: Use) -> float | None:
    """The share of padding in the multiply-adds of a launch; None where it has none."""
    found = _products(spec, precision, LAYERS[use.layer](use.batch), use.training)
    if not found:
        return None
    return 1 - sum(p.useful for p in found) / sum(p.issued for p in found)


def _products(
    spec: Specialisation,
    precision: str,
    problem: Problem,
    training: bool,
    library: bool = False,
) -> list[products.Product]:
    launch = launch_name(spec)
    # fp16 has the tiles of bf16, exact fp32 those that fit 4-byte operands
    ops = Operands(2, "tf32") if precision in ("bf16", "fp16") else Operands(4, precision)
    where = ops, spec.target
    norm = isinstance(problem, NormModule | NormConvolution)
    found: dict[str, list[products.Product]] = {}
    match problem:
        case Library(ours):
            return _products(spec, precision, ours, training, library=True)
        case (
            Module(InceptionDims() as dims, batch, side)
            | NormModule(dims, batch, side)
            | Gradients(dims, batch, side)
        ):
            of_module = products.launches(
                dims, batch * side**2, *where, training=training, norm=norm
            )
            theirs = ("3x3", "5x5") if library else ()
            parts = [
                part
                for name, each in of_module
                if name[:2] in LETTERS.get(launch, ()) and not name.endswith(theirs)
                for part in each
            ]
            return parts[PARTS_OF_A.get(launch, slice(None))]
        case Module(NaiveDims() as dims, batch, side):
            found = products.naive(dims, batch * side**2, *where)
        case Convolution():
            filters = problem.c_in, problem.c_out, problem.kernel
            batch, side = problem.batch, problem.side
            if problem.c_in <= IMAGE_CHANNELS:
                found = products.image_convolution(*filters, problem.stride, batch, side, *where)
                if (problem.kernel, problem.stride) == (7, 2):
                    found |= products.packed_convolution(*filters[:2], batch, side, *where)
            else:
                found = products.convolution(*filters, batch * side**2, *where, norm=norm)
        case PackedConvolution(batch, c_out, side):
            found = products.packed_convolution(3, c_out, batch, side, *where)
        case Stem(batch, side):
            for convolution in problem.convolutions:
                if convolution.kernel == spec.constant("K"):
                    return _products(spec, precision, convolution, training)
            c1, c2, c3 = (convolution.c_out for convolution in problem.convolutions)
            channels = problem.convolutions[0].c_in
            found = products.stem(channels, (c1, c2, c3), batch, side, *where)
        case Auxiliary(batch, c_in, side, window):
            found = products.auxiliary(c_in, AUX_CHANNELS, batch, side, window, *where)
    return found.get(launch, [])


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
    check(parser, options.groups)
    compile_all = compiler(options.workers)
    rows: list[Row] = []
    for given in options.groups:
        for name, group in groups_of(given):
            uses = group.uses()
            builds = tqdm(compile_all(list(uses)), name, len(uses), disable=None)
            rows += [row_of(name, group.precision, build, uses[build.spec]) for build in builds]
    text = markdown(rows)
    print(text)
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "static.md").write_text(text)
            with (options.out / "static.csv").open("w", newline="") as file:
                csv.writer(file).writerows([HEAD, *(row.cells() for row in rows)])
        except OSError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

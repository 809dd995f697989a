"""Compile groups of kernels ahead of time and say which break a bound.

GROUP: a name in matrix.EVERY_RUN; "full", all targets and types; "full:" and a name in matrix.FULL;
"broken", kernels that must break a bound; or "list", which prints the kernels of EVERY_RUN.
"""

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.compiled import counts, matrix, table
from tests.compiled.bounds import violations
from tests.compiled.broken import broken_kernels
from tests.compiled.build import Build, build
from tests.compiled.collect import Specialisation


def main() -> None:
    """Exit status 1 if a kernel breaks a bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.compiled", description=__doc__)
    parser.add_argument("groups", nargs="+", metavar="GROUP")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="put results into those there")
    parser.add_argument(
        "--keep-counts", action="store_true", help="what is compiled is what later runs are held to"
    )
    options = parser.parse_args()
    check(parser, options.groups, "list", "broken")
    status = 0
    compile_all = compiler(options.workers)
    for name in options.groups:
        if name == "list":
            for group_name, group in matrix.EVERY_RUN.items():
                kernels = sorted({spec.kernel for spec in group.specialisations()})
                print(f"{group_name}: {' '.join(kernels)}")
            continue
        if name == "broken":
            specs = broken_kernels()
            results = compile_all([*specs.values()])
            for case, result in zip(specs, results, strict=True):
                print(f"{case}: {'; '.join(violations(result)) or 'within all bounds'}")
            continue
        for group_name, group in groups_of(name):
            start = time.perf_counter()
            builds = list(compile_all(group.specialisations()))
            if options.table:
                rows = table.rows(group.target, group.precision, builds)
                table.add(options.table, group_name, list(rows))
            if options.keep_counts:
                counts.write(group_name, builds)
            for result in builds:
                for text in (*violations(result), *counts.regressions(group_name, result)):
                    status = 1
                    print(f"{group_name}: {result.spec.kernel}: {text}\n  {_describe(result)}")
            seconds = time.perf_counter() - start
            print(f"{group_name}: {len(builds)} kernels, {seconds:.0f} s", flush=True)
    sys.exit(status)


def check(parser: argparse.ArgumentParser, names: Sequence[str], *further: str) -> None:
    """End with what there is where one of `names` is unknown."""
    known = [*further, "full", *matrix.EVERY_RUN, *(f"full:{name}" for name in matrix.FULL)]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{', '.join(unknown)} is none of {', '.join(known)}")


def groups_of(name: str) -> Iterator[tuple[str, matrix.Group]]:
    if name == "full":
        for full_name, group in matrix.FULL.items():
            yield f"full:{full_name}", group
    elif name.startswith("full:"):
        yield name, matrix.FULL[name.removeprefix("full:")]
    else:
        yield name, matrix.EVERY_RUN[name]


def compiler(workers: int) -> Callable[[Sequence[Specialisation]], Iterator[Build]]:
    """Builds a sequence in its order, in as many processes as that."""
    if workers == 1:
        return functools.partial(map, build)
    context = multiprocessing.get_context("spawn")

    def compile_all(specs: Sequence[Specialisation]) -> Iterator[Build]:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield from pool.map(build, specs)

    return compile_all


def _describe(result: Build) -> str:
    constants = (f"{name}={value}" for name, value in result.spec.constants)
    return f"{' '.join(constants)} num_warps={result.spec.num_warps}"


if __name__ == "__main__":
    main()

"""How much of the tensor cores' work in the Inception modules is padding: tiles against widths.

Nothing is compiled here, and nothing is predicted but the work.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.products import launches
from fused_inception.geometry import GOOGLENET, googlenet_sizes
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS

KEPT = Path(__file__).parent / "padding.json"
IMAGE_SIZE = 224
BATCHES = (1, 32, 256)
OPERANDS = {"bf16": Operands(2, "tf32"), "tf32": Operands(4, "tf32")}


@dataclass(frozen=True)
class Row:
    """One product of one module."""

    target: str
    precision: str
    module: str
    batch: int
    launch: str
    useful: int  # multiply-adds
    issued: int

    @property
    def share(self) -> float:
        """Of the issued work, what is padding."""
        return 1 - self.useful / self.issued


def rows(target: str = "sm_90", precision: str = "bf16") -> Iterator[Row]:
    """All modules and batches."""
    sizes = googlenet_sizes(IMAGE_SIZE)
    for module, dims in GOOGLENET.items():
        for batch in BATCHES:
            pixels = batch * sizes.module(module) ** 2
            for launch, products in launches(dims, pixels, OPERANDS[precision], target):
                useful = sum(p.useful for p in products)
                issued = sum(p.issued for p in products)
                yield Row(target, precision, module, batch, launch, useful, issued)


def table(found: list[Row]) -> str:
    """Per cent of padding, a line per module and batch; "all" is of the module's whole work."""
    names = list(dict.fromkeys(row.launch for row in found))
    lines = [
        "% of the multiply-adds that are padding",
        "module batch " + "".join(f"{name:>11}" for name in [*names, "all"]),
    ]
    groups: dict[tuple[str, int], dict[str, Row]] = {}
    for row in found:
        groups.setdefault((row.module, row.batch), {})[row.launch] = row
    for (module, batch), group in groups.items():
        useful = sum(row.useful for row in group.values())
        issued = sum(row.issued for row in group.values())
        shares = [*(group[name].share for name in names), 1 - useful / issued]
        lines.append(f"{module:<7}{batch:<6}" + "".join(f"{100 * s:>11.1f}" for s in shares))
    return "\n".join(lines)


def shares(found: list[Row]) -> dict[str, float]:
    """As they are kept: "module batch launch" -> share of padding."""
    return {f"{r.module} {r.batch} {r.launch}": round(r.share, 4) for r in found}


def main(arguments: list[str] | None = None) -> int:
    """Print the table; with --keep tests hold later configurations to its shares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.padding", description=main.__doc__)
    parser.add_argument("--target", choices=list(TARGETS), default="sm_90")
    parser.add_argument("--precision", choices=list(OPERANDS), default="bf16")
    parser.add_argument("--keep", action="store_true", help=f"write {KEPT.name}: sm_90, bf16")
    options = parser.parse_args(arguments)
    print(table(list(rows(options.target, options.precision))))
    if options.keep:
        lines = (f"{json.dumps(k)}: {v}" for k, v in shares(list(rows())).items())
        KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

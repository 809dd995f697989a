"""Who may import whom, how long files are, what kernels must state: held by reading the code."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import HAS_TRITON
from tests.processes import ROOT, output_of

PACKAGE = ROOT / "fused_inception"
MAX_LINES = 450

# what each part of the package may import of it; a part stands below those that it imports, so no
# circle can form
MAY_IMPORT = {
    "geometry": (),
    "launches": (),
    "backend": (),
    "checks": ("geometry",),
    "cost": ("geometry",),
    "tuning": ("geometry",),
    "reference": ("geometry",),
    "kernels": ("geometry", "tuning", "launches"),
    "ops": ("geometry", "reference", "backend", "tuning", "kernels"),
    "functional": ("geometry", "backend", "checks", "ops"),
    "nn": ("geometry", "backend", "checks", "reference", "functional"),
    "adapters": ("geometry", "backend", "reference", "nn"),
    "tools": (
        *("geometry", "backend", "launches", "cost", "tuning", "reference"),
        *("ops", "functional", "nn", "adapters"),
    ),
    "__init__": (
        *("backend", "launches", "reference", "ops", "functional", "nn", "adapters", "tools"),
    ),
    "__main__": ("backend", "tools"),
}
OUTSIDERS = {"tests", "benchmarks", "torchvision"}


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    path: Path
    line: int
    module: str
    level: int
    inside_function: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {'.' * self.level}{self.module}"

    @property
    def part(self) -> str | None:
        """The part of the package that is imported; None for a module of somebody else."""
        names = self.module.split(".")
        if names[0] != "fused_inception":
            return None
        return names[1] if len(names) > 1 else "__init__"


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    def visit(node: ast.AST, inside_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, 0, inside_function)
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                names = [module]
                if module.split(".")[0] == "fused_inception":
                    # `from fused_inception import checks` imports a module, not a name of one
                    folder = ROOT / module.replace(".", "/")
                    names = [
                        f"{module}.{alias.name}" if _is_module(folder / alias.name) else module
                        for alias in child.names
                    ]
                for name in names:
                    yield Import(path, child.lineno, name, child.level, inside_function)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from visit(child, inside_function or function)

    yield from visit(ast.parse(path.read_text()), False)


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").exists()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_triton_side(module_or_path: str) -> bool:
    """Operators' Triton implementations, loaded when a kernel first runs."""
    return module_or_path.removesuffix(".py").endswith("_triton")


def test_every_part_is_in_the_table() -> None:
    parts = {part_of(path) for path in sources("fused_inception")}
    assert parts <= MAY_IMPORT.keys()
    assert {"geometry", "kernels", "nn", "ops", "reference", "tuning"} <= parts


def test_table_has_no_circles() -> None:
    below: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        assert below.issuperset(allowed), f"{part} may import something that stands above it"
        below.add(part)


def test_imports_follow_the_table() -> None:
    wrong = []
    for path in sources("fused_inception"):
        own = part_of(path)
        for found in imports(path):
            if found.part not in (None, own, *MAY_IMPORT[own]):
                wrong.append(f"{found}, which {own} may not")
            if found.module.split(".")[0] in OUTSIDERS:
                wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    """Nor in a circle of several, inside functions included."""
    below: dict[str, set[str]] = {}
    for path in sources("fused_inception"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        # whoever imports a package takes names that it has from others
        below[name] = {f.module for f in imports(path)} if path.stem != "__init__" else set()
    order = graphlib.TopologicalSorter(below)
    order.prepare()  # raises CycleError, which names the modules


def test_kernels_load_only_when_one_runs() -> None:
    wrong = []
    for path in sources("fused_inception"):
        if part_of(path) == "kernels":
            continue
        for found in imports(path):
            if found.inside_function:
                continue
            # one such implementation may build on another
            kernels = found.part == "kernels" or is_triton_side(found.module)
            kernels = kernels and not is_triton_side(path.name)
            if kernels or found.module.split(".")[0] == "triton":
                wrong.append(f"{found} where the file itself is imported")
    assert not wrong, "\n".join(wrong)


def test_run_time_needs_torch_and_triton_alone() -> None:
    """Other packages are imported by a function that needs one, where it is needed."""
    known = sys.stdlib_module_names | {"fused_inception", "torch", "triton"}
    wrong = [
        str(found)
        for path in sources("fused_inception")
        for found in imports(path)
        if not found.inside_function and found.module.split(".")[0] not in known
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_are_absolute() -> None:
    paths = sources("fused_inception", "tests", "benchmarks")
    wrong = [str(found) for path in paths for found in imports(path) if found.level]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in sources("fused_inception", "tests", "benchmarks")
    }
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def masked_loads_without_other(code: str) -> list[int]:
    """Lines of the `tl.load` calls with a mask that leave the other elements undefined."""
    lines = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("tl.load", "load"):
            continue
        named = {keyword.arg for keyword in node.keywords}
        masked = "mask" in named or len(node.args) > 1
        if masked and "other" not in named and len(node.args) < 3:
            lines.append(node.lineno)
    return lines


def test_masked_loads_state_other() -> None:
    # the interpreter fills with zeros, a GPU does not: tests without a GPU pass either way
    wrong = {
        path.name: lines
        for path in sources("fused_inception/kernels")
        if (lines := masked_loads_without_other(path.read_text()))
    }
    assert not wrong, f"masked loads without other=: {wrong}"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("tl.load(p)", []),
        ("tl.load(p, mask=m)", [1]),
        ("x = 1\ny = tl.load(p + x, m)", [2]),
        ("tl.load(p, mask=m, other=0.0)", []),
        ("tl.load(p, m, 0.0)", []),
    ],
)
def test_masked_loads_are_found(code: str, lines: list[int]) -> None:
    assert masked_loads_without_other(code) == lines


IMPORT_PROBE = """
import sys
import torch
before = set(sys.modules)
import fused_inception
after = set(sys.modules) - before
tops = {name.partition(".")[0] for name in after} - set(sys.stdlib_module_names)
print(sorted(tops - {"fused_inception", "torch"}))
print(sorted(after & {"torch._dynamo", "torch._inductor", "fused_inception.kernels"}))
print("triton" in sys.modules, torch.cuda.is_initialized())
"""


def test_import_loads_nothing_heavy() -> None:
    """Neither Triton nor another third-party package, nor the compiler, nor a CUDA context."""
    lines = output_of("-W", "error", "-c", IMPORT_PROBE).splitlines()
    assert lines == ["[]", "[]", "False False"]


NO_TRITON_PROBE = """
import sys
sys.modules["triton"] = None
import fused_inception as fi
import torch
y = fi.googlenet("paper", num_classes=5, aux_logits=False).eval()(torch.randn(1, 3, 64, 64))
print(tuple(y.shape))
"""


@pytest.mark.skipif(not HAS_TRITON, reason="the whole session runs without Triton")
def test_package_works_without_triton() -> None:
    assert output_of("-W", "error", "-c", NO_TRITON_PROBE).strip() == "(1, 5)"

"""The report of compiled kernels: a row a configuration, the padding behind them."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import products, static_report
from benchmarks.padding import OPERANDS
from benchmarks.static_report import HEAD, markdown, padded, row_of
from fused_inception.geometry import GOOGLENET
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import Loop, MachineCode
from tests.compiled.matrix import Use
from tests.compiled.table import RANGES
from tests.processes import output_of
from tests.test_house import sources

CONSTANTS = (
    ("N3", 288),
    ("P3", 128),
    ("CO3", 256),
    ("TAIL_3", 32),
    ("C_IN", 144),
    ("NUM_STAGES", 3),
)
SPEC = Specialisation(
    module="m",
    kernel="_branches_kernel",
    target="sm_90",
    signature=(("r_ptr", "*bf16"),),
    constants=CONSTANTS,
    attributes=(),
    num_warps=8,
)
BF16 = OPERANDS["bf16"]
USES = [Use("4d", 32, True), Use("4d", 256, True), Use("4d", 32, False), Use("3a", 1, True)]


def share(launch: str, use: Use, **constants: object) -> float | None:
    """Of a launch in bf16 on sm_90 that the table calls so."""
    kernel, _, ranges = launch.partition(" ")
    for flag in RANGES.get(kernel, ()):
        constants[flag] = flag.lower() in ranges
    spec = replace(SPEC, kernel=f"_{kernel}_kernel", constants=tuple(constants.items()))
    return padded(spec, "bf16", use)


def test_a_row_shows_tiles_and_counts() -> None:
    loops = (Loop("_convolve", 120, 2, 256), Loop("_convolve", 90, 0, 0))
    code = MachineCode(200, 16, {"HGMMA": 4}, loads=(), loops=loops)
    row = row_of("a group", "bf16", Build(SPEC, 1.0, code=code, shared=98304), USES)
    cells = dict(zip(HEAD, row.cells(), strict=True))
    assert cells["launch"] == "branches"
    assert cells["tiles"] == "P3=128 CO3=256 TAIL_3=32 NUM_STAGES=3"
    assert (cells["registers"], cells["stack"], cells["spills"]) == (200, 16, 2)
    # 200 registers of 256 threads: one program
    assert cells["programs"] == 1
    assert cells["instructions a step / tensor-core cycles"] == "convolve 120/256; convolve 90"
    text = markdown([row])
    assert cells["for"] == "4d @32,256; 3a @1"
    head = "| a group | branches | 4d @32,256; 3a @1 | P3=128 CO3=256 TAIL_3=32 NUM_STAGES=3 | 8 |"
    assert head in text
    assert "L3 reduces" in text


LAUNCHES = {
    **dict.fromkeys(("pointwise (gemm)", "pointwise (pool)"), ("A",)),
    **{"branches": ("B ",), "gradients (input)": ("L2",), "gradients (filters)": ("L3",)},
    **{"gradients (input + filters)": ("L2", "L3")},
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_padding_of_a_row_is_that_of_its_layers(launch: str) -> None:
    """As `benchmarks.products` has it of the products of that launch."""
    for use in USES:
        dims, pixels = GOOGLENET[use.layer], use.batch * (28 if use.layer == "3a" else 14) ** 2
        of_module = dict(products.launches(dims, pixels, BF16, "sm_90", training=use.training))
        names = [name for name in of_module if name.startswith(LAUNCHES[launch])]
        found = [p for name in names for p in of_module[name]]
        if launch.startswith("pointwise"):
            found = found[:1] if "gemm" in launch else found[1:]
        want = 1 - sum(p.useful for p in found) / sum(p.issued for p in found)
        assert share(launch, use) == want
    assert share("relu_mask", USES[0]) is None
    assert share("branches", Use("pool3", 32, True)) is None


def test_padding_of_convolutions_of_their_own() -> None:
    """1x1 of 64 to 64 fill their tiles, 192 filters a wide one and its tail, and rows of 9 * 64 no
    tiles of 128; a sum of partial results has none."""
    for layer, way in (("conv2", "fwd"), ("conv3", "fwd"), ("conv3", "dgrad")):
        assert share(f"conv2d_{way}", Use(layer, 256, True)) == 0
    wgrad = share("conv2d_wgrad", Use("conv3", 256, True))
    assert wgrad is not None
    assert wgrad > 0.1
    assert share("finish", Use("conv2", 256, True)) is None


def test_padding_of_the_stem_is_that_of_its_convolutions() -> None:
    """Its launches of single convolutions are told apart by their taps."""
    stem = Use("stem", 1, True)
    for layer, kernel in (("conv2", 1), ("conv3", 3)):
        for way in ("fwd", "dgrad", "wgrad"):
            want = share(f"conv2d_{way}", Use(layer, 1, True))
            assert share(f"conv2d_{way}", stem, K=kernel) == want
    wgrads = {share("conv2d_wgrad", stem, K=kernel) for kernel in (1, 3)}
    assert len(wgrads) == 2


def test_padding_beside_the_library_is_that_of_our_products() -> None:
    """Of L3 the 1x1 filters are left, of B nothing."""
    use = Use("4c-library", 256, True)
    of_module = dict(products.launches(GOOGLENET["4c"], 256 * 14**2, BF16, "sm_90"))
    ours = [p for name in ("L3 1x1", "L3 reduces", "L3 pool") for p in of_module[name]]
    want = 1 - sum(p.useful for p in ours) / sum(p.issued for p in ours)
    assert share("gradients (filters)", use) == want
    assert share("branches", use) is None


PROBE = """
import json
from benchmarks.static_report import padded
from fused_inception.tuning import (
    chosen, conv_heuristic, heuristic, naive_heuristic, wgrad_heuristic
)
from tests.compiled.matrix import EVERY_RUN

asked = set()

def noting(family, config):
    def ask(*args, **named):
        problem = family.problem(*args, **named)
        asked.add((family.name, problem.key))
        return config(*args, **named)
    return ask

groups = [g for name, g in EVERY_RUN.items() if name.startswith("sm_90-bf16-")]
uses = [(group.precision, *found) for group in groups for found in group.uses().items()]
for module in (conv_heuristic, heuristic, naive_heuristic, wgrad_heuristic):
    for name, family in chosen.FAMILIES.items():
        if hasattr(module, f"{name}_config"):
            setattr(module, f"{name}_config", noting(family, getattr(module, f"{name}_config")))
shares = [
    (spec.kernel, use.layer, padded(spec, precision, use))
    for precision, spec, found in uses
    for use in found
]
others = sorted(map(str, asked - chosen.problems.keys()))
print(json.dumps({"shares": shares, "asked": len(asked), "others": others}))
"""


def test_what_multiplies_has_a_share() -> None:
    """Every kernel in whose code is a product, in all launches for sm_90 in bf16, and no other one;
    the heuristics are asked for nothing that the operators' scripts do not ask."""
    found = json.loads(output_of("-W", "error", "-c", PROBE))
    multiplying = kernels_with_products()
    wrong = [
        (kernel, layer, share)
        for kernel, layer, share in found["shares"]
        if (share is not None and 0 <= share < 1) != (kernel in multiplying)
    ]
    assert not wrong
    launched = {kernel for kernel, *_ in found["shares"]}
    assert multiplying <= launched, "not launched by any layer"
    assert found["asked"] > 50
    assert not found["others"]


def kernels_with_products() -> set[str]:
    """Those of which `tl.dot` is in the code, or in that of a function they call."""
    calls: dict[str, set[str]] = {}
    for path in sources("fused_inception/kernels"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                called = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
                calls[node.name] = {ast.unparse(call.func) for call in called}

    def multiplies(name: str) -> bool:
        return name == "tl.dot" or any(map(multiplies, calls.get(name, ())))

    return {name for name in calls if name.endswith("_kernel") and multiplies(name)}


def test_what_does_not_compile_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="_branches_kernel does not compile: ValueError: no"):
        row_of("a group", "bf16", Build(SPEC, 1.0, error="ValueError: no"), USES)


def test_a_folder_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is there all the same."""
    monkeypatch.setattr(static_report, "groups_of", lambda name: [])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        static_report.main(["sm_90-bf16-3a", "--out", str(tmp_path / "file")])
    printed = capsys.readouterr()
    assert printed.out.startswith("# Compiled kernels")
    assert printed.err.endswith(f"File exists: '{tmp_path / 'file'}'\n")

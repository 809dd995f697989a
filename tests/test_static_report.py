"""The report of compiled kernels: a row a configuration, the padding behind them."""

import pytest

pytest.importorskip("triton")

from benchmarks import padding, products
from benchmarks.static_report import HEAD, markdown, padded, row_of
from fused_inception.geometry import GOOGLENET
from tests.compiled.build import Build
from tests.compiled.collect import Specialisation
from tests.compiled.machine_code import Loop, MachineCode
from tests.compiled.matrix import Use

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
USES = [Use("4d", 32, True), Use("4d", 256, True), Use("4d", 32, False), Use("3a", 1, True)]


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


@pytest.mark.parametrize("launch", ["pointwise (gemm)", "pointwise (pool)", "branches", "wgrad"])
def test_padding_of_a_row_is_that_of_its_layers(launch: str) -> None:
    """As `benchmarks.products` has it of the products of that launch."""
    for use in USES:
        dims, pixels = GOOGLENET[use.layer], use.batch * (28 if use.layer == "3a" else 14) ** 2
        of_module = dict(
            products.launches(
                dims, pixels, padding.OPERANDS["bf16"], "sm_90", training=use.training
            )
        )
        names = {
            "pointwise (gemm)": ["A"], "pointwise (pool)": ["A"], "branches": ["B 3x3", "B 5x5"],
            "wgrad": [name for name in of_module if name.startswith("L3")],
        }[launch]  # fmt: skip
        found = [p for name in names for p in of_module[name]]
        if launch.startswith("pointwise"):
            found = found[:1] if "gemm" in launch else found[1:]
        want = 1 - sum(p.useful for p in found) / sum(p.issued for p in found)
        assert padded(launch, "sm_90", "bf16", use) == want
    assert padded("relu_mask", "sm_90", "bf16", USES[0]) is None
    assert padded("branches", "sm_90", "bf16", Use("pool3", 32, True)) is None


def test_padding_of_convolutions_of_their_own() -> None:
    """1x1 of 64 to 64 fill their tiles, 192 filters a wide one and its tail, and rows of 9 * 64 no
    tiles of 128; a sum of partial results has none."""
    for layer, way, share in (("conv2", "fwd", 0), ("conv3", "fwd", 0), ("conv3", "dgrad", 0)):
        assert padded(f"conv2d_{way}", "sm_90", "bf16", Use(layer, 256, True)) == share
    assert padded("conv2d_wgrad", "sm_90", "bf16", Use("conv3", 256, True)) > 0.1
    assert padded("conv2d_finish", "sm_90", "bf16", Use("conv2", 256, True)) is None


def test_what_does_not_compile_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="_branches_kernel does not compile: ValueError: no"):
        row_of("a group", "bf16", Build(SPEC, 1.0, error="ValueError: no"), USES)

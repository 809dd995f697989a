"""The share of padding in the tiles: arithmetic, and no configuration pads more than it did."""

import json

import pytest

from benchmarks import padding
from benchmarks.padding import KEPT, Row, rows, shares, table
from benchmarks.products import launches
from fused_inception.geometry import InceptionDims
from fused_inception.tuning import heuristic
from fused_inception.tuning.configs import BranchesConfig, Tile


def test_tiles_against_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """288 columns in 2 * 128 + 32, 100 pixels in 128 rows, 144 channels of a tap in 5 * 32."""
    dims = InceptionDims(512, 112, 144, 288, 32, 64, 64)
    other = Tile(64, 64, 32)
    for tail, columns in ((32, 288), (0, 384)):
        config = BranchesConfig(Tile(128, 128, 32), tail, other, 8, 3)
        monkeypatch.setattr(heuristic, "branches_config", lambda *_, c=config: c)
        (product,) = dict(launches(dims, 100, padding.OPERANDS["bf16"], "sm_90"))["B 3x3"]
        assert product.useful == 100 * 288 * 144 * 9
        assert product.issued == 128 * columns * 160 * 9


def test_no_configuration_pads_more_than_it_did() -> None:
    kept = json.loads(KEPT.read_text())
    now = shares(list(rows()))
    assert now.keys() == kept.keys()
    more = {name: (kept[name], share) for name, share in now.items() if share > kept[name]}
    assert not more, f"{more}: if that is meant, python -m benchmarks.padding --keep"


def test_table_weighs_by_work() -> None:
    found = [
        Row("sm_90", "bf16", "3a", 1, "A", useful=50, issued=100),
        Row("sm_90", "bf16", "3a", 1, "L2", useful=300, issued=300),
    ]
    head, line = table(found).splitlines()
    assert head.split() == ["module", "batch", "A", "L2", "all"]
    assert line.split() == ["3a", "1", "50.0", "0.0", "12.5"]

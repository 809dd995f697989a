"""The share of padding in the tiles of modules: no configuration pads more than it did."""

import json

from benchmarks.padding import KEPT, Row, rows, shares, table


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
    unit, head, line = table(found).splitlines()
    assert unit == "% of the multiply-adds that are padding"
    assert head.split() == ["module", "batch", "A", "L2", "all"]
    assert line.split() == ["3a", "1", "50.0", "0.0", "12.5"]

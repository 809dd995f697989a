"""Tables of measured launches: where they are read, what of them is believed."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from fused_inception.tuning import table
from fused_inception.tuning.targets import TARGETS
from tests.tables import KEY, SM_90, contents, put

pytestmark = pytest.mark.usefixtures("own_tables")

FIELDS = {"anything": 1}


def test_without_a_file_nothing_is_found() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.lookup("branches", KEY, SM_90) is None


def test_entry_of_the_users_table_is_found() -> None:
    put(contents([{"family": "branches", "key": [*KEY], "fields": FIELDS, "run": 0}]))
    assert table.lookup("branches", KEY, SM_90) == FIELDS
    assert table.lookup("dgrad", KEY, SM_90) is None
    assert table.lookup("branches", (*KEY, 1), SM_90) is None
    assert table.lookup("branches", KEY, TARGETS["sm_80"]) is None


def test_users_table_goes_before_the_shipped_one(own_tables: Path) -> None:
    table.SHIPPED.mkdir()
    for number, path in ((1, table.SHIPPED / "sm_90.json"), (2, table.user_path("sm_90"))):
        rows = [{"family": "branches", "key": [*KEY], "fields": {"from": number}, "run": 0}]
        rows += [{"family": "wgrad", "key": [number], "fields": {"from": number}, "run": 0}]
        put(contents(rows), path)
    found = [table.lookup("branches", KEY, SM_90), table.lookup("wgrad", (1,), SM_90)]
    assert found == [{"from": 2}, {"from": 1}]


def test_a_table_is_read_once() -> None:
    assert table.lookup("branches", KEY, SM_90) is None
    put(contents([{"family": "branches", "key": [*KEY], "fields": FIELDS, "run": 0}]))
    assert table.lookup("branches", KEY, SM_90) is None
    table.forget()
    assert table.lookup("branches", KEY, SM_90) == FIELDS


def test_where_the_users_table_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_INCEPTION_CACHE", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert table.user_path("sm_90") == Path("/mine/tables/sm_90.json")
    monkeypatch.delenv("FUSED_INCEPTION_CACHE")
    assert table.user_path("sm_90") == Path("/xdg/fused_inception/tables/sm_90.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert table.user_path("sm_90") == Path("/home/me/.cache/fused_inception/tables/sm_90.json")


GOOD = {"family": "branches", "key": [*KEY], "fields": FIELDS, "run": 0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("{", "Expecting property name", id="cut-off"),
        pytest.param("", "Expecting value", id="empty"),
        pytest.param("[" * 100_000, "nested too deeply", id="nested"),
        pytest.param("9" * 10_000, "", id="huge-number"),
        pytest.param("[]", "no table of launches", id="list"),
        pytest.param(
            contents([GOOD]) | {"format": 2}, "format 2, this version reads 1", id="newer"
        ),
        pytest.param(contents([GOOD]) | {"target": "sm_80"}, "made for 'sm_80'", id="other-gpu"),
        pytest.param(contents([GOOD]) | {"entries": {}}, "must be lists", id="no-entries"),
        pytest.param(contents([GOOD]) | {"runs": None}, "must be lists", id="no-runs"),
    ],
)
def test_foreign_and_corrupt_tables_are_ignored_with_one_warning(text: Any, why: str) -> None:
    path = put(text)
    with pytest.warns(RuntimeWarning) as warned:
        assert table.lookup("branches", KEY, SM_90) is None
    # a second warning would be an error
    assert table.lookup("dgrad", KEY, SM_90) is None
    (warning,) = warned
    assert why in str(warning.message)
    assert str(path) in str(warning.message)


def test_what_is_no_text_or_no_file_is_ignored_with_a_warning() -> None:
    path = table.user_path("sm_90")
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(range(256)))
    with pytest.warns(RuntimeWarning, match="can't decode byte"):
        assert table.lookup("branches", KEY, SM_90) is None
    path.unlink()
    path.mkdir()
    table.forget()
    with pytest.warns(RuntimeWarning, match="Is a directory"):
        assert table.lookup("branches", KEY, SM_90) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"key": "x"}, id="key-no-list"),
        pytest.param({"key": [[1]]}, id="nested-key"),
        pytest.param({"fields": [1]}, id="fields-no-dict"),
        pytest.param({"run": 1}, id="unknown-run"),
        pytest.param({"family": None}, id="no-family"),
    ],
)
def test_malformed_entries_are_ignored_with_one_warning(change: dict[str, Any]) -> None:
    good = GOOD | {"key": [5]}
    put(contents([GOOD | change, good, GOOD | change, "text"]))
    with pytest.warns(RuntimeWarning, match="3 of 4 entries lack") as warned:
        assert table.lookup("branches", KEY, SM_90) is None
    assert len(warned) == 1
    assert table.lookup("branches", (5,), SM_90) == FIELDS


def test_rejected_entries_are_gone_and_warn_once_a_file() -> None:
    put(contents([GOOD, GOOD | {"key": [5]}]))
    with pytest.warns(RuntimeWarning, match=r"entry branches \[1, 2\]: too large") as warned:
        table.reject("branches", KEY, SM_90, "too large")
    assert len(warned) == 1
    table.reject("branches", (5,), SM_90, "too large")
    assert table.lookup("branches", KEY, SM_90) is None
    assert table.lookup("branches", (5,), SM_90) is None


def test_cached_functions_forget_with_the_tables() -> None:
    calls = []

    @table.cached
    def choose(n: int) -> object:
        calls.append(n)
        return table.lookup("branches", (n,), SM_90)

    assert choose(7) is None
    assert choose(7) is None
    assert calls == [7]
    with table.trying("branches", (7,), SM_90, FIELDS):
        assert choose(7) == FIELDS
    assert choose(7) is None


def test_written_tables_come_back_beside_what_was_there() -> None:
    path = table.user_path("sm_90")
    one = table.Entry("wgrad", (1, "tf32", True), {"splits": 4}, {"gpu": "a"}, {"seconds": 1e-5})
    two = table.Entry("wgrad", (2, "tf32", True), {"splits": 8}, {"gpu": "a"})
    table.write(path, "sm_90", [one, two])
    table.write(path, "sm_90", [table.Entry("wgrad", one.key, {"splits": 2}, {"gpu": "b"})])
    entries = {entry.key: entry for entry in table.read(path, "sm_90")}
    assert entries[one.key].fields == {"splits": 2}
    assert entries[one.key].run == {"gpu": "b"}
    assert entries[two.key].fields == {"splits": 8}
    assert entries[two.key].run == {"gpu": "a"}
    assert json.loads(path.read_text())["format"] == table.FORMAT
    assert [p.name for p in path.parent.iterdir()] == ["sm_90.json"]
    assert table.lookup("wgrad", one.key, SM_90) == {"splits": 2}


def test_writing_over_something_else_replaces_it_with_a_warning() -> None:
    path = put("not json")
    with pytest.warns(RuntimeWarning, match="replaced"):
        table.write(path, "sm_90", [table.Entry("wgrad", (1,), {"splits": 4})])
    assert len(table.read(path, "sm_90")) == 1


@pytest.mark.parametrize("number", ["true", "NaN", "Infinity", "-1", "0", "1" + "0" * 400])
def test_what_can_be_no_ratio_of_times(number: str) -> None:
    assert not table.is_ratio(json.loads(number))

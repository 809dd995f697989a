"""All results of one device: what the report and the targets are made from."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.providers import PROVIDERS
from benchmarks.results import Row, groups_of, of_the_format, read


@dataclass(frozen=True)
class Contest:
    """Providers of one problem that took turns.

    `graph`: those in CUDA graphs, which are compared with each other; Inductor's own graphs are
    compared with whatever is ours.
    """

    rows: dict[str, Row]
    graph: bool

    @property
    def ours(self) -> Row:
        """The fused one."""
        return self.rows["fused-graph" if self.graph else "fused"]

    @property
    def others(self) -> dict[str, Row]:
        """All but ours."""
        return {name: row for name, row in self.rows.items() if not PROVIDERS[name].fused}

    def speedup(self, name: str) -> float:
        """How many times as long as ours another one takes."""
        return self.rows[name].median_s / self.ours.median_s


@dataclass(frozen=True)
class Race:
    """All providers of one problem that took turns, in CUDA graphs and not."""

    rows: dict[str, Row]

    @property
    def problem(self) -> Row:
        """Any row: what they have in common."""
        return next(iter(self.rows.values()))

    def fastest(self, names: Iterable[str]) -> Row | None:
        """Of those of `names` that took part."""
        some = [self.rows[name] for name in names if name in self.rows]
        return min(some, key=lambda row: row.median_s, default=None)


@dataclass
class Measured:
    """What the files of a folder hold.

    Attributes:
        contests: of all rows in which ours took part.
        races: of all rows.
        parts: "complete", "sessions" and "items" of `gpu_check`'s files by part.
        environments: every different one, with the files that it stands in.
    """

    contests: list[Contest] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    environments: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Every JSON file in it, of `gpu_check`, `benchmarks.results` or `pytest --benchmark-json`.

        Raises:
            ValueError: there is none, or one is something else.
        """
        if not folder.is_dir():
            raise ValueError(f"no such folder: {folder}")
        files = sorted(folder.glob("*.json"))
        if not files:
            raise ValueError(f"{folder} holds no JSON file")
        found = cls()
        for path in files:
            head, rows = read(path)
            with of_the_format(path):
                found._add(path, head, rows)
        return found

    def _add(self, path: Path, head: dict[str, Any], rows: list[Row]) -> None:
        self.contests += contests_of(rows)
        self.races += [Race(group) for group in groups_of(rows)]
        for session in head.get("sessions", [head]):
            if "environment" in session:
                self._note(session["environment"], path.name)
        if "part" in head:
            items = json.loads(path.read_text()).get("items")
            # a file that `benchmarks.results` has trimmed has rows alone
            if items is not None:
                part = {name: head[name] for name in ("complete", "sessions")}
                self.parts[head["part"]] = part | {"items": items}

    def _note(self, environment: dict[str, Any], name: str) -> None:
        # what changes from minute to minute does not make another environment
        stable = {k: v for k, v in environment.items() if k not in ("gpu", "load_average")}
        if driver := (environment.get("gpu") or {}).get("driver_version"):
            stable["driver"] = driver
        names = self.environments.setdefault(json.dumps(stable, sort_keys=True), [])
        if name not in names:
            names.append(name)

    @property
    def device(self) -> str:
        """Its name."""
        names = {json.loads(text).get("device", "unknown") for text in self.environments}
        return " and ".join(sorted(names)) or "unknown device"

    def ceiling(self, name: str) -> float | None:
        """A figure of the part "ceilings"."""
        item = self.parts.get("ceilings", {}).get("items", {}).get(name, {})
        return item.get("value")

    def select(
        self,
        group: str,
        case: str | None = None,
        *,
        direction: str | None = None,
        batches: Iterable[int] | None = None,
        dtype: str | None = None,
    ) -> Iterator[Contest]:
        """Contests of a group; None takes all."""
        for contest in self.contests:
            row = contest.ours
            if (
                row.group == group
                and case in (None, row.case)
                and direction in (None, row.direction)
                and (batches is None or row.batch in batches)
                and dtype in (None, row.dtype)
            ):
                yield contest


def contests_of(rows: Iterable[Row]) -> list[Contest]:
    """Graphs apart from the others; those in which ours has no row are left out."""
    contests = []
    for group in groups_of(rows):
        for graph in (False, True):
            some = {name: row for name, row in group.items() if PROVIDERS[name].graph is graph}
            if graph and (own := group.get("max-autotune-cudagraphs")):
                some[own.provider] = own
            if f"fused{'-graph' * graph}" in some:
                contests.append(Contest(some, graph))
    return contests

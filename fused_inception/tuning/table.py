"""Measured winners: JSON tables that say better than a heuristic what to launch.

Two files a target are read, once, when the first launch on it asks: the one shipped beside this
file, and the user's, written by `python -m fused_inception tune`, whose entries come first. A table
or an entry that does not fit is ignored with one warning a file; then the heuristic decides.
There is no folder `tables` yet: nothing has been measured that could be shipped.

    {"format": 1, "target": "sm_90",
     "runs": [{"gpu": ..., "driver": ..., "torch": ..., "triton": ..., "date": ..., ...}],
     "entries": [{"family": "branches", "key": [...], "fields": {...}, "run": 0, ...}]}

A family is what is chosen as one, its key the problem, flat: numbers, names and flags. `run` is the
index of the run that measured the entry.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fused_inception.tuning.targets import Target

FORMAT = 1
ENVIRONMENT_VARIABLE = "FUSED_INCEPTION_CACHE"
SHIPPED = Path(__file__).parent / "tables"

Key = tuple[int | str, ...]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_lock = threading.RLock()
_loaded: dict[str, dict[tuple[str, Key], "Entry"]] = {}
_warned: set[Path] = set()
_asked: list[tuple[str, Key]] | None = None
_cached: list[Any] = []
_generation = 0


@dataclass(frozen=True)
class Entry:
    """One measured choice.

    Attributes:
        fields: what was chosen; of a launch, the fields of its configuration.
        run: the provenance of the measurement.
        facts: what was measured, for readers; nothing depends on it.
        path: the file that it came from, if any.
    """

    family: str
    key: Key
    fields: Mapping[str, Any]
    run: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None


def user_path(target: str) -> Path:
    """The user's table: in the folder that FUSED_INCEPTION_CACHE names, else in the system's cache
    folder."""
    folder = os.environ.get(ENVIRONMENT_VARIABLE)
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = str(Path(base) / "fused_inception")
    return Path(folder) / "tables" / f"{target}.json"


def lookup(family: str, key: Key, target: Target) -> Mapping[str, Any] | None:
    """What was measured to be best for the problem `key` on `target`; None where nothing was.

    The fields are as they stand in the file: who asks checks them, and calls `reject` if they are
    of no use.
    """
    if _asked is not None:
        _asked.append((family, key))
    entry = _entries(target.name).get((family, key))
    return None if entry is None else entry.fields


def has(family: str, target: Target) -> bool:
    """Whether anything was measured in `family`."""
    return any(of == family for of, _ in _entries(target.name))


def is_ratio(value: object) -> bool:
    """Whether a field can be a ratio of two times: a number that a float holds, above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max


def reject(family: str, key: Key, target: Target, why: str) -> None:
    """Forget an entry that is of no use; the first one of a file is told in a warning."""
    global _generation
    with _lock:
        entry = _entries(target.name).pop((family, key), None)
        _generation += 1
    if entry is not None and entry.path is not None:
        which = f"entry {family} {list(key)}: {why}"
        _warn(entry.path, f"{which}; such entries are ignored")


def cached(function: _Function) -> _Function:
    """functools.lru_cache for a function that calls `lookup`: it forgets what the tables do."""
    result = functools.lru_cache(maxsize=4096)(function)
    _cached.append(result)
    return result  # type: ignore[return-value]


def forget() -> None:
    """Read the tables again when they are next needed."""
    with _lock:
        _loaded.clear()
        _warned.clear()
        _forget_choices()


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[str, Key]]]:
    """Inside the block, which (family, key) is looked up, by all threads; once or more."""
    global _asked
    _forget_choices()
    _asked = []
    try:
        yield _asked
    finally:
        _asked = None


@contextlib.contextmanager
def trying(family: str, key: Key, target: Target, fields: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block `fields` are the choice for `key`, as if a table had said so."""
    entries = _entries(target.name)
    before = entries.get((family, key))

    def put(entry: Entry | None) -> None:
        with _lock:
            if entry is None:
                entries.pop((family, key), None)
            else:
                entries[family, key] = entry
            _forget_choices()

    put(Entry(family, key, fields))
    try:
        yield
    finally:
        put(before)


def generation() -> int | None:
    """Another number whenever a choice may be another; None while somebody listens to `lookup`."""
    return _generation if _asked is None else None


def _forget_choices() -> None:
    global _generation
    _generation += 1
    for function in _cached:
        function.cache_clear()


def read(path: Path, target: str) -> list[Entry]:
    """The entries of a file; one that is none is left out, with a warning.

    Raises:
        ValueError, OSError: it cannot be read, or is no table for `target` of this version.
    """
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(contents, dict):
        raise ValueError("no table of launches")
    if contents.get("format") != FORMAT:
        raise ValueError(f"format {contents.get('format')!r}, this version reads {FORMAT}")
    if contents.get("target") != target:
        raise ValueError(f"made for {contents.get('target')!r}, not for {target}")
    runs, entries = contents.get("runs"), contents.get("entries")
    if not isinstance(runs, list) or not isinstance(entries, list):
        raise ValueError("`runs` and `entries` must be lists")
    found = [_entry(row, runs, path) for row in entries]
    wrong = [row for row, entry in zip(entries, found, strict=True) if entry is None]
    if wrong:
        first = json.dumps(wrong[0])[:200]
        _warn(
            path,
            f"{len(wrong)} of {len(entries)} entries lack a family, key, fields or run and are "
            f"ignored, the first is {first}",
        )
    return [entry for entry in found if entry is not None]


def write(path: Path, target: str, entries: list[Entry]) -> None:
    """Write `entries`, with what `path` holds for other problems, in one piece.

    A file that is no table for `target` is replaced, with a warning.
    """
    try:
        before = read(path, target) if path.exists() else []
    except (ValueError, OSError) as error:
        _warn(path, f"{error}; it is replaced")
        before = []
    merged = {(e.family, e.key): e for e in (*before, *entries)}
    runs: list[Mapping[str, Any]] = []
    rows = []
    for entry in sorted(merged.values(), key=lambda e: (e.family, str(e.key))):
        if entry.run not in runs:
            runs.append(entry.run)
        row = {"family": entry.family, "key": list(entry.key), "fields": dict(entry.fields)}
        rows.append({**row, "run": runs.index(entry.run), **entry.facts})
    head = {"format": FORMAT, "target": target, "runs": [dict(run) for run in runs]}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(f'{text},\n "entries": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    partial.replace(path)


def _entries(target: str) -> dict[tuple[str, Key], Entry]:
    """Those of both files."""
    found = _loaded.get(target)
    if found is not None:
        return found
    with _lock:
        if target not in _loaded:
            entries: dict[tuple[str, Key], Entry] = {}
            for path in (SHIPPED / f"{target}.json", user_path(target)):
                entries |= {(e.family, e.key): e for e in _read_or_warn(path, target)}
            _loaded[target] = entries
        return _loaded[target]


def _read_or_warn(path: Path, target: str) -> list[Entry]:
    try:
        return read(path, target)
    except FileNotFoundError:
        return []
    except (ValueError, OSError) as error:
        _warn(path, f"{error}; it is ignored")
        return []


def _entry(row: Any, runs: list[Any], path: Path) -> Entry | None:
    rest = dict(row) if isinstance(row, dict) else {}
    family, key, fields, run = (rest.pop(name, None) for name in ("family", "key", "fields", "run"))
    known = isinstance(run, int) and 0 <= run < len(runs) and isinstance(runs[run], dict)
    plain = isinstance(key, list) and all(isinstance(part, int | str) for part in key)
    if not (isinstance(family, str) and plain and isinstance(fields, dict) and known):
        return None
    return Entry(family, tuple(key), fields, runs[run], rest, path)


def _warn(path: Path, why: str) -> None:
    with _lock:
        if path in _warned:
            return
        _warned.add(path)
    warnings.warn(f"launch table {path}: {why}", RuntimeWarning, stacklevel=2)

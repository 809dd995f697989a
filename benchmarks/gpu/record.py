"""What one part of `gpu_check` has found: a JSON file that a later run goes on with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import write

# what has to agree where a run goes on with the results of another; not the commit: there may be
# none, and files may differ from it
SAME = ("device", "driver", "torch", "triton", "cuda", "cudnn", "python", "package")
TESTED = (*SAME, "tests")
LARGEST = 16 * 2**20
# how an item ended: it has to be run again after CUT alone
PASSED, FAILED, DIED, HUNG, CUT = "passed", "failed", "died", "hung", "cut"


class MismatchError(ValueError):
    """The folder holds results of something else."""


class Record:
    """Items of a part by key, each with its status, its seconds and what it found.

    Attributes:
        items: facts by key; "status", "seconds", and the item's own.
        at: key of the item that runs now; what is found here after a process has ended did not
            finish.
        sessions: environment and command of every run that wrote here.
        complete: no item is left.
    """

    def __init__(self, path: Path, part: str, options: Mapping[str, Any]) -> None:
        self.path = path
        self.part = part
        self.options = dict(options)
        self.items: dict[str, dict[str, Any]] = {}
        self.sessions: list[dict[str, Any]] = []
        self.at: str | None = None
        self.complete = False

    @classmethod
    def read(cls, path: Path) -> "Record":
        """The record in a file.

        Raises:
            MismatchError: the file holds no record.
        """
        try:
            content = json.loads(path.read_text())
            record = cls(path, content["part"], content["options"])
            record.items, record.sessions = content["items"], content["sessions"]
            record.at, record.complete = content["at"], content["complete"]
        except (ValueError, KeyError, TypeError) as error:
            raise MismatchError(f"{path} holds no results of gpu_check: {error}") from None
        return record

    @classmethod
    def begin(
        cls, path: Path, part: str, options: Mapping[str, Any], session: dict[str, Any]
    ) -> "Record":
        """A new session: of the file at `path` if there is one, else of a new one.

        Raises:
            MismatchError: that file is of another part, environment or options.
        """
        record = cls(path, part, options)
        if path.exists():
            record = cls.read(path)
            environments = [record.sessions[0]["environment"], session["environment"]]
            theirs, ours = (_identity(part, e) for e in environments)
            theirs |= {"part": record.part, "options": record.options}
            ours |= {"part": part, "options": json.loads(json.dumps(options))}
            wrong = [k for k in ours if theirs[k] != ours[k]]
            if wrong:
                differ = "; ".join(f"{k} {theirs[k]}, now {ours[k]}" for k in wrong)
                raise MismatchError(f"{path} is of another run ({differ}): choose another --out")
        record.at = None
        record.sessions.append(session)
        record.save()
        return record

    def done(self, key: str) -> bool:
        """Nothing is left to do for this item."""
        return self.items.get(key, {"status": CUT})["status"] != CUT

    def put(self, key: str, status: str, **facts: Any) -> None:
        """What an item has found; replaces what it had found before."""
        self.items[key] = {"status": status, **facts}
        self.save()

    @property
    def failures(self) -> list[str]:
        """Keys of the items in which something failed, those among them that are not finished."""
        return [k for k, item in self.items.items() if item.get("failures")]

    def save(self) -> None:
        """Write the file.

        Raises:
            ValueError: it became too large to be brought home.
        """
        content = {
            "part": self.part,
            "complete": self.complete,
            "at": self.at,
            "options": self.options,
            "sessions": self.sessions,
            "items": self.items,
        }
        write(self.path, content)
        if self.path.stat().st_size > LARGEST:
            raise ValueError(f"{self.path} has become larger than {LARGEST} bytes")


def _identity(part: str, environment: Mapping[str, Any]) -> dict[str, Any]:
    names = TESTED if part == "parity" else SAME
    driver = (environment.get("gpu") or {}).get("driver_version")
    return {name: environment.get(name) for name in names} | {"driver": driver}

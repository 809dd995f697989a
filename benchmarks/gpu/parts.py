"""What a part is: items that are run one after another, each of which may fail alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# an item that takes longer, in all runs together, hangs; torch.compile's searches over a whole
# network take minutes, and what they have found is on disk when the time ends
ITEM_SECONDS = 900.0


@dataclass(frozen=True)
class Turn:
    """What an item is given.

    Attributes:
        end: a `time.time()` to be ready at.
        previous: facts of an earlier run that was cut; empty at first.
        others: what all items of the part have found so far, by key.
        keep: writes what is known so far, in case that the time ends.
    """

    end: float
    keep: Callable[[dict[str, Any]], None]
    previous: dict[str, Any] = field(default_factory=dict)
    others: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """`run` gives facts; "failures" among them, if any, and `"complete": False` where a later run
    has to go on."""

    key: str
    run: Callable[[Turn], dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """`items` of the command's options and the device; `share` is how much of a budget for several
    parts is for this one, beside those of the others."""

    name: str
    text: str
    items: Callable[[dict[str, Any], torch.device], list[Item]]
    item_seconds: float = ITEM_SECONDS
    share: float = 1.0


def brief(error: BaseException) -> str:
    """Kind and message, not endless."""
    return f"{type(error).__name__}: {error}"[:3000]


def say(text: str) -> None:
    """At once, whatever reads it."""
    print(text, flush=True)

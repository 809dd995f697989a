"""A module becomes one of ours in place, and goes back: its class changes and nothing else moves.

The object stays the same, so its children, parameters, buffers, hooks and mode stay where they are,
whoever refers to it sees the change, and copies and pickles of it can go back too.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Origin:
    """What a module was: its class, and the attributes that it did not have."""

    cls: type[nn.Module]
    added: tuple[str, ...]


_ORIGIN = "_fused_from"


def adopt(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make `module` a `cls`, with the attributes that a `cls` has besides its children.

    An attribute that is there already is left as it is.
    """
    added = {name: value for name, value in attributes.items() if name not in vars(module)}
    vars(module).update(added)
    vars(module)[_ORIGIN] = Origin(type(module), tuple(added))
    module.__class__ = cls


def release(module: nn.Module) -> None:
    """Make an adopted module again what it was."""
    origin = vars(module).pop(_ORIGIN)
    for name in origin.added:
        vars(module).pop(name, None)
    module.__class__ = origin.cls


def origin_of(module: nn.Module) -> Origin | None:
    """What an adopted module was; None for all others."""
    return vars(module).get(_ORIGIN)

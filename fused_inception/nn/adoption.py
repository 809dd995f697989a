"""A module becomes one of ours in place, and goes back: its class changes and nothing else moves.

The object stays the same, so its children, parameters, buffers, hooks and mode stay where they are,
whoever refers to it sees the change, and copies and pickles of it can go back too.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Origin:
    """What a module was.

    Attributes:
        cls: its class.
        became: the class that it was given.
        added: names of the attributes that it did not have.
        replaced: what it had under the names of others.
    """

    cls: type[nn.Module]
    became: type[nn.Module]
    added: tuple[str, ...]
    replaced: dict[str, Any]


_ORIGIN = "_fused_from"


def adopt(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make `module` a `cls`, with the attributes that a `cls` has besides its children.

    What the module has under one of these names is something else, and comes back with `release`.
    """
    own = vars(module)
    added = tuple(name for name in attributes if name not in own)
    replaced = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    own[_ORIGIN] = Origin(type(module), cls, added, replaced)
    module.__class__ = cls


def release(module: nn.Module) -> None:
    """Make an adopted module again what it was."""
    origin = vars(module).pop(_ORIGIN)
    for name in origin.added:
        vars(module).pop(name, None)
    vars(module).update(origin.replaced)
    module.__class__ = origin.cls


def changed_since(module: nn.Module) -> str | None:
    """What an adopted module has become behind our back, as by sharding or a parametrisation;
    None where it is still what it was made."""
    origin = origin_of(module)
    if origin is None or type(module) is origin.became:
        return None
    return type(module).__name__


def origin_of(module: nn.Module) -> Origin | None:
    """What an adopted module was; None for all others."""
    return vars(module).get(_ORIGIN)

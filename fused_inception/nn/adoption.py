"""A module becomes one of ours in place, and goes back: its class changes and nothing else moves.

The object stays the same, so its children, parameters, buffers, hooks and mode stay where they are,
whoever refers to it sees the change, and copies and pickles of it can go back too.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

_ORIGIN = "_fused_from"
# what users set on a fused block, which means nothing to what it was
_SWITCHES = ("skip_nonfinite",)


@dataclass(frozen=True)
class Origin:
    """What a module was, and what it has become.

    Attributes:
        cls, became: its class, and ours.
        ours: names of the attributes that are to go with our class.
        kept: the values that those of them had that the module had already.
    """

    cls: type[nn.Module]
    became: type[nn.Module]
    ours: tuple[str, ...]
    kept: dict[str, Any] = field(default_factory=dict)


def adopt(module: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    """Make `module` a `cls`, with the attributes that a `cls` has besides its children.

    A value that is there under one of these names may be the user's and mean anything: it comes
    back with `release`.
    """
    own = vars(module)
    ours = (*attributes, *(name for name in _SWITCHES if hasattr(cls, name)))
    kept = {name: own[name] for name in ours if name in own}
    own.update(attributes)
    own[_ORIGIN] = Origin(type(module), cls, ours, kept)
    module.__class__ = cls


def release(module: nn.Module) -> None:
    """Make an adopted module again what it was.

    Raises:
        ValueError: it is not of the class any more that `adopt` gave it; nothing is changed.
    """
    why_not = why_not_released(module)
    if why_not is not None:
        raise ValueError(f"this module {why_not}")
    origin = vars(module).pop(_ORIGIN)
    for name in origin.ours:
        vars(module).pop(name, None)
    vars(module).update(origin.kept)
    module.__class__ = origin.cls


def why_not_released(module: nn.Module) -> str | None:
    """Why an adopted module cannot go back: someone put another class on top of ours, which its
    old class would take away in silence."""
    origin = origin_of(module)
    if origin is None or type(module) is origin.became:
        return None
    undo = "what changed its class, such as FSDP's fully_shard, is to be undone"
    if "parametrizations" in module._modules:
        undo = "its parametrisations are to be removed"
    return (
        f"is a {type(module).__name__}, no longer the {origin.became.__name__} that fuse_ made: "
        f"{undo} before unfuse_, or unfuse_ comes before it"
    )


def origin_of(module: nn.Module) -> Origin | None:
    """What an adopted module was; None for all others."""
    return vars(module).get(_ORIGIN)

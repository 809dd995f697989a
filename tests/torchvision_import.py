"""torchvision beside a torch that its wheel was not built for, for comparison in tests."""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch

# torchvision registers the shapes of these operators when it is imported, and stops where its
# compiled library, which defines them, does not load; a definition is all that its networks need
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_definitions: list[torch.library.Library] = []


def import_torchvision(module: str) -> ModuleType:
    """The module named, such as "torchvision.models.googlenet"; skips where there is none."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    except RuntimeError as error:
        if _definitions or "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for operator in _OPERATORS:
        library.define(operator + _SCHEMA)
    _definitions.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return import_module(module)

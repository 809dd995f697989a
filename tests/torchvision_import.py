"""torchvision for comparison in tests; they are skipped where there is none."""

from types import ModuleType

import pytest

from fused_inception.tools import sample


def import_torchvision(module: str) -> ModuleType:
    """The module named, such as "torchvision.models.googlenet"."""
    try:
        return sample.import_torchvision(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"torchvision cannot be imported: {error}")

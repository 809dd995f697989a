"""The parts by name, in the order in which they are run: what matters most first."""

from typing import Any

import torch

from benchmarks.gpu import ceilings, correctness, forms, profiles, sanitize, search
from benchmarks.gpu.parts import Item, Part
from benchmarks.gpu.timings import items_of


def _ceilings(options: dict[str, Any], device: torch.device) -> list[Item]:
    return [*ceilings.items(options, device), *forms.items(options, device)]


# parts that are one long item go on where they were, and never hang on their own account
_UNBOUNDED = float("inf")
PARTS = {
    part.name: part
    for part in (
        Part("parity", "the kernels' tests, compiled", correctness.items, _UNBOUNDED, 3.0),
        Part("network", "whole networks", items_of("network"), share=4.0),
        Part("ceilings", "what the device can do at most", _ceilings, 120.0),
        Part("modules", "the nine modules, bias and BatchNorm", items_of("modules")),
        Part("kernels", "single operators, and the stem", items_of("kernels", "stem")),
        Part("tune", "search launches for the network's shapes", search.items, _UNBOUNDED),
        Part("profile", "kernels of a step of each provider", profiles.items),
        Part("sanitize", "compute-sanitizer on small shapes", sanitize.items, _UNBOUNDED),
    )
}

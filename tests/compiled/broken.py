"""Kernels that each break one bound, so that the check of that bound is seen to fail."""

from dataclasses import replace
from typing import Any

from fused_inception.geometry import GOOGLENET
from tests.compiled.collect import Specialisation
from tests.compiled.problems import Module, specialisations
from tests.compiled.table import launch_name


def broken_kernels() -> dict[str, Specialisation]:
    """Name of what is wrong -> a launch of module 4c, changed."""
    nvidia, amd = _launches("sm_90"), _launches("gfx942")
    branches = nvidia["branches"]
    return {
        "spills": _with(branches, P3=256, CO3=256),
        "shared-memory": _with(nvidia["dgrad"], NUM_STAGES=8),
        "no-hgmma": _with(branches, P3=32, P5=32),
        "hmma-beside-hgmma": _with(branches, P5=32),
        "unaligned-pointers": replace(branches, attributes=()),
        "odd-pixel-stride": _with(nvidia["gradients (input)"], DZ_STRIDE=513),
        "tile-no-power-of-two": _with(branches, P3=96),
        "amd-spills": replace(_with(amd["branches"], P3=256, CO3=256), num_warps=4),
        "amd-shared-memory": _with(amd["dgrad"], P3=256, CI3=256, CO3=64, NUM_STAGES=4),
        "amd-unaligned-pointers": replace(amd["branches"], attributes=()),
    }


def _launches(target: str) -> dict[str, Specialisation]:
    module = Module(GOOGLENET["4c"], batch=256, side=14)
    return {launch_name(s): s for s in specialisations(module, target, "bf16", training=True)}


def _with(spec: Specialisation, **constants: Any) -> Specialisation:
    known = dict(spec.constants)
    if unknown := constants.keys() - known.keys():
        raise KeyError(f"{spec.kernel} has no {sorted(unknown)}")
    return replace(spec, constants=tuple((known | constants).items()))

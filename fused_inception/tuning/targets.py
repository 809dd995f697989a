"""What the heuristic must know of a GPU: limits that a configuration has to respect, speeds that
rank them."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """One GPU architecture."""

    name: str
    shared_bytes: int  # largest shared memory of one program
    processors: int  # streaming multiprocessors (compute units)
    tensor_flops: float  # per second, 16-bit operands, whole GPU
    stream_bytes: float  # per second, L2 to all processors
    max_stages: int  # software pipeline depth worth having
    max_tile: int  # largest tile of 16-bit operands that compiles without spills
    # the same of a 3x3 that also takes the moments of its results
    max_moments_tile: int = 128 * 256
    memory_bytes: float = 4.3e12  # per second, device memory
    # depth in exact fp32, whose products take longer than any load
    exact_stages: int = 2
    # whether TF32 spills in what the other targets have registers for
    tf32_spills: bool = False


# shared memory: the limits of the CUDA programming guide and of CDNA3; speeds: orders of magnitude
# that rank tiles against each other, of H200, A100, L40S, B200, RTX 5090, MI300X
TARGETS = {
    t.name: t
    for t in (
        Target("sm_90", 232448, 132, 790e12, 8.0e12, 4, 128 * 256),
        Target("sm_80", 166912, 108, 280e12, 5.0e12, 4, 128 * 128, memory_bytes=1.7e12),
        Target("sm_89", 101376, 142, 330e12, 4.5e12, 3, 128 * 128, memory_bytes=0.8e12),
        Target("sm_100", 232448, 148, 1600e12, 10.0e12, 4, 128 * 128, memory_bytes=7.0e12),
        # in exact fp32 two stages would spill
        Target("sm_120", 101376, 170, 400e12, 6.0e12, 3, 128 * 128, 128 * 64, 1.6e12, 3, True),
        Target("gfx942", 65536, 304, 1000e12, 10.0e12, 2, 128 * 128, memory_bytes=4.5e12),
    )
}


@functools.cache
def _target_of_cuda(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return TARGETS["gfx942"]
    capability = properties.major * 10 + properties.minor
    # the closest known architecture that is not newer; sm_86 has the small shared memory of sm_89
    if capability >= 120:
        return TARGETS["sm_120"]
    if capability >= 100:
        return TARGETS["sm_100"]
    if capability >= 90:
        return TARGETS["sm_90"]
    if capability in (80, 87):
        return TARGETS["sm_80"]
    return TARGETS["sm_89"]


# the one tuned for stands for devices that are no GPU: the interpreter's, and tensors without data
_elsewhere = ContextVar("_elsewhere", default=TARGETS["sm_90"])


@contextlib.contextmanager
def standing_for(target: Target) -> Iterator[None]:
    """Inside the block, devices that are no GPU count as `target`."""
    token = _elsewhere.set(target)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def target_of(device: torch.device) -> Target:
    """The target of a CUDA device; of any other, sm_90 outside of `standing_for`."""
    if device.type != "cuda":
        return _elsewhere.get()
    return _target_of_cuda(torch.cuda.current_device() if device.index is None else device.index)

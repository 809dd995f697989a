"""Where and with what a number was measured."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from fused_inception.tools.sources import answer_of, digest, version_of

ROOT = Path(__file__).resolve().parent.parent
GPU_FACTS = (
    (
        *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
        *("power.draw", "power.limit", "temperature.gpu"),
    ),
    # a query of its own: older drivers refuse a whole query for a name that they do not know
    ("clocks_event_reasons.active",),
)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads, code; on CUDA also driver, clocks and what holds them back."""
    facts: dict[str, Any] = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "pytest_benchmark": version_of("pytest-benchmark"),
        "commit": _commit(),
        "package": digest(ROOT / "fused_inception"),
        "tests": digest(ROOT / "tests"),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
        facts["gpu"] = gpu_facts(device)
    return facts


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gpu_facts(device: torch.device) -> dict[str, str] | None:
    """What nvidia-smi says of the device, in its own units; None where it cannot be asked."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    # nvidia-smi does not know CUDA_VISIBLE_DEVICES, the identifier is the same for both
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid is not None else str(index)
    answers: dict[str, str] = {}
    for facts in GPU_FACTS:
        query = f"--query-gpu={','.join(facts)}"
        answer = answer_of("nvidia-smi", f"--id={which}", query, "--format=csv,noheader")
        if answer is not None:
            answers.update(zip(facts, answer.split(", "), strict=True))
    return answers or None


def _commit() -> str | None:
    """The checkout's commit, marked where tracked files differ from it; None outside of git."""
    commit = answer_of("git", "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = answer_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit} and changes" if changed else commit

"""`precompile`: all kernels of a step, compiled in parallel before the first one."""

import os
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fused_inception.ops import ahead
from fused_inception.tools.blocks import unwrapped
from fused_inception.tuning.targets import target_of

# more processes than this wait for their imports rather than for the compiler
MAX_WORKERS = 32


@dataclass(frozen=True)
class PrecompileReport:
    """What `precompile` did.

    Attributes:
        kernels: specialisations of our Triton kernels that the step needs and this process had not
            launched before.
        compiled: how many of them were compiled now.
        seconds: that all took.
        workers: processes that compiled.
        errors: of kernels that do not compile, by name.
        reason: why there was nothing to do; empty where there was.
    """

    kernels: int = 0
    compiled: int = 0
    seconds: float = 0.0
    workers: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def cached(self) -> int:
        """Kernels that were in Triton's cache on disk."""
        return self.kernels - self.compiled - len(self.errors)

    def __str__(self) -> str:
        if self.reason:
            return f"precompile: nothing to do, {self.reason}"
        lines = [
            f"precompile: {self.kernels} kernels, {self.compiled} compiled by {self.workers} "
            f"processes, {self.cached} from Triton's cache, {self.seconds:.1f} s"
        ]
        lines += [f"{kernel} does not compile: {error}" for kernel, error in self.errors.items()]
        return "\n".join(lines)


def precompile(model: nn.Module, x: Tensor, *, workers: int | None = None) -> PrecompileReport:
    """Compile every Triton kernel of ours that `model` needs for a batch like `x`, in parallel.

    In training mode with gradients enabled these are the kernels of forward and backward, else
    those of inference. Autocast and backend are those in force. Kernels go to Triton's cache on
    disk, where the first step, of this process or another, finds them.

    A copy of `model` without data is traced to find them: parameters, gradients, statistics, random
    numbers and device memory stay as they are. Other batch sizes whose pixels round up to the same
    power of two need the same kernels.

    Args:
        model: fused or not; wrappers of DistributedDataParallel and torch.compile are looked
            through.
        x: its one argument, on its device; only shape, strides and dtype matter. On another than a
            CUDA device nothing is compiled, and the report says so.
        workers: processes that compile (default: one a processor).

    Raises:
        RuntimeError: the model decides by values what it does, so it cannot be traced.
        BackendError, TypeError: the backend in force cannot compute it; no module, no tensor.
    """
    start = time.perf_counter()
    model = unwrapped(model)
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.device.type != "cuda":
        return PrecompileReport(reason=f"{x.device.type} tensors launch no compiled kernel")
    training = model.training and torch.is_grad_enabled()
    calls = ahead.calls_of(model, x, training=training)
    if not any(call.launches for call in calls):
        return PrecompileReport(reason="the model launches no kernel of ours for this input")
    if workers is None:
        workers = min(MAX_WORKERS, processors())
    # here, as it loads Triton
    from fused_inception.ops.ahead_triton import compile_kernels, kernels_of

    with torch.cuda.device(x.device):
        specs = kernels_of(calls, target_of(x.device))
        compiled, errors = compile_kernels(specs, workers)
    return PrecompileReport(
        kernels=len(specs),
        compiled=len(compiled),
        seconds=time.perf_counter() - start,
        workers=min(workers, len(compiled) + len(errors)),
        errors=errors,
    )


def announce_precompiled(model: nn.Module, x: Tensor) -> None:
    """`precompile` in front of a command's own pass: its report is printed where kernels were
    needed."""
    try:
        report = precompile(model, x)
    except (RuntimeError, TypeError):
        return  # the pass itself compiles what it launches, or says what is wrong
    if report.kernels:
        print(report, flush=True)


def processors() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

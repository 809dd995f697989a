"""The blocks of a model as `verify` and `explain` see them: which run fused, by which path, why."""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.adapters.fuse import check_module
from fused_inception.adapters.ours import FUSED
from fused_inception.adapters.report import ALREADY_FUSED, FusionReport
from fused_inception.backend import choose, selected, why_no_triton
from fused_inception.tools.errors import out_of_memory

TRITON, ATEN, LAYERS = "Triton", "ATen", "layers"


@dataclass(frozen=True)
class Path:
    """How a block computes: "Triton" (our kernels), "ATen" (as one function, of PyTorch's own
    operators), "layers" (PyTorch, layer by layer), and why."""

    name: str
    reason: str


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile's wrapper.

    Raises:
        TypeError: `model` is no module.
    """
    check_module(model)
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def fused_blocks(report: FusionReport) -> list[str]:
    """Names of the blocks that are fused once `fuse_` has given this report."""
    before = [name for name, why in report.skipped.items() if why.startswith(ALREADY_FUSED)]
    return [*report.fused, *before]


def path_of(block: Any, x: Tensor) -> Path:
    """How `block` computes for such an input, under the backend and autocast in force.

    Raises:
        BackendError, TypeError: the backend in force cannot compute it.
    """
    if type(block) not in FUSED:
        return Path(LAYERS, "not fused")
    obstacle = block._obstacle()
    if obstacle is not None:
        return Path(LAYERS, obstacle)
    name, device = selected(), x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if choose(name, x.device, dtype) == "triton":
        reason = why_no_kernel(block)
        return Path(TRITON, f"backend {name}, {device}") if reason is None else Path(ATEN, reason)
    if name == "torch":
        return Path(ATEN, "backend torch")
    if dtype == torch.float64:
        return Path(ATEN, "float64")
    reason = why_no_triton(x.device) if device == "cuda" else None
    return Path(ATEN, reason or f"{device} tensors")


def why_no_kernel(block: nn.Module) -> str | None:
    """Why a block of ours runs through ATen on every device; None where it has kernels, or its
    layers compute."""
    computes = getattr(block, "_obstacle", lambda: None)()
    return None if computes else getattr(block, "_no_kernel", lambda: None)()


def setting_of(model: nn.Module, x: Tensor) -> str:
    """Model, mode, dtype, shape and device, in words."""
    dtype = str(x.dtype).removeprefix("torch.")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype += f" (autocast {str(torch.get_autocast_dtype(device)).removeprefix('torch.')})"
    mode = "training" if model.training else "eval"
    return f"{type(model).__name__}, {mode}, {dtype} {list(x.shape)}, {x.device}"


@contextmanager
def hooked(
    model: nn.Module, names: Sequence[str], see: Callable[[str, nn.Module, Tensor, Any], None]
) -> Iterator[None]:
    """Inside the block, `see(name, block, input, output)` is called when a block has run."""
    with ExitStack() as stack:
        for name in names:

            def hook(block: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if args and isinstance(args[0], Tensor):
                    see(name, block, args[0], output)

            stack.enter_context(_handle(model.get_submodule(name), hook))
        yield


@contextmanager
def _handle(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Random numbers go on afterwards as if nothing had been drawn, PyTorch's, Python's and
    NumPy's; gradients can be computed."""
    numpy = sys.modules.get("numpy")
    theirs, numpys = random.getstate(), numpy and numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=_gpus()),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        random.setstate(theirs)
        if numpy is not None:
            numpy.random.set_state(numpys)


def seed() -> None:
    """Start all generators that `undisturbed` gives back, and no others.

    Not torch.manual_seed: where CUDA has not started, it leaves it a seed to start from.
    """
    torch.default_generator.manual_seed(0)
    for i in _gpus():
        torch.cuda.default_generators[i].manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def drawn_so_far() -> list[Tensor]:
    """The states of PyTorch's generators: equal ones mean that nothing was drawn in between."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in _gpus())]


def _gpus() -> Sequence[int]:
    """All, whatever device a batch is on: seeding reaches every one."""
    return range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: `model` cannot be copied; names what of it.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(
            f"this {type(model).__name__} cannot be deep-copied, and only copies of it are run: "
            f"{_culprit(model)}{type(error).__name__}: {error}"
        ) from error


def _culprit(model: nn.Module) -> str:
    """The first attribute that cannot be copied on its own."""
    for name, module in model.named_modules():
        groups = ("_modules", "_parameters", "_buffers")
        own = {key: value for key, value in vars(module).items() if key not in groups}
        for key, value in (own | module._parameters | module._buffers).items():
            try:
                copy.deepcopy(value)
            except Exception:
                return f"{name}.{key}: " if name else f"{key}: "
    return ""


def check_batch(x: object) -> None:
    """`x` is what a model of one argument takes.

    Raises:
        TypeError: it is no tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"x must be a torch.Tensor, the only argument of the model, got {type(x).__name__}"
        )


def tensors_of(output: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Floating-point tensors in tensors, tuples, lists and dicts, with a path to each."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_of(value, f"{name}.{key}")
    elif isinstance(output, list | tuple):
        for i, value in enumerate(output):
            yield from tensors_of(value, f"{name}.{i}")

"""Which implementation runs, and why."""

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

Implementation = Literal["torch", "triton"]
_P = ParamSpec("_P")
_T = TypeVar("_T")

NAMES = ("auto", "triton", "torch")
OLDEST_CAPABILITY = (8, 0)
# of a map: kernels count them in 32 bits, and with the last program some that are not there
MOST_PIXELS = 2**31 - 2**20
_ASSUMED = "triton, assumed"
ENVIRONMENT_VARIABLE = "FUSED_INCEPTION_BACKEND"
_ENVIRONMENT_KEY = os.environ.encodekey(ENVIRONMENT_VARIABLE)

# looked for, not imported: the package must import without it
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class BackendError(RuntimeError):
    """The requested backend cannot run here."""


class _Context(threading.local):
    """The name that the innermost `backend` block of this thread set; None outside of all."""

    def __init__(self) -> None:
        # once per thread; torch.compile guards on an instance attribute, not on a class default
        self.name: str | None = None


_context = _Context()
_warned: set[str] = set()


class backend:  # noqa: N801, used as a function
    """Choose the implementation for the calls inside a `with` block.

    "auto" takes Triton for CUDA tensors, of GPUs of compute capability 8.0 or newer, and ATen,
    PyTorch's own operators, for all others; "triton" insists on Triton, on CPU tensors through its
    interpreter (TRITON_INTERPRET=1); "torch" takes ATen everywhere. The block beats the environment
    variable FUSED_INCEPTION_BACKEND; both are read at each call. It holds for the thread that
    entered it. What forward chose, its backward uses, wherever that runs.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self._outer: list[str | None] = []

    def __enter__(self) -> "backend":
        self._outer.append(_context.name)
        _context.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _context.name = self._outer.pop()


class assume_triton(backend):  # noqa: N801, used as a function
    """Inside the block, the choices of a machine with a GPU, for tensors without data wherever they
    are: nothing could run."""

    def __init__(self) -> None:
        super().__init__("triton")
        self.name = _ASSUMED


def selected() -> str:
    """The name in force in this thread: the innermost block's, the environment's or "auto"."""
    if _context.name is not None:
        return _context.name
    name = _environment()
    if name == "":
        return "auto"
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def resolve(x: Tensor) -> Implementation:
    """The implementation for `x` under the backend in force.

    Raises:
        ValueError: the environment variable holds an unknown name.
        TypeError: the backend is "triton" and `x` is float64.
        BackendError: the backend is "triton" and Triton cannot run on the device of `x`, or has no
            kernel for so many pixels.
    """
    name = selected()
    # what `choose` would say, without its strings and devices
    if name == "auto" and _is_cpu(x):
        return "torch"
    impl = choose(name, x.device, x.dtype)
    # a compiler would guard on the size
    if impl == "triton" and not torch.compiler.is_compiling() and x.numel() > MOST_PIXELS:
        pixels = x.numel() // x.shape[1]
        if pixels > MOST_PIXELS:
            reason = f"{pixels} pixels: kernels count to {MOST_PIXELS}"
            return where_it_has_kernels(impl, "map", reason)
    return impl


def _is_cpu(x: Tensor) -> bool:
    return x.is_cpu


def choose(name: str, device: torch.device, dtype: torch.dtype) -> Implementation:
    """The rules behind `resolve`."""
    if name == "torch":
        return "torch"
    if name == _ASSUMED and dtype != torch.float64:
        return "triton"
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return "torch"
        reason = why_no_triton(device)
        if reason is not None:
            _warn_once(f"{reason}: CUDA tensors take PyTorch's own operators")
            return "torch"
        return "triton"
    if dtype == torch.float64:
        raise TypeError(
            'backend "triton" computes in float16, bfloat16 or float32, got float64; '
            'backend "auto" or "torch" computes it with PyTorch\'s own operators'
        )
    if not TRITON_INSTALLED:
        raise BackendError('backend "triton" needs Triton, which is not installed: install triton')
    if device.type == "cpu" and not _interpreter_is_on():
        raise BackendError(
            'backend "triton" runs on CPU tensors only through Triton\'s interpreter: set '
            "TRITON_INTERPRET=1 before the process starts, or move the tensors to a CUDA device"
        )
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f'backend "triton" needs CUDA or CPU tensors, got {device.type}')
    if device.type == "cuda" and (reason := why_no_triton(device)) is not None:
        raise BackendError(f'backend "triton" cannot run on {device}: {reason}')
    return "triton"


def where_it_has_kernels(impl: Implementation, what: str, reason: str | None) -> Implementation:
    """`impl`, but ATen where `reason` says why no kernel computes `what`.

    Raises:
        BackendError: there is none, and the backend in force is "triton".
    """
    if impl == "torch" or reason is None:
        return impl
    if selected() == "triton":
        raise BackendError(f'backend "triton" has no kernel for this {what}: {reason}')
    return "torch"


def why_no_triton(device: torch.device) -> str | None:
    """Why the kernels cannot run on a CUDA device, or should not; None where they can."""
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    return _why_too_old(device.index)


def _environment() -> str:
    """The value of the environment variable; empty where it is not set."""
    # Dynamo guards on a plain dict, so a later change recompiles; through os.environ's own methods,
    # which also take eight times as long, it would not notice that the variable appears or goes
    value = os.environ._data.get(_ENVIRONMENT_KEY)  # type: ignore[attr-defined]
    return "" if value is None else os.environ.decodevalue(value)


def constant_when_compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """torch.compiler.assume_constant_result, which would import the compiler with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _interpreter_is_on() -> bool:
    # constant for a process: kernels are decorated for one mode when they are first imported
    import triton

    return bool(triton.knobs.runtime.interpret)


@constant_when_compiled
def _why_too_old(index: int | None) -> str | None:
    # as a whole: torch.compile of torch 2.11 cannot compare what a constant function gives
    capability = _capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    # older ones have no bf16 and TF32 units; Triton compiles for them, but without tensor cores
    oldest, got = (".".join(map(str, of)) for of in (OLDEST_CAPABILITY, capability))
    return f"kernels need a GPU of compute capability {oldest} or newer, got {got}"


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Of a CUDA device; the oldest that will do where there is none, for tensors without data."""
    return (
        torch.cuda.get_device_capability(index) if torch.cuda.is_available() else OLDEST_CAPABILITY
    )


@constant_when_compiled
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)

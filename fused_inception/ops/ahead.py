"""Which of our operators a model calls, and their implementations, on tensors without data."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_inception.ops.nested import tensors_in
from fused_inception.ops.registration import IMPLEMENTATIONS


@dataclass(frozen=True)
class Layout:
    """A tensor without its data."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in its storage, elements
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """One like it on the device "meta", where addresses start at 0 and so show alignment."""
        extent = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
        memory = torch.empty(self.offset + extent, dtype=self.dtype, device="meta")
        return memory.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]  # tensors as `Layout`, lists as tuples

    def run(self) -> None:
        """Run the implementation on tensors without data; its results are of no use."""
        with _Implementing():
            self.op(*(_thawed(arg) for arg in self.args))

    def results(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Run the implementation on the tensors `args`; the output, or all gradients."""
        with torch.no_grad():
            results = IMPLEMENTATIONS[self.op](*args)
        if not self.backward and isinstance(results, tuple):
            results = results[:1]  # the others are what is saved
        return [y for y in tensors_in(results) if y.is_floating_point()]

    @property
    def backward(self) -> bool:
        """Whether it computes gradients."""
        return self.op._schema.name.endswith("_backward")

    @property
    def launches(self) -> bool:
        """Whether that is a script of launches."""
        return not any(isinstance(arg, str) and arg == "torch" for arg in self.args)


def calls_of(model: nn.Module, x: Tensor, *, training: bool) -> list[Call]:
    """The calls of our operators in one pass of `model` over `x`, forward and, in training, back;
    each once.

    A copy of `model` runs, whose parameters and buffers have no data: nothing is computed or
    allocated, no random number is drawn, and `model` stays as it is.

    Raises:
        RuntimeError: the model cannot run without data, as its values decide what it does.
    """
    # here, as torch loads it lazily
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(t): fakes.from_tensor(t) for t in tensors}
    fake_model = copy.deepcopy(model, memo)
    fake_x = fakes.from_tensor(x)
    listening = _Listening()
    with warnings.catch_warnings():
        # addresses of such tensors are asked for, and are 0
        warnings.filterwarnings("ignore", "Accessing the data pointer", UserWarning)
        try:
            with torch.set_grad_enabled(training), fakes, listening:
                _pass(fake_model, fake_x, training)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            what = type(model).__name__
            raise RuntimeError(f"{what} does not run without data: {error}") from error
    return list(listening.calls)


def calls_with_tensors(
    model: nn.Module, x: Tensor, *, training: bool
) -> dict[Call, tuple[Any, ...]]:
    """The same of a pass that really runs, and the arguments of each call as they were. Gradients
    go to the parameters of `model`, which is as a training step leaves it."""
    listening = _Listening()
    with torch.set_grad_enabled(training), listening:
        _pass(model, x, training)
    return listening.calls


def _pass(model: nn.Module, x: Tensor, training: bool) -> None:
    outputs = model(x)
    roots = [y for y in tensors_in(outputs) if y.requires_grad] if training else []
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(y) for y in roots])


class _Listening(TorchDispatchMode):
    """Keeps the calls of our operators, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Call, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in IMPLEMENTATIONS:
            self.calls.setdefault(Call(func, tuple(_frozen(arg) for arg in args)), args)
        return func(*args, **(kwargs or {}))


class _Implementing(TorchDispatchMode):
    """Runs implementations where tensors without data would only have their shapes computed."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func not in IMPLEMENTATIONS:
            return func(*args, **(kwargs or {}))
        with self:  # an operator may be built on another
            return IMPLEMENTATIONS[func](*args)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        strides = value.stride()
        return Layout(tuple(value.shape), strides, int(value.storage_offset()), value.dtype)
    return tuple(_frozen(part) for part in value) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, Layout):
        return value.empty()
    return [_thawed(part) for part in value] if isinstance(value, tuple) else value

"""Scripts that are replayed: what they launch, and on which memory, is recorded once.

A script of launches does the same for arguments that are alike: in Python that takes 20 to 50 us a
launch. The second call with such arguments is recorded, those behind it only allocate and launch.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fused_inception.ops.problem import allows_tf32
from fused_inception.tuning import dispatch, table

# calls that are remembered; more are of somebody whose sizes never repeat
MOST = 4096
_ATEN = torch.ops.aten
# operator -> whether what it makes is zero
_FACTORIES = {
    _ATEN.empty.memory_format: False,
    _ATEN.empty_strided.default: False,
    _ATEN.empty_like.default: False,
    _ATEN.new_empty.default: False,
    _ATEN.new_empty_strided.default: False,
    _ATEN.zeros.default: True,
    _ATEN.zeros_like.default: True,
    _ATEN.new_zeros.default: True,
}
_PLAIN = (Tensor, torch.nn.Parameter)
_OPTIONS = (bool, int, str)
_LISTS = (list, tuple, torch.Size)
_SEEN = object()
# types of devices
DEVICES = frozenset({"cuda"})


def _empty_on(kind: str) -> Callable[..., Tensor]:
    """`torch.empty_strided(size, stride, dtype)` on the current device of a type, as Inductor's
    programs call it where PyTorch has that: in half the time, 260 times in a training step."""
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{kind}", None)
    return fast or (lambda *args: torch.empty_strided(*args[:2], dtype=args[2], device=kind))


_EMPTY = {kind: _empty_on(kind) for kind in ("cuda", "cpu")}


class Address(NamedTuple):
    """An argument of a launch that is a tensor: some bytes behind the start of a slot."""

    slot: int
    offset: int


@dataclass(frozen=True)
class Buffer:
    """Memory that a script asks for."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    zero: bool

    def make(self, empty: Callable[..., Tensor]) -> Tensor:
        """The memory, by one of _EMPTY."""
        made = empty(self.size, self.stride, self.dtype)
        return made.zero_() if self.zero else made


@dataclass(frozen=True)
class View:
    """A tensor that a script returns."""

    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # in elements
    whole: bool  # the slot as it is


@dataclass
class Step:
    """One launch, what is made ahead of it, and what is freed behind it."""

    launch: Callable[[tuple[int, ...], int, Sequence[Any]], None]  # `relaunch.Known.launch`
    grid: tuple[int, ...]
    arguments: list[Any]
    buffers: list[Buffer]
    ends: list[int]


@dataclass(frozen=True)
class Recording:
    """What one call of a script did, for arguments that are like its own."""

    device: torch.device
    slots: int  # the arguments', then those that it makes
    steps: list[Step]
    rest: list[Buffer]  # of which no launch knows
    outputs: Any

    def replay(self, tensors: Sequence[Tensor]) -> Any:
        """The same with these tensors."""
        from fused_inception.kernels import launch, relaunch

        device = self.device
        if not launch.is_current(device):
            with torch.cuda.device(device):
                return self.replay(tensors)
        stream, empty = relaunch.stream_on(device), _EMPTY[device.type]
        memory: list[Any] = [*tensors, *[None] * (self.slots - len(tensors))]
        for step in self.steps:
            for buffer in step.buffers:
                memory[buffer.slot] = buffer.make(empty)
            step.launch(step.grid, stream, addresses(step.arguments, memory))
            for slot in step.ends:
                memory[slot] = None
        for buffer in self.rest:
            memory[buffer.slot] = buffer.make(empty)
        return _filled(self.outputs, memory)


def addresses(arguments: Sequence[Any], memory: Sequence[Any]) -> list[Any]:
    """Arguments of a launch, with numbers in the place of tensors."""
    # a loop in one expression: at every launch, over up to 120 tensors
    return [
        memory[a[0]].data_ptr() + a[1]
        if type(a) is Address
        else tuple(addresses(a, memory))
        if type(a) is tuple
        else a
        for a in arguments
    ]


def _filled(outputs: Any, memory: Sequence[Any]) -> Any:
    if type(outputs) is View:
        held = memory[outputs.slot]
        if outputs.whole:
            return held
        return held.as_strided(outputs.size, outputs.stride, outputs.offset)
    if isinstance(outputs, list | tuple):
        return type(outputs)(_filled(part, memory) for part in outputs)
    return outputs


class _CannotRecordError(Exception):
    """Why a call cannot be replayed: it did what is no launch, or read memory of its own."""


class _Recorder(TorchDispatchMode):
    """Watches one call of a script."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.why_not: str | None = None
        self.never = False
        self.made: list[Buffer] = []
        self.steps: list[Step] = []
        self.starts: list[int] = []  # addresses of slots
        # storage -> slots in it; weak references, so that memory is freed when the script frees it,
        # and none is taken for another
        self.slots_of: dict[int, list[int]] = {}
        self.storages: list[StorageWeakRef] = []
        for tensor in tensors:
            self._own(tensor)

    def _own(self, tensor: Tensor) -> None:
        """The next slot."""
        storage = tensor.untyped_storage()
        self.slots_of.setdefault(storage._cdata, []).append(len(self.starts))
        self.storages.append(StorageWeakRef(storage))
        self.starts.append(tensor.data_ptr())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _FACTORIES:
            slot, size, stride = len(self.starts), tuple(result.shape), result.stride()
            self.made.append(Buffer(slot, size, stride, result.dtype, _FACTORIES[func]))
            self._own(result)
        elif func._schema.is_mutable or not all(map(self._knows, _parts_of(result))):
            self.refuse(f"{func} is no launch")
        return result

    def _knows(self, part: Any) -> bool:
        return isinstance(part, Tensor) and part.untyped_storage()._cdata in self.slots_of

    def refuse(self, why: str) -> None:
        """The call cannot be replayed."""
        self.why_not = self.why_not or why

    def launched(self, launch: Any, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """As `launch.Watcher` has it."""
        if launch is None:
            self.refuse("Triton itself has to launch")
            return
        try:
            self.steps.append(
                Step(launch.launch, grid, [self._argument(arg) for arg in args], [], [])
            )
        except _CannotRecordError as error:
            self.refuse(str(error))

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            slot = self._slot_of(arg)
            return Address(slot, arg.data_ptr() - self.starts[slot])
        return tuple(map(self._argument, arg)) if type(arg) is tuple else arg

    def _slot_of(self, tensor: Tensor) -> int:
        """The only one that holds the start of `tensor`."""
        found = self.slots_of.get(tensor.untyped_storage()._cdata, [])
        if len(found) > 1:  # arguments, then: what is made has a storage of its own
            found = [slot for slot in found if _holds(self.tensors[slot], tensor.data_ptr())]
        if len(found) != 1:
            raise _CannotRecordError("a tensor is neither an argument nor made on the way")
        return found[0]

    def _view(self, output: Any) -> Any:
        if isinstance(output, list | tuple):
            return type(output)(map(self._view, output))
        if not isinstance(output, Tensor):
            return output
        slot, first = self._slot_of(output), len(self.tensors)
        if slot < first or self.made[slot - first].dtype != output.dtype:
            raise _CannotRecordError("an output is an argument, or of another dtype than made")
        made = self.made[slot - first]
        size, stride, offset = tuple(output.shape), output.stride(), int(output.storage_offset())
        whole = (size, stride, offset) == (made.size, made.stride, 0)
        return View(slot, size, stride, offset, whole)

    def recording(self, outputs: Any) -> Recording:
        """What the call did.

        Raises:
            _CannotRecordError: it cannot be replayed.
        """
        returned = self._view(outputs)
        if self.why_not is not None:
            raise _CannotRecordError(self.why_not)
        kept = {view.slot for view in _parts_of(returned) if type(view) is View}
        first: dict[int, Step] = {}
        last: dict[int, Step] = {}
        for step in self.steps:
            for address in _parts_of(step.arguments):
                if type(address) is Address:
                    first.setdefault(address.slot, step)
                    last[address.slot] = step
        rest = []
        for buffer in self.made:
            if buffer.slot in first:
                first[buffer.slot].buffers.append(buffer)
                if buffer.slot not in kept:
                    last[buffer.slot].ends.append(buffer.slot)
            elif buffer.slot in kept:
                rest.append(buffer)
        return Recording(self.tensors[0].device, len(self.starts), self.steps, rest, returned)


def _holds(tensor: Tensor, address: int) -> bool:
    """Whether `address` lies between the first and the last element."""
    if not tensor.numel():
        return False
    span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start <= address < start + (span + 1) * tensor.element_size()


def _parts_of(value: Any) -> Iterator[Any]:
    if type(value) in (list, tuple):
        for part in value:
            yield from _parts_of(part)
    else:
        yield value


# script and all that matters of a call's arguments -> what was recorded, None where that cannot
# be, _SEEN behind the first such call
_known: dict[Any, Any] = {}
# scripts with options with which nothing is recorded, ever
_never: set[Any] = set()
_recorder: ContextVar[_Recorder | None] = ContextVar("_recorder", default=None)


def replayed(script: Callable[..., Any]) -> Callable[..., Any]:
    """`script`, replayed on GPUs where its arguments are like those of calls before: tensors of the
    same shapes, strides, dtypes and alignments, everything else equal.

    Its launches, and the memory between them, depend on nothing else. What does anything else than
    launching on its arguments and on memory of its own is run as it is.
    """

    @functools.wraps(script)
    def run(*args: Any) -> Any:
        options = script, *[a for a in args if type(a) in _OPTIONS]
        if options in _never or not _may_replay(args):
            return script(*args)
        tensors: list[Tensor] = []
        try:
            key = script, _settings(), *[_kind_of(a, tensors) for a in args]
        except _CannotRecordError:
            return script(*args)
        known = _known.get(key)
        if isinstance(known, Recording):
            return known.replay(tensors)
        if known is not _SEEN:
            # the first call may have to compile kernels
            if key not in _known:
                _remember(key, _SEEN)
            return script(*args)
        recorder = _Recorder(tensors)
        outputs = _watch(recorder, script, args)
        try:
            _remember(key, recorder.recording(outputs))
        except _CannotRecordError:
            _remember(key, None)
            if recorder.never:
                _never.add(options)
        return outputs

    return run


def _remember(key: Any, what: Any) -> None:
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = what


def _may_replay(args: Sequence[Any]) -> bool:
    """Whether tensors are a GPU's, and nobody watches what scripts do."""
    first = next((t for a in args for t in _parts_of(a) if isinstance(t, Tensor)), None)
    return (
        first is not None
        and first.device.type in DEVICES
        and dispatch.is_usual()
        and not _is_watched()
    )


def why_not() -> str:
    """Why nothing is replayed on GPUs; empty if it is. Triton must be installed."""
    from fused_inception.kernels import relaunch

    return relaunch.why_not()


def _is_watched() -> bool:
    from fused_inception.kernels import launch

    return launch.is_watched()


def _watch(recorder: _Recorder, script: Callable[..., Any], args: Sequence[Any]) -> Any:
    """What the script returns."""
    from fused_inception.kernels import launch

    token = _recorder.set(recorder)
    try:
        with launch.watched(recorder.launched), recorder:
            return script(*args)
    finally:
        _recorder.reset(token)


def refuse(why: str) -> None:
    """The call that is being recorded in this thread, if any, is never replayed, nor any with these
    options."""
    recorder = _recorder.get()
    if recorder is not None:
        recorder.refuse(why)
        recorder.never = True


def _settings() -> tuple[Any, ...]:
    """All that scripts depend on beside their arguments.

    Raises:
        _CannotRecordError: somebody must see what they do.
    """
    from fused_inception.kernels import relaunch

    of_triton, generation = relaunch.settings(), table.generation()
    if of_triton is None or generation is None:
        raise _CannotRecordError("hooks of launches, or a listener to tables")
    return *of_triton, generation, allows_tf32()


def _kind_of(arg: Any, tensors: list[Tensor]) -> Any:
    """All that a script can see of an argument without reading its memory; tensors are collected.

    Raises:
        _CannotRecordError: what it sees is unknown here.
    """
    kind = type(arg)
    if kind in _PLAIN:
        tensors.append(arg)
        return arg.dtype, arg.shape, arg.stride(), arg.data_ptr() & 15, arg.device
    if kind in _LISTS:
        return tuple([_kind_of(part, tensors) for part in arg])
    if kind in _OPTIONS or arg is None or kind is float:
        return arg
    if kind is dict:
        return tuple([(name, _kind_of(part, tensors)) for name, part in arg.items()])
    if is_dataclass(arg):
        try:
            hash(arg)
        except TypeError:  # lists or dicts inside, of tensors perhaps
            return kind, *[_kind_of(getattr(arg, f.name), tensors) for f in fields(arg)]
        return arg
    raise _CannotRecordError(f"no rule for a {kind.__name__}")

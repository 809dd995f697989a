"""Memory as kernels use it, watched in Triton's interpreter.

Inside `watched()` a launch runs on copies of its tensors that lie far apart. What its masks let
through must

- touch a view that the launch was given, between its first and its last element;
- not read what a program of the launch has written, itself included: programs run in any order, and
  threads of one do not wait for each other;
- not write what a program has written or read, but for a lane that writes where it has read;
- be one value where lanes write to one place.

A sanitizer on a GPU sees the first where memory behind a tensor is nobody's, and none of the others
where programs do not happen to meet.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

GAP = 2**20  # bytes that are nobody's, before and behind a tensor
LARGEST = 2**28  # bytes of a tensor; a launch with a larger one is not watched
ALIGNMENT = 512  # a copy lies as its original does, modulo that
NOBODY, MANY = -1, -2


class MemoryMisuseError(AssertionError):
    """What a launch did to memory that it should not have done."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Inside the block, kernels that the interpreter runs are watched.

    Raises:
        MemoryMisuseError: at the end of a launch.
    """
    with pytest.MonkeyPatch.context() as patch:
        _Watch(patch)
        yield


@dataclass(frozen=True)
class Traffic:
    """Distinct bytes that a launch read, and wrote."""

    kernel: str
    read: int
    written: int


_open: list[list[Traffic]] = []


@contextlib.contextmanager
def traffic() -> Iterator[list[Traffic]]:
    """Collect the traffic of every launch inside the block, which is itself inside `watched()`."""
    _open.append([])
    try:
        yield _open[-1]
    finally:
        _open.pop()


class _Region:
    """The copy of a storage, and which programs have touched its elements."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.original = storage
        size = storage.nbytes()
        self.memory = torch.empty(size + 2 * GAP + ALIGNMENT, dtype=torch.uint8)
        shift = (storage.data_ptr() - self.memory.data_ptr() - GAP) % ALIGNMENT
        self.start = GAP + shift
        self.address = self.memory.data_ptr() + self.start
        self.bytes = self.memory[self.start : self.start + size]
        self.bytes.copy_(_bytes_of(storage))
        self.views: list[tuple[int, int, str]] = []  # first byte, end, argument
        self.unit = 16  # bytes of the smallest element

    def view(self, tensor: Tensor, argument: str) -> Tensor:
        """The tensor, in the copy."""
        size = tensor.element_size()
        first = tensor.storage_offset() * size
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            self.views.append((first, first + (last + 1) * size, argument))
        self.unit = min(self.unit, size)
        offset = (self.start + first) // size
        copy = torch.empty(0, dtype=tensor.dtype)
        return copy.set_(self.memory.untyped_storage(), offset, tensor.shape, tensor.stride())

    def begin(self) -> None:
        """Nobody has touched anything."""
        units = self.bytes.numel() // self.unit
        self.writer = np.full(units, NOBODY, np.int32)
        self.reader = np.full(units, NOBODY, np.int32)
        self.lane = np.full(units, NOBODY, np.int32)  # of its program, that has read

    def give_back(self) -> None:
        _bytes_of(self.original).copy_(self.bytes)

    def __str__(self) -> str:
        return ", ".join(f"{name} [{first}, {end})" for first, end, name in self.views)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _tensors(arg)
        elif isinstance(arg, TensorDescriptor):
            yield arg.base
        elif isinstance(arg, Tensor):
            yield arg


class _Watch:
    """The launch that runs now."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.regions: dict[int, _Region] = {}
        self.found: dict[str, str] = {}
        self.watches = False
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
        copy, give_back = GridExecutor._init_args_hst, GridExecutor._restore_args_dev

        def copied(executor: Any, args: Any, named: Any) -> tuple[list[Any], dict[str, Any]]:
            self.regions, self.found = {}, {}
            tensors = list(_tensors((*args, *named.values())))
            self.watches = all(t.untyped_storage().nbytes() <= LARGEST for t in tensors)
            if not self.watches:
                return copy(executor, args, named)
            names = executor.arg_names
            copies = (
                [self._copied(arg, name) for arg, name in zip(args, names, strict=False)],
                {name: self._copied(arg, name) for name, arg in named.items()},
            )
            for region in self.regions.values():
                region.begin()
            return copies

        def given_back(executor: Any, *args: Any) -> None:
            if not self.watches:
                return give_back(executor, *args)
            for region in self.regions.values():
                region.give_back()
            self._tell(executor.fn.__name__)
            self.regions = {}
            if self.found:
                raise MemoryMisuseError(
                    "\n".join([f"{executor.fn.__name__}:", *self.found.values()])
                )

        def watched_load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
            if self.watches:
                self._access(pointers, mask, self._loads, "reads")
            return load(builder, pointers, mask, *rest, **named)

        def watched_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
            if not self.watches:
                return store(builder, pointers, value, mask, *rest)
            self._access(pointers, mask, self._stores, "writes")
            store(builder, pointers, value, mask, *rest)
            stored = load(builder, pointers, mask, None, None, None, False)
            there = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
            written = np.broadcast_to(value.data, pointers.data.shape)
            if stored.data[there].tobytes() != written[there].tobytes():
                self._note("writes different values to one place")

        def unwatched(*_: Any) -> None:
            raise NotImplementedError("atomics are not watched: no kernel has had any")

        patch.setattr(GridExecutor, "_init_args_hst", copied)
        patch.setattr(GridExecutor, "_restore_args_dev", given_back)
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            patch.setattr(InterpreterBuilder, name, unwatched)

    def _tell(self, kernel: str) -> None:
        regions = self.regions.values()
        read = sum(r.unit * np.count_nonzero(r.reader != NOBODY) for r in regions)
        written = sum(r.unit * np.count_nonzero(r.writer != NOBODY) for r in regions)
        for launches in _open:
            launches.append(Traffic(kernel, int(read), int(written)))

    def _copied(self, arg: Any, name: str) -> Any:
        if isinstance(arg, tuple):
            return tuple(self._copied(part, name) for part in arg)
        if isinstance(arg, TensorDescriptor):
            return replace(arg, base=self._copied(arg.base, name))
        if not isinstance(arg, Tensor):
            return arg
        storage = arg.untyped_storage()
        region = self.regions.get(storage.data_ptr())
        if region is None:
            region = self.regions[storage.data_ptr()] = _Region(storage)
        return region.view(arg, name)

    def _access(self, pointers: Any, mask: Any, note: Any, verb: str) -> None:
        there = np.broadcast_to(mask.data, pointers.data.shape).astype(bool).ravel()
        lanes = np.flatnonzero(there)
        addresses = pointers.data.ravel()[lanes].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        for region in self.regions.values():
            offsets = addresses - region.address
            near = (offsets >= -GAP) & (offsets < region.bytes.numel() + GAP)
            if not near.any():
                continue
            offsets = offsets[near]
            inside = np.zeros(offsets.size, bool)
            for first, end, _ in region.views:
                inside |= (offsets >= first) & (offsets + size <= end)
            if not inside.all():
                outside = offsets[~inside]
                extent = f"bytes {outside.min()} to {outside.max() + size - 1} of {region}"
                self._note(f"{verb} outside", extent)
            parts = size // region.unit
            units = (offsets[inside] // region.unit)[:, None] + np.arange(parts)
            lane = np.repeat(lanes[near][inside], parts)
            note(region, units.ravel(), lane)
            addresses, lanes = addresses[~near], lanes[~near]
        if addresses.size:
            self._note(f"{verb} memory of no argument")

    def _loads(self, region: _Region, at: np.ndarray, lane: np.ndarray) -> None:
        program = self._program()
        writer = region.writer[at]
        self._clash(region, "reads what it has written", writer == program)
        self._clash(
            region, "reads what another has written", (writer != NOBODY) & (writer != program)
        )
        reader = region.reader[at]
        one = (reader == NOBODY) | (reader == program)
        region.reader[at] = np.where(one, program, MANY)
        # one lane of one program, or several
        before = np.where(reader == program, region.lane[at], lane)
        region.lane[at] = np.where(before == lane, lane, MANY)
        region.lane[at[region.lane[at] != lane]] = MANY  # of this very access

    def _stores(self, region: _Region, at: np.ndarray, lane: np.ndarray) -> None:
        program = self._program()
        writer, reader = region.writer[at], region.reader[at]
        self._clash(region, "writes again what it has written", writer == program)
        self._clash(
            region, "writes what another has written", (writer != NOBODY) & (writer != program)
        )
        self._clash(
            region, "writes what another has read", (reader != NOBODY) & (reader != program)
        )
        other_lane = (reader == program) & (region.lane[at] != lane)
        self._clash(region, "writes what another of its lanes has read", other_lane)
        region.writer[at] = program

    def _clash(self, region: _Region, what: str, where: np.ndarray) -> None:
        if where.any():
            self._note(what, f"{where.sum()} elements of {region}")

    def _program(self) -> int:
        (x, y, z), (_, ny, nz) = interpreter_builder.grid_idx, interpreter_builder.grid_dim
        return int((x * ny + y) * nz + z)

    def _note(self, what: str, detail: str = "") -> None:
        grid = interpreter_builder.grid_idx
        self.found.setdefault(what, f"program {tuple(map(int, grid))} {what}: {detail}")

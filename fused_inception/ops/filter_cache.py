"""Packed filters of modules that are not being trained, kept until a parameter changes."""

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from fused_inception.ops import replay
from fused_inception.ops.nested import tensors_in

_T = TypeVar("_T")
# others may hold no memory, or know more than numbers
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class _Entry(NamedTuple):
    key: tuple[object, ...]
    tensors: list["weakref.ref[torch.Tensor]"]
    # while these live, no other storage gets the identity of one of them
    storages: list[StorageWeakRef]
    result: Any


# by the first tensor, how many there are, and the stream
_entries: dict[tuple[int, int, int], _Entry] = {}
_lock = threading.Lock()
# another one after each `clear`
_era = object()
_listening = False


def kept(
    tensors: list[torch.Tensor],
    options: tuple[object, ...],
    make: Callable[[], _T],
    *,
    save: bool,
) -> _T:
    """What `make()` makes of `tensors` and `options`, from the cache where that is safe.

    Not safe, so made anew: in grad mode and when a backward will follow (an optimiser step may
    come at any time), under CUDA-graph capture and where Inductor runs ahead of one (a replay must
    see the parameters of its own time, and what is allocated there is the graph's), in traces, for
    inference tensors (they carry no version), with FSDP (which gathers parameters anew under the
    same version), where conversions of modules swap tensors (PyTorch swaps none that a weak
    reference knows), for parts of larger memory (`vector_to_parameters` puts new vectors under the
    same version) and shared memory (other processes count for themselves).

    A step of an optimiser empties the cache, as fused ones raise no version, and so does an
    operator whose gradients are recorded. Writes through `.data`, by collectives or by replays
    raise none either: call `clear()` after those that neither of the two follows. Each CUDA stream
    has entries of its own, made, read and freed in its order.
    """
    if (
        save
        or torch.is_grad_enabled()
        or _is_for_graphs(tensors[0].device)
        or _may_be_sharded()
        or torch.__future__.get_swap_module_params_on_conversion()
        or torch.jit.is_tracing()
        or any(t.is_inference() or type(t) not in _PLAIN for t in tensors)
    ):
        return make()
    replay.refuse("filters are kept")
    key = (*options, *map(_identity, tensors))
    owner = id(tensors[0]), len(tensors), _stream_of(tensors[0].device)
    with _lock:
        entry = _entries.get(owner)
    if entry is not None and entry.key == key and _same(entry.tensors, tensors):
        return entry.result
    if any(map(_has_other_writers, tensors)):
        return make()
    _listen()
    era = _era
    # what is made in inference mode carries no version, and could not be kept by the next
    with torch.inference_mode(False), torch.no_grad():
        result = make()
    if any(type(t) is not torch.Tensor for t in tensors_in(result)):
        return result  # of FakeTensorMode
    # the entry dies with the first tensor, so that a reused address is never mistaken for it
    first = weakref.ref(tensors[0], lambda _: _entries.pop(owner, None))
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    with _lock:
        if era is _era:  # else another thread has written to parameters while they were read
            _entries[owner] = _Entry(key, [first, *map(weakref.ref, tensors[1:])], storages, result)
    return result


def _stream_of(device: torch.device) -> int:
    """The current one; 0 without streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _is_for_graphs(device: torch.device) -> bool:
    """Whether what is launched and allocated now belongs to a CUDA graph."""
    if device.type != "cuda":
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    return trees is not None and _runs_ahead(trees, device)


def _runs_ahead(trees: Any, device: torch.device) -> bool:
    """Whether Inductor's trees of graphs, on this thread, run a function before they capture it."""
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
        states = trees.ExecutionState
        return manager is not None and manager.path_state in (states.WARMUP, states.RECORDING)
    except AssertionError:  # a thread without trees
        return False
    except (AttributeError, TypeError):  # another Inductor: nobody knows
        return True


def _may_be_sharded() -> bool:
    """Whether any module of this process is sharded by `fully_shard`."""
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(getattr(states, "_module_state_mapping", (None,))) > 0


def _identity(t: torch.Tensor) -> tuple[object, ...]:
    """Changes with the values of `t`, and when other memory is put under it."""
    # _version: the counter that autograd checks saved tensors against has no public name
    storage = t.untyped_storage()._cdata
    return storage, t.data_ptr(), t._version, t.dtype, t.device, t.stride()


def _has_other_writers(t: torch.Tensor) -> bool:
    """Whether others than `t` may write to its memory, which does not raise the version of `t`."""
    if t._is_view():  # of a flat parameter
        return True
    storage = t.untyped_storage()
    if storage.nbytes() != t.numel() * t.element_size():
        return True
    # on CUDA it is true of all
    return t.device.type == "cpu" and t.is_shared()


def _listen() -> None:
    """Have every step of every optimiser empty the cache."""
    global _listening
    with _lock:
        if _listening:
            return
        _listening = True
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: clear())


def _same(refs: list["weakref.ref[torch.Tensor]"], tensors: list[torch.Tensor]) -> bool:
    return all(ref() is t for ref, t in zip(refs, tensors, strict=True))


def clear() -> None:
    """Forget all packed and folded filters.

    Needed only after writes that raise no version: through `.data`, by collectives of
    `torch.distributed`, by replays of a captured optimiser step, by other processes that share CUDA
    memory. And before `torch.__future__.set_swap_module_params_on_conversion` lets a conversion
    swap parameters whose filters are kept: PyTorch swaps none that somebody refers to weakly.
    """
    global _era
    with _lock:
        _era = object()
        _entries.clear()

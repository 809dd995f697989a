"""What really happens in a pass: saved memory, ATen's calls, our launches, layer by layer."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class SavedMemory:
    """Distinct memory that autograd keeps, apart from that of parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._known = {_key(t) for t in [*module.parameters(), *module.buffers()]}
        self._kept: dict[int, tuple[torch.UntypedStorage, str]] = {}
        self.layer = ""

    @contextmanager
    def watch(self) -> Iterator["SavedMemory"]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            yield self

    def _pack(self, t: Tensor) -> Tensor:
        key = _key(t)
        # the storage is held: its address cannot come back for another
        if key not in self._known and key not in self._kept:
            self._kept[key] = (t.untyped_storage(), self.layer)
        return t

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage, _ in self._kept.values())

    @property
    def by_layer(self) -> Counter[str]:
        """Bytes by the layer that kept them first."""
        result: Counter[str] = Counter()
        for storage, layer in self._kept.values():
            result[layer] += storage.nbytes()
        return result

    def follow(self, layers: dict[str, nn.Module]) -> None:
        """Know from now on which of these layers is running."""
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: setattr(self, "layer", name))


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class AtenCalls(TorchDispatchMode):
    """Counts the calls of ATen's operators, and the bytes that each reads and writes."""

    # no kernel: views, metadata, memory that is written later
    FREE = frozenset(
        {
            *("t", "view", "_unsafe_view", "slice", "squeeze", "unsqueeze", "expand", "detach"),
            *("as_strided", "as_strided_", "empty", "empty_like"),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name not in self.FREE:
            self.calls[name] += 1
            self.read[name] += _bytes(args)
            self.written[name] += _bytes(out)
        return out


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    return 0


def layers_of(network: nn.Module, names: Iterator[str] | tuple[str, ...]) -> dict[str, nn.Module]:
    """The modules of a GoogLeNet by the names that the cost model gives to layers.

    A layer of two modules ("maxpool1 norm1") is there under both; "head" begins at the pool.
    """
    found: dict[str, nn.Module] = {}
    for name in names:
        if name == "head":
            found[name] = network.get_submodule("avgpool")
        elif name[0].isdigit():
            found[name] = network.get_submodule(f"inception{name}")
        else:
            for part in name.split():
                found[part] = network.get_submodule(part)
    return found


def count_multiply_adds(network: nn.Module, run: Callable[[], Any]) -> Counter[str]:
    """Multiply-adds of one run by the name of the convolution or linear layer."""
    counted: Counter[str] = Counter()

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        weight = module.get_parameter("weight")
        counted[name] += weight.numel() * output.numel() // output.shape[1]

    handles = [
        module.register_forward_hook(lambda m, _, out, name=name: count(name, m, out))
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    run()
    for handle in handles:
        handle.remove()
    return counted


def peak_memory(run: Callable[[], Any]) -> int:
    """Most memory that `run` has allocated on the CPU at a time, beyond what there was before."""
    from torch.profiler import ProfilerActivity, profile

    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, acc_events=True) as profiler:
        run()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak

"""Who is compared: the fused model and plain PyTorch, run in every way that PyTorch has."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.tools.timing import WARM_UP, Work
from fused_inception.tuning import dispatch

# torch.compile's modes, as Inductor spells them; without its own CUDA graphs, which keep one call
# alive, where the graphs of this file serve every provider alike
_MAX_AUTOTUNE = {"max_autotune": True, "coordinate_descent_tuning": True}
# from torch 2.13 on Inductor lays out the backward of convolutions itself, and takes NCHW for a
# graph without a forward convolution, such as that of every backward: pytorch issue 189239.
# Forcing channels last is the way around it
_LAYOUT = {"force_layout_optimization": True}
# a graph saves launches, which cost most where batches are small; of a network it is measured at
# all batches, as one contender there has graphs of Inductor's own
GRAPH_BATCHES = (1, 8)


@dataclass(frozen=True)
class Provider:
    """One contender.

    Attributes:
        name: in tests and results.
        fused: our modules; otherwise those of `fused_inception.reference`.
        channels_last: layout of filters, inputs and gradients of outputs.
        inductor: options of torch.compile; None: not compiled.
        graph: one CUDA graph of the whole call is replayed.
        library: of our modules, the library's convolutions wherever there is a choice, behind our
            epilogues; otherwise what the tables and heuristics in force say.
    """

    name: str
    fused: bool = False
    channels_last: bool = True
    inductor: dict[str, Any] | None = None
    graph: bool = False
    library: bool = False

    def in_force(self) -> AbstractContextManager[None]:
        """Inside, our modules run as the provider has them."""
        return dispatch.forced(dispatch.PARTS) if self.library else nullcontext()

    @property
    def plain(self) -> str:
        """The provider whose call the graph holds; without a graph itself."""
        return self.name.removesuffix("-graph") if self.graph else self.name

    @property
    def compiled(self) -> bool:
        """By torch.compile."""
        return self.inductor is not None

    @property
    def layout(self) -> str:
        """In words."""
        return "channels_last" if self.channels_last else "contiguous"


def _table() -> dict[str, Provider]:
    plain = [
        Provider("fused", fused=True),
        Provider("fused-library", fused=True, library=True),
        Provider("eager"),
        Provider("eager-nchw", channels_last=False),
        Provider("compile", inductor={}),
        Provider("max-autotune", inductor=_MAX_AUTOTUNE),
        Provider("max-autotune-layout", inductor={**_MAX_AUTOTUNE, **_LAYOUT}),
    ]
    graphs = [replace(p, name=f"{p.name}-graph", graph=True) for p in plain]
    # the mode "max-autotune" to the letter: one call at a time, so for whole networks alone
    own = Provider("max-autotune-cudagraphs", inductor={**_MAX_AUTOTUNE, "triton.cudagraphs": True})
    return {p.name: p for p in (*plain, own, *graphs)}


PROVIDERS = _table()


def contenders(group: str, batch: int, direction: str, device: torch.device) -> list[str]:
    """Names of the providers that a problem of `group` is given to.

    Graphs hold whole calls, not a backward alone, whose forward lies outside.
    """
    if device.type != "cuda":
        return ["fused", "eager", "compile"]
    graphs = direction != "backward" and (group == "network" or batch in GRAPH_BATCHES)
    return [
        p.name
        for p in PROVIDERS.values()
        if (graphs or not p.graph) and (group == "network" or p.name != "max-autotune-cudagraphs")
    ]


def prepared(provider: Provider, module: nn.Module) -> nn.Module:
    """`module` in the provider's layout, compiled where it is a compiled one.

    Whole graphs are compiled: what torch cannot compile is an error, never a silent return to
    eager.
    """
    if provider.channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if provider.inductor is not None:
        module.compile(fullgraph=True, dynamic=False, options=dict(provider.inductor))
    return module


def laid_out(provider: Provider, tensor: Tensor) -> Tensor:
    """`tensor` in the provider's layout."""
    if tensor.ndim != 4:
        return tensor
    last = provider.channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


@contextmanager
def compiler_limits() -> Iterator[None]:
    """The providers share their modules' code, of which torch.compile else keeps few graphs."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        yield


def captured(piece: Work) -> tuple[Work, Any]:
    """The whole call as one CUDA graph, and the tensors that every replay writes."""
    assert piece.prepare is None, "the graph of a call holds all of it"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            piece.run(None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = piece.run(None)
    graph.replay()
    return Work(None, lambda _: graph.replay(), allocates=False), outputs


def autotuning_seconds() -> float:
    """Seconds that Inductor has spent on trying alternatives so far, as Dynamo counts them."""
    from torch._dynamo.utils import compilation_time_metrics

    return sum(
        (
            sum(times)
            for name, times in compilation_time_metrics.items()
            if name.endswith(("_template_precompiling", "_template_autotuning"))
            or any(word in name.lower() for word in ("benchmark", "coordinate_descent"))
        ),
        start=0.0,
    )

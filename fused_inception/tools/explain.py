"""`explain`: block by block, which path a model takes, why, and what that costs."""

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.adapters.fuse import fuse_, survey
from fused_inception.cost import BACKWARD, FORWARD, H200, Cost
from fused_inception.geometry import IMAGE_CHANNELS
from fused_inception.launches import Launch, record_launches
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.ops import measured
from fused_inception.ops.layout import why_not_in_place
from fused_inception.tools import sample
from fused_inception.tools.blocks import (
    ATEN,
    LAYERS,
    TRITON,
    Path,
    check_batch,
    copy_of,
    fused_blocks,
    hooked,
    path_of,
    setting_of,
    tensors_of,
    undisturbed,
    unwrapped,
    why_no_kernel,
)
from fused_inception.tools.costs import cost_of
from fused_inception.tools.precompile import announce_precompiled
from fused_inception.tools.text import aligned
from fused_inception.tuning import dispatch
from fused_inception.tuning.dispatch import Choice


@dataclass(frozen=True)
class Launches:
    """Triton launches of ours; packing of filters is told apart."""

    forward: int
    backward: int
    packing: int

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}" + (f" ({self.packing})" if self.packing else "")

    @staticmethod
    def predicted(cost: Cost) -> "Launches":
        """Those of the cost model."""
        return Launches(
            cost.part(phase=FORWARD).launches("triton"),
            cost.part(phase=BACKWARD).launches("triton"),
            cost.launches("packing"),
        )


@dataclass(frozen=True)
class BlockExplanation:
    """One block that `fuse_` knows.

    Attributes:
        name: its qualified name.
        kind: its class.
        path: how it computes, and why.
        input: shape and dtype of what it reads.
        copied: why its input is converted before it is read; None where it is read in place.
        launches: recorded; None where it launches no Triton kernel.
        fused: its cost as a fused block; predicted; None where the cost model does not know it.
        eager: the same of plain PyTorch.
        parts: who computes each convolution of which there is a choice, and why.
        has_kernel: False where the block runs through ATen on every device.
    """

    name: str
    kind: str
    path: Path
    input: str
    copied: str | None
    launches: Launches | None
    fused: Cost | None
    eager: Cost | None
    parts: Mapping[str, Choice] = field(default_factory=dict)
    has_kernel: bool = True

    @property
    def cost(self) -> Cost | None:
        """Of the path that it takes: the fused one, or plain PyTorch."""
        return self.fused if self.path.name == TRITON else self.eager

    @property
    def flops(self) -> int | None:
        """Two for each multiply-add of the pass."""
        return None if self.cost is None else self.cost.flops

    @property
    def bytes(self) -> int | None:
        """Read and written, each operand of each launch once; predicted."""
        return None if self.cost is None else self.cost.read_bytes + self.cost.write_bytes

    @property
    def predicted_seconds(self) -> float | None:
        """On one H200; never measured."""
        return None if self.cost is None else self.cost.seconds(H200)


@dataclass(frozen=True)
class ExplainReport:
    """What `explain` found; `str` gives a table.

    Attributes:
        blocks: every block that `fuse_` knows and that ran, in the order of the model.
        not_reached: known blocks that this input and mode do not run.
        launches: of the whole model, where neighbours may run as one operator; None on paths
            without Triton.
        setting: model, mode, dtype, shape and device.
    """

    blocks: list[BlockExplanation]
    not_reached: list[str] = field(default_factory=list)
    launches: Launches | None = None
    setting: str = ""

    def __str__(self) -> str:
        rows = [
            ["block", "class", "runs as", "input", "launches", "GFLOP", "MB", "us", "us"],
            ["", "", "", "", "of Triton", "", "moved", "eager", "fused"],
            *map(_row, self.blocks),
        ]
        lines = [f"explain: {self.setting}", *aligned(rows, names=4), *self._reasons()]
        if self.not_reached:
            lines.append(f"not run by this input in this mode: {', '.join(self.not_reached)}")
        if self.launches is not None:
            lines.append(
                f"the whole model: {self.launches.forward} Triton launches forward, "
                f"{self.launches.backward} backward, and {self.launches.packing} that pack filters"
            )
        lines.append(
            "Launches forward+backward (packing of filters): with ~ predicted, else recorded. "
            f"Bytes and times are predicted for one {H200.name}, inside a CUDA graph; none "
            "is measured."
        )
        return "\n".join(lines)

    def _reasons(self) -> list[str]:
        """Each reason once, with the blocks that it holds for."""
        reasons: dict[str, list[str]] = {}
        for block in self.blocks:
            name = block.name or "(the model)"
            reasons.setdefault(f"{block.path.name}: {block.path.reason}", []).append(name)
            if block.copied is not None:
                reasons.setdefault(f"input copied: {block.copied}", []).append(name)
            for choice in dict.fromkeys(block.parts.values()):
                parts = [part for part, other in block.parts.items() if other == choice]
                some = parts if len(parts) < len(block.parts) else []
                reasons.setdefault(f"convolutions by {choice}", []).append(" ".join([name, *some]))
        return [f"{reason} [{', '.join(names)}]" for reason, names in sorted(reasons.items())]


def explain(model: nn.Module, x: Tensor) -> ExplainReport:
    """Say of every block that `fuse_` knows how `model` computes it for the batch `x`, and why.

    A copy of `model`, fused exactly as far as `model` is, runs in its mode; then each block runs
    alone on its input, forward and, in training, backward, while its Triton launches are recorded.
    Bytes and times come from the cost model: for the fused and for the eager block, on one H200,
    whatever the machine is that this runs on.

    `model`, its gradients, statistics, mode and the state of the random numbers stay as they are.

    Args:
        model: fused or not; DistributedDataParallel and torch.compile's wrapper are looked through.
        x: its one argument, on its device.

    Raises:
        BackendError, TypeError: the backend in force cannot compute it; `model` is no module, or
            `x` no tensor.
        ValueError: `model` cannot be deep-copied.
    """
    check_batch(x)
    model = unwrapped(model)
    training = model.training
    with undisturbed():
        if x.is_inference():  # no layer could save it for a backward
            x = x.clone()
        copied = copy_of(model)
        state = survey(copied)
        known = {*state.fused, *state.skipped}
        names = [name for name, _ in copied.named_modules() if name in known]
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def see(name: str, _: nn.Module, z: Tensor, y: Any) -> None:
            if name not in seen and isinstance(y, Tensor):
                seen[name] = z.detach().requires_grad_(z.requires_grad), y.detach()

        with torch.set_grad_enabled(training), hooked(copied, names, see):
            copied(x)
        fused = copy.deepcopy(copied)
        fuse_(fused)
        ready = set(fused_blocks(state)) - set(state.fused)
        blocks = []
        for name in names:
            if name not in seen:
                continue
            z, y = seen[name]
            block = copied.get_submodule(name)
            path = Path(LAYERS, state.skipped.get(name, "fuse_ would fuse it"))
            if name in ready:
                path = path_of(block, z)
            twin = fused.get_submodule(name)
            with dispatch.recorded() as parts, measured.reasons() as why_plain:
                launches = _launches(block, z, training) if path.name == TRITON else None
            if why_plain:
                path = Path(ATEN, why_plain[0])
            blocks.append(
                BlockExplanation(
                    name=name,
                    kind=type(block).__name__,
                    path=path,
                    input=f"{list(z.shape)} {str(z.dtype).removeprefix('torch.')}",
                    copied=_copied(block, z, path),
                    launches=launches,
                    fused=cost_of(twin, z, y, plan="fused", training=training),
                    eager=cost_of(twin, z, y, plan="eager", training=training),
                    parts=parts,
                    has_kernel=why_no_kernel(block) is None,
                )
            )
        triton = any(block.path.name == TRITON for block in blocks)
        whole = _launches(copied, x, training) if triton else None
    return ExplainReport(
        blocks=blocks,
        not_reached=[name for name in names if name not in seen],
        launches=whole,
        setting=setting_of(model, x),
    )


def _copied(block: nn.Module, x: Tensor, path: Path) -> str | None:
    """Why a fused block converts its input."""
    if path.name == LAYERS or isinstance(block, GlobalAvgPool2d):
        return None
    if path.name == TRITON:
        image = isinstance(block, ConvBlock) and x.shape[1] <= IMAGE_CHANNELS
        return None if image else why_not_in_place(x)
    return None if x.is_contiguous(memory_format=torch.channels_last) else "channels are not last"


def _launches(module: nn.Module, x: Tensor, training: bool) -> Launches:
    """Of one pass forward and, in training, back."""
    with torch.set_grad_enabled(training), record_launches() as forward:
        outputs = module(x)
    with record_launches() as backward:
        roots = [y for _, y in tensors_of(outputs) if y.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.ones_like(y) for y in roots])
    packing = sum(_packs(launch) for launch in (*forward, *backward))
    return Launches(
        sum(not _packs(launch) for launch in forward),
        sum(not _packs(launch) for launch in backward),
        packing,
    )


def _packs(launch: Launch) -> bool:
    return "pack" in launch.kernel


def _row(block: BlockExplanation) -> list[str]:
    eager, fused = (
        _number(None if c is None else c.seconds(H200), 1e6) for c in (block.eager, block.fused)
    )
    launches = "-"
    if block.launches is not None:
        launches = str(block.launches)
    elif block.path.name != LAYERS and block.has_kernel and block.fused is not None:
        launches = f"~{Launches.predicted(block.fused)}"
    return [
        block.name or "(the model)",
        block.kind,
        block.path.name,
        block.input,
        launches,
        _number(block.flops, 1e-9),
        _number(block.bytes, 1e-6),
        eager,
        fused,
    ]


def _number(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:,.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the model and its batch."""
    sample.add_arguments(parser)
    parser.add_argument("--unfused", action="store_true", help="as it is, without fuse_")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit status is 0.

    Raises:
        UserError: no such model, or flags that do not fit it.
    """
    with sample.prepared(arguments) as (model, x):
        if not arguments.unfused:
            fuse_(model)
        announce_precompiled(model, x)
        report = explain(model, x)
    print(report)
    return 0

"""`verify`: a model's fused blocks and plain PyTorch side by side, on the user's own batch."""

import argparse
import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fused_inception.adapters.fuse import fuse_
from fused_inception.adapters.plain import plain_twin
from fused_inception.tools import sample
from fused_inception.tools.blocks import (
    Path,
    check_batch,
    copy_of,
    fused_blocks,
    path_of,
    setting_of,
    undisturbed,
    unwrapped,
)
from fused_inception.tools.precompile import announce_precompiled
from fused_inception.tools.side_by_side import (
    Error,
    Three,
    compare_block,
    compare_network,
)
from fused_inception.tools.text import aligned


@dataclass(frozen=True)
class BlockCheck:
    """One block on the input that it gets in plain PyTorch, or the whole model end to end.

    Attributes:
        name: its qualified name.
        path: how it computed; None for the whole model.
        output: of its output, the worst of several.
        gradient: the worst of its gradients; None where nothing needs one.
        gradient_of: whose that is: "input", a parameter, or "all" together.
        statistics: the worst of its buffers after the pass; None where there is none.
        random: whether plain PyTorch drew random numbers on the way: which element gets which
            depends on how a tensor lies in memory.
    """

    name: str
    path: Path | None
    output: Error
    gradient: Error | None
    gradient_of: str
    statistics: Error | None
    random: bool = False

    @property
    def verdict(self) -> str:
        """The worst verdict of the three: "ok", "unclear" or "FAILED".

        Where random numbers were drawn, a difference proves nothing, and none is "FAILED".
        """
        found = {e.verdict for e in (self.output, self.gradient, self.statistics) if e is not None}
        if self.random and "FAILED" in found:
            return "unclear"
        return next((verdict for verdict in ("FAILED", "unclear") if verdict in found), "ok")


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found; `str` gives a table.

    Attributes:
        blocks: every fused block that ran, in the order of the model.
        model: the whole model, end to end.
        skipped: blocks that cannot be fused, with the reason: plain PyTorch on both sides.
        not_reached: fused blocks that this input and mode do not run.
        setting: model, mode, dtype, shape and device.
    """

    blocks: list[BlockCheck]
    model: BlockCheck
    skipped: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    setting: str = ""

    @property
    def ok(self) -> bool:
        """No check has failed."""
        return all(check.verdict != "FAILED" for check in [*self.blocks, self.model])

    def __str__(self) -> str:
        rows = [["block", "path", "output", "gradients", "worst of", "statistics", "verdict"]]
        rows += [_row(check) for check in [*self.blocks, self.model]]
        lines = [
            f"verify: {self.setting}",
            "relative L2 distance from float64: fused (PyTorch's own in the same dtype)",
            *aligned(rows, names=2),
        ]
        lines += sorted({f"{c.path.name}: {c.path.reason}" for c in self.blocks if c.path})
        lines += [f"not fused: {name or '(the model)'} {why}" for name, why in self.skipped.items()]
        if self.not_reached:
            lines.append(f"not run by this input in this mode: {', '.join(self.not_reached)}")
        unclear = [c for c in [*self.blocks, self.model] if c.verdict == "unclear"]
        if any(check.random for check in unclear):
            lines.append(
                "unclear: the model draws random numbers besides nn.Dropout's, as F.dropout does, "
                "and their order follows the memory layout; take eval, or a probability of 0"
            )
        if not all(check.random for check in unclear):
            lines.append(
                "unclear: not further than a few ReLUs or maxima that flip between two roundings "
                "move it; take more images, or float64"
            )
        verdict = "every check holds" if self.ok else "FAILED: fused and plain PyTorch disagree"
        return "\n".join([*lines, f"verdict: {verdict}"])


def verify(model: nn.Module, x: Tensor, *, gradients: bool = True) -> VerifyReport:
    """Compare `model`, fused, with plain PyTorch and with float64 on the batch `x`.

    Three copies of `model` run in its mode, forward and backward from a random gradient: fused
    (`fuse_` is applied to the copy, so `model` may be fused or not), plain PyTorch (fused blocks
    undone, modules of ours replaced by those of `reference`), and plain PyTorch in float64. Then
    every fused block runs alone, on the input and the gradient that it had in plain PyTorch. An
    output may be twice as far from float64 as PyTorch's own, a gradient three times, besides a
    floor for rounding; in training the running statistics are held to the limit of outputs.

    `model`, its gradients, statistics, mode and the state of the random numbers stay as they are.
    Dropout layers are off; where a model draws other random numbers, by `F.dropout` for example, no
    difference can be held against it, and the verdict is "unclear". Forward hooks of the model run
    as in any other call. Autocast, TF32 and `backend` hold as they are in force. It takes the
    memory of several models and of float64 activations: a few images are enough.

    Args:
        model: any; DistributedDataParallel and torch.compile's wrapper are looked through.
        x: its one argument, on its device.
        gradients: False runs forward alone, as under `torch.no_grad()`: inference has launches of
            its own.

    Raises:
        ValueError: `model` has no block that can be fused, returns nothing of floating point, or
            cannot be deep-copied.
        TypeError: `model` is no module, or `x` no tensor.
    """
    check_batch(x)
    model = unwrapped(model)
    with undisturbed(), torch.set_grad_enabled(gradients):
        fused, plain = _ready(copy_of(model)), _ready(plain_twin(model))
        report = fuse_(fused)
        wanted = set(fused_blocks(report))
        names = [name for name, _ in fused.named_modules() if name in wanted]
        if not names:
            reasons = "".join(f"; {name or 'it'} {why}" for name, why in report.skipped.items())
            raise ValueError(
                f"no block of this {type(model).__name__} can be fused, so there is nothing to "
                f"verify{reasons}"
            )
        three = Three(fused, plain, copy.deepcopy(plain).double())
        start = [buffer.clone() for buffer in plain.buffers()]
        whole, passes = compare_network(three, x, names)
        three.buffers(start)
        blocks = []
        for name in names:
            if name in passes:
                block, (z, dy) = three.block(name), passes[name]
                path = path_of(block.fused, z)
                blocks.append(BlockCheck(name, path, **vars(compare_block(block, z, dy))))
    return VerifyReport(
        blocks=blocks,
        model=BlockCheck("", None, **vars(whole)),
        skipped=report.refused,
        not_reached=[name for name in names if name not in passes],
        setting=setting_of(model, x),
    )


def _ready(model: nn.Module) -> nn.Module:
    """Without dropout, and without copies of gradients, which only take memory."""
    model.zero_grad(set_to_none=True)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def _row(check: BlockCheck) -> list[str]:
    errors = [check.output, check.gradient, check.statistics]
    output, gradient, statistics = ("-" if e is None else str(e) for e in errors)
    name = check.name if check.path else "end to end"
    return [
        name or "(the model)",
        check.path.name if check.path else "",
        output,
        gradient,
        check.gradient_of or "-",
        statistics,
        check.verdict,
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the model and its batch."""
    sample.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; the exit status is 1 where fused and plain PyTorch disagree.

    Raises:
        UserError: no such model, or flags that do not fit it.
    """
    with sample.prepared(arguments) as (model, x):
        fused = copy_of(model)
        fuse_(fused)
        announce_precompiled(fused, x)
        report = verify(model, x)
    print(report)
    return 0 if report.ok else 1

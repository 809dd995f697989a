"""The blocks of a model one by one, fused and plain: `bench --blocks`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fused_inception.adapters.fuse import survey
from fused_inception.tools.bench_rows import BlockResult
from fused_inception.tools.blocks import fused_blocks, hooked, tensors_of
from fused_inception.tools.costs import cost_of
from fused_inception.tools.text import aligned
from fused_inception.tools.timing import Spread, Work, calls_per_round, in_turn

MIN_ROUNDS = 5


def block_names(fused: nn.Module) -> list[str]:
    """The fused blocks of a model, by qualified name."""
    ready = set(fused_blocks(survey(fused)))
    return [name for name, _ in fused.named_modules() if name in ready]


def measure_blocks(
    fused: nn.Module,
    plain: nn.Module,
    x: Tensor,
    seconds: float,
    modes: Sequence[str],
    done: Callable[[str], None],
) -> list[BlockResult]:
    """Each fused block of `fused` beside the block of the same name of `plain`, on the input that a
    pass of `x` brings it, in training where a step is timed; those that the pass does not reach are
    left out.

    `seconds` is for each measurement; `modes` are of `BLOCK_MODES`' values; `done` is told of each
    block that is behind.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, _: nn.Module, z: Tensor, y: object) -> None:
        if name not in seen and isinstance(y, Tensor):
            seen[name] = z.detach(), y.detach()

    with torch.no_grad(), hooked(fused.train("step" in modes), block_names(fused), see):
        fused(x)
    results = []
    for name, (z, y) in seen.items():
        blocks = {"fused": fused.get_submodule(name), "eager": plain.get_submodule(name)}
        for mode in modes:
            cost = cost_of(blocks["fused"], z, y, plan="fused", training=mode == "step")
            medians = _medians(blocks, z, mode, seconds)
            results.append(
                BlockResult(
                    batch=x.shape[0],
                    mode=mode,
                    block=name or "(the model)",
                    kind=type(blocks["fused"]).__name__,
                    fused_milliseconds=medians["fused"] * 1e3,
                    eager_milliseconds=medians["eager"] * 1e3,
                    flops=None if cost is None else cost.flops,
                    bytes=None if cost is None else cost.read_bytes + cost.write_bytes,
                )
            )
        done(name)
    return results


def _medians(
    blocks: dict[str, nn.Module], z: Tensor, mode: str, seconds: float
) -> dict[str, float]:
    pieces = {name: _work(block.train(mode == "step"), z, mode) for name, block in blocks.items()}
    calls = {name: calls_per_round(piece, z.device) for name, piece in pieces.items()}
    samples = in_turn(pieces, calls, z.device, seconds, MIN_ROUNDS)
    return {name: Spread.of(found).median for name, found in samples.items()}


def _work(block: nn.Module, z: Tensor, mode: str) -> Work:
    if mode == "forward":

        def forward(_: None) -> None:
            with torch.no_grad():
                block(z)

        return Work(None, forward)
    # an image needs no gradient
    leaf = z.clone(memory_format=torch.preserve_format).requires_grad_(z.shape[1] > 4)
    leaves = [t for t in (leaf, *block.parameters()) if t.requires_grad]
    gradients: list[Tensor] = []

    def step(_: None) -> None:
        outputs = [y for _, y in tensors_of(block(leaf)) if y.requires_grad]
        if not gradients:
            gradients.extend(torch.ones_like(y) for y in outputs)
        if outputs and leaves:
            torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    return Work(None, step)


def block_table(results: Sequence[BlockResult]) -> list[str]:
    """A line a block: milliseconds of both and their ratio, in each mode that was timed."""
    modes = list(dict.fromkeys(r.mode for r in results))
    rows = [["block", "class", "batch"], ["", "", ""]]
    for mode in modes:
        rows[0] += [f"{mode} ms", "", "times"]
        rows[1] += ["fused", "eager", "as fast"]
    found = {(r.block, r.batch, r.mode): r for r in results}
    for block, batch in dict.fromkeys((r.block, r.batch) for r in results):
        row = [block, found[block, batch, modes[0]].kind, str(batch)]
        for mode in modes:
            r = found[block, batch, mode]
            row += [f"{r.fused_milliseconds:.3f}", f"{r.eager_milliseconds:.3f}"]
            row.append(f"{r.times_as_fast:.2f}")
        rows.append(row)
    return aligned(rows, names=2)

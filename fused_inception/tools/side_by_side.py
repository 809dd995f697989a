"""The same pass through a fused, a plain and a float64 module, and how far they are apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_inception.tools.blocks import drawn_so_far, hooked, seed, tensors_of

# what rounding alone moves; below it, and above a limit, nothing can be said
NOISE = 0.05
OUTPUT_FLOOR_EPS, SMALLEST_FLOOR = 8, 1e-12
GRADIENT_FLOORS = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
# a ReLU or a maximum that flips between two roundings moves one element of a gradient as a whole;
# so many flips in a block are noise
FLIPS = 3


@dataclass(frozen=True)
class Error:
    """Relative L2 distances from float64: of the fused result, and of PyTorch's own."""

    fused: float
    pytorch: float
    limit: float  # "ok" up to here
    noise: float  # "unclear" up to here

    @property
    def verdict(self) -> str:
        """ "ok", "FAILED", or "unclear": rounding can move single elements that far."""
        if self.fused <= self.limit:  # false for NaN
            return "ok"
        return "unclear" if self.fused <= self.noise or not self.pytorch <= NOISE else "FAILED"

    @property
    def excess(self) -> float:
        """What the worst of several is chosen by: the share of the limit that is used."""
        if self.fused <= self.limit:
            return self.fused / self.limit if self.limit else 0.0
        return 1 + self.fused - self.limit if self.fused == self.fused else float("inf")

    def __str__(self) -> str:
        return f"{self.fused:.1e} ({self.pytorch:.1e})"


class Three(NamedTuple):
    """A module fused, in plain PyTorch, and that in float64."""

    fused: nn.Module
    plain: nn.Module
    exact: nn.Module

    def block(self, name: str) -> "Three":
        """The block `name` of each."""
        return Three(*(module.get_submodule(name) for module in self))

    def buffers(self, start: Sequence[Tensor]) -> None:
        """Give all buffers their values of `start`."""
        for module in self:
            for buffer, value in zip(module.buffers(), start, strict=True):
                buffer.copy_(value)


class Slack(NamedTuple):
    """How many times PyTorch's own error the fused one may be, besides the floors."""

    outputs: float
    gradients: float


BLOCK, NETWORK = Slack(2.0, 3.0), Slack(4.0, 4.0)


@dataclass(frozen=True)
class Comparison:
    """Of one pass: the worst output, the worst gradient and whose it is, the worst buffer; and
    whether plain PyTorch drew random numbers."""

    output: Error
    gradient: Error | None
    gradient_of: str
    statistics: Error | None
    random: bool


class Pass(NamedTuple):
    """What a block got in a pass of its model: its input and the gradient of its output."""

    x: Tensor
    dy: Tensor | None


def compare_block(three: Three, x: Tensor, dy: Tensor | None) -> Comparison:
    """A block on its own; each tensor is held to its own limit."""
    got, own = _step(three.fused, x, dy), _step(three.plain, x, dy)
    want = _exact_step(three.exact, x, dy)
    dtype = _dtype(got)
    numbers = max(t.numel() for t in want.outputs.values())
    flips = FLIPS / max(1, numbers) ** 0.5
    gradients = _errors(
        [step.gradients for step in (got, own, want)],
        BLOCK.gradients,
        GRADIENT_FLOORS[dtype],
        max(flips, GRADIENT_FLOORS[dtype]),
    )
    outputs = _errors(
        [step.outputs for step in (got, own, want)], BLOCK.outputs, _floor(dtype), 0.0
    )
    statistics = _errors(
        [dict(module.named_buffers()) for module in three],
        BLOCK.outputs,
        _floor(torch.float32),
        0.0,
    )
    name = max(gradients, key=lambda key: gradients[key].excess, default="")
    return Comparison(
        _worst(outputs), gradients.get(name), name, _worst_or_none(statistics), own.random
    )


def compare_network(
    three: Three, x: Tensor, watch: Sequence[str]
) -> tuple[Comparison, dict[str, Pass]]:
    """A model end to end, and what each block of `watch` got in plain PyTorch.

    All its gradients together are held to one limit: one that flips deep inside moves single
    tensors by far more than rounding.
    """
    passes: dict[str, Pass] = {}

    def see(name: str, _: nn.Module, z: Tensor, y: Any) -> None:
        if name in passes or not isinstance(y, Tensor):
            return
        passes[name] = Pass(z.detach(), None)
        if y.requires_grad:
            y.register_hook(lambda g: passes.update({name: Pass(z.detach(), g.detach())}))

    with hooked(three.plain, watch, see):
        own = _step(three.plain, x, None)
    steps = _step(three.fused, x, None), own, _exact_step(three.exact, x, None)
    floor = GRADIENT_FLOORS[_dtype(own)]
    gradients = _errors([_joined(s.gradients) for s in steps], NETWORK.gradients, floor, NOISE)
    outputs = _errors([s.outputs for s in steps], NETWORK.outputs, floor, 0.0)
    statistics = _errors(
        [dict(module.named_buffers()) for module in three], NETWORK.outputs, floor, 0.0
    )
    together = Comparison(
        _worst(outputs),
        gradients.get("all"),
        "all" if gradients else "",
        _worst_or_none(statistics),
        own.random,
    )
    return together, passes


class _Step(NamedTuple):
    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    random: bool


def _exact_step(module: nn.Module, x: Tensor, dy: Tensor | None) -> _Step:
    with torch.autocast(x.device.type, enabled=False):
        return _step(module, x.double() if x.is_floating_point() else x, dy)


def _step(module: nn.Module, x: Tensor, dy: Tensor | None) -> _Step:
    """Forward and backward, from a random gradient where there is no `dy`; all tensors by name.

    Raises:
        ValueError: no output is of floating point.
    """
    x = x.detach().clone()
    wanted: dict[str, Tensor] = {}
    if x.is_floating_point():
        wanted["input"] = x.requires_grad_()
    wanted |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    seed()  # what the model draws, and the same numbers in every dtype below
    start = drawn_so_far()
    output = module(x)
    drew = any(not torch.equal(a, b) for a, b in zip(start, drawn_so_far(), strict=False))
    outputs = dict(tensors_of(output))
    if not outputs:
        raise ValueError(
            f"this {type(module).__name__} returns a {type(output).__name__} without a "
            "floating-point tensor, itself or in tuples, lists and dicts: nothing can be compared"
        )
    differentiable = [y for y in outputs.values() if y.requires_grad]
    seed()
    seeds = [torch.randn(y.shape).to(y) if dy is None else dy.to(y) for y in differentiable]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if differentiable:
        found = torch.autograd.grad(differentiable, [*wanted.values()], seeds, allow_unused=True)
    gradients = {name: g for name, g in zip(wanted, found, strict=True) if g is not None}
    return _Step({name: y.detach() for name, y in outputs.items()}, gradients, drew)


def _errors(
    three: Sequence[Mapping[str, Tensor]], slack: float, floor: float, noise: float
) -> dict[str, Error]:
    """The errors of all tensors; integers have to be equal, and what one has, all must have."""
    got, own, want = three
    errors = {}
    for name in {**want, **got, **own}:
        if name not in want or name not in got or name not in own:
            errors[name] = Error(float("nan"), 0.0, 0.0, 0.0)
            continue
        exact = want[name].double()
        scale = exact.norm().item() or 1.0
        ours, theirs = (
            (tensors[name].double().to(exact.device) - exact).norm().item() / scale
            for tensors in (got, own)
        )
        real = got[name].is_floating_point()
        limit = slack * min(theirs, NOISE) + floor if real else 0.0
        errors[name] = Error(ours, theirs, limit, noise)
    return errors


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"all": torch.cat([t.reshape(-1).double() for t in tensors.values()])} if tensors else {}


def _worst(errors: Mapping[str, Error]) -> Error:
    return max(errors.values(), key=lambda error: error.excess)


def _worst_or_none(errors: Mapping[str, Error]) -> Error | None:
    return _worst(errors) if errors else None


def _dtype(step: _Step) -> torch.dtype:
    """The coarsest of the outputs."""
    return max((y.dtype for y in step.outputs.values()), key=lambda d: torch.finfo(d).eps)


def _floor(dtype: torch.dtype) -> float:
    return max(OUTPUT_FLOOR_EPS * torch.finfo(dtype).eps, SMALLEST_FLOOR)

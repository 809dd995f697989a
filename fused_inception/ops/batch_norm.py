"""Convolutions with BatchNorm and ReLU as operators: the Inception module, one convolution.

In training an operator writes to the running statistics, so its schema says so. The gradient is
therefore an `autograd.Function` around it: `torch.library` registers gradients of operators that
write to none of their arguments. In eval BatchNorm is folded into filters and bias: by an operator
that keeps the folded ones until a parameter or a statistic changes, or, where gradients are asked
for, by PyTorch's own operators ahead of the ones with bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import conv_out
from fused_inception.ops import conv2d, filter_cache, inception
from fused_inception.ops.layout import (
    as_saved,
    dims_of,
    empty_channels_last,
    gradients_like,
    settle_all,
)
from fused_inception.ops.registration import (
    begin_gradients,
    call,
    call_below_autograd,
    refuse_double_backward,
    refuse_tangents,
    register,
    register_autocast,
)
from fused_inception.ops.replay import replayed
from fused_inception.ops.running import Running

PARAMETERS = "Tensor[] filters, Tensor[] gammas, Tensor[] betas"
# gammas, betas, means, variances, counters: lists of tensors between filters and geometry; the
# operator in eval has no counters
LISTS = 5


@dataclass(frozen=True)
class _Family:
    """One operator in training, its backward, and its form in eval."""

    name: str
    geometry: int  # integers that say more of the convolution than its filter does
    saved: int  # tensors

    @property
    def geometry_schema(self) -> str:
        return "int stride, int padding, " * (self.geometry > 0)

    @property
    def script(self) -> Any:
        """The module that holds `forward`, `saved_like` and `backward`, when it first runs."""
        if self.geometry:
            from fused_inception.ops import conv2d_bn_triton

            return conv2d_bn_triton
        from fused_inception.ops import inception_bn_triton

        return inception_bn_triton

    def empty_output(self, x: Tensor, filters: Sequence[Tensor], geometry: Sequence[int]) -> Tensor:
        n, c, h, w = x.shape
        if not geometry:
            c = dims_of(filters).out_channels
        else:
            c, _, k, _ = filters[0].shape
            h, w = (conv_out(side, k, *geometry) for side in (h, w))
        return empty_channels_last(n, c, h, w, dtype=x.dtype, device=x.device)

    def forward(
        self,
        x: Tensor,
        filters: list[Tensor],
        gammas: list[Tensor],
        betas: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        batches: list[Tensor],
        *options: Any,
    ) -> tuple[Tensor, ...]:
        *geometry, momentum, eps, skip = options
        running = Running(means, variances, batches, momentum, skip)
        running.advance()
        if x.numel():
            y, saved = self.script.forward(x, filters, gammas, betas, running, eps, *geometry)
        else:  # it counts, and there is nothing to take the statistics of
            y = self.empty_output(x, filters, geometry)
            saved = self.script.saved_like(x, filters, *geometry)
        running.mark()
        return y, *saved

    def forward_fake(self, x: Tensor, filters: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
        geometry = rest[LISTS : LISTS + self.geometry]
        saved = self.script.saved_like(x, filters, *geometry)
        return self.empty_output(x, filters, geometry), *saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        saved: list[Tensor],
        filters: list[Tensor],
        gammas: list[Tensor],
        betas: list[Tensor],
        *options: Any,
    ) -> list[Tensor]:
        *geometry, needs = options
        if not x.numel():
            found = gradients_like(x, (*filters, *gammas, *betas), needs)
            return [torch.zeros_like(t) for t in found]
        gradients = self.script.backward(dy, x, as_saved(saved), filters, gammas, *geometry, needs)
        # without parameters there is nothing behind the filters
        return settle_all(gradients, x, (*filters, *gammas, *betas), needs)

    def backward_fake(self, dy: Tensor, x: Tensor, saved: list[Tensor], *rest: Any) -> list[Tensor]:
        filters, gammas, betas, *_, needs = rest
        return gradients_like(x, (*filters, *gammas, *betas), needs)

    def evaluate(
        self,
        x: Tensor,
        filters: list[Tensor],
        gammas: list[Tensor],
        betas: list[Tensor],
        means: list[Tensor],
        variances: list[Tensor],
        *options: Any,
    ) -> Tensor:
        *geometry, eps = options
        arguments = filters, gammas, betas, means, variances, eps
        if geometry:
            weights, biases = kept_folded(*arguments)
            return self.with_biases(x, weights, biases, geometry, False)[0]
        from fused_inception.ops import inception_triton

        def pack() -> inception_triton.Packed:
            weights, biases = fold(*arguments)
            modules = [dims], [weights], [biases]
            # what is folded is kept here, not there
            return inception_triton.packed_modules(*modules, x.dtype, save=True)[0]

        dims, tensors = dims_of(filters), [*filters, *gammas, *betas, *means, *variances]
        packed = filter_cache.kept(tensors, (eps, x.dtype), pack, save=False)
        return inception_triton.forward_of_packed(x, dims, packed, False)[0]

    def with_biases(
        self,
        x: Tensor,
        filters: list[Tensor],
        biases: list[Tensor],
        geometry: Sequence[int],
        save: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The operator with bias."""
        if not geometry:
            return call(inception.inception, x, filters, biases, save)
        return call(conv2d.conv2d_relu, x, filters[0], biases[0], *geometry, save)

    def evaluate_fake(self, x: Tensor, filters: list[Tensor], *rest: Any) -> Tensor:
        geometry = rest[LISTS - 1 : LISTS - 1 + self.geometry]
        return self.empty_output(x, filters, geometry)


def fold(
    filters: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """Filters and biases that do what filters and BatchNorm with running statistics do, at least in
    fp32: w gamma / sqrt(var + eps), beta - mean gamma / sqrt(var + eps)."""
    weights, biases = [], []
    for i, weight in enumerate(filters):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scale = torch.rsqrt(variances[i].to(dtype) + eps)
        if gammas:
            scale = gammas[i].to(dtype) * scale
        shift = -means[i].to(dtype) * scale
        biases.append(betas[i].to(dtype) + shift if betas else shift)
        weights.append(weight.to(dtype) * scale[:, None, None, None])
    return weights, biases


def kept_folded(
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    eps: float,
) -> tuple[list[Tensor], list[Tensor]]:
    """What `fold` gives, kept until a parameter or a statistic changes."""
    return filter_cache.kept(
        [*filters, *gammas, *betas, *means, *variances],
        (eps,),
        lambda: fold(filters, gammas, betas, means, variances, eps),
        save=False,
    )


def _define(family: _Family) -> dict[str, torch._ops.OpOverload]:
    """The operators of a family: "forward" and "backward" of training, and "eval"."""
    geometry = family.geometry_schema
    running = "Tensor(a!)[] means, Tensor(b!)[] variances, Tensor(c!)[] batches"
    operators = {
        "forward": register(
            family.name,
            f"(Tensor x, {PARAMETERS}, {running}, {geometry}float? momentum, float eps, bool skip)"
            f" -> ({', '.join(['Tensor'] * (1 + family.saved))})",
            implementation=family.forward,
            fake=family.forward_fake,
        ),
        "backward": register(
            f"{family.name}_backward",
            f"(Tensor dy, Tensor x, Tensor[] saved, {PARAMETERS}, {geometry}bool[] needs)"
            " -> Tensor[]",
            implementation=replayed(family.backward),
            fake=family.backward_fake,
        ),
        "eval": register(
            f"{family.name}_eval",
            f"(Tensor x, {PARAMETERS}, Tensor[] means, Tensor[] variances, {geometry}float eps)"
            " -> Tensor",
            implementation=family.evaluate,
            fake=family.evaluate_fake,
        ),
    }
    refuse_double_backward(operators["backward"], f"fused_inception.reference.{family.name}")
    for op in operators.values():
        register_autocast(op, cast_first=False)
    return operators


_FAMILIES = {
    family.name: family
    for family in (
        _Family("inception_bn", geometry=0, saved=4),
        _Family("conv2d_bn_relu", geometry=2, saved=3),
    )
}
_OPERATORS = {name: _define(family) for name, family in _FAMILIES.items()}


class _Differentiable(torch.autograd.Function):
    """An operator in training and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        layers: int,
        running: tuple[list[Tensor], list[Tensor], list[Tensor]],
        options: tuple[Any, ...],
        x: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        filters, gammas, betas = _thirds(parameters, layers)
        *geometry, _, _, _ = options
        op = _OPERATORS[name]["forward"]
        y, *saved = call_below_autograd(op, x, filters, gammas, betas, *running, *options)
        ctx.name, ctx.layers, ctx.geometry = name, layers, geometry
        ctx.parameters = len(parameters)
        ctx.save_for_backward(x, *parameters, *saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * 4
        if dy is None:
            return (*nothing, *(None,) * (1 + ctx.parameters))
        x, *rest = ctx.saved_tensors
        parameters, saved = rest[: ctx.parameters], rest[ctx.parameters :]
        needs = list(ctx.needs_input_grad[4:])
        # implementations ask for every gradient that there could be
        asked = needs + [False] * (1 + 3 * ctx.layers - len(needs))
        gradients = call_below_autograd(
            _OPERATORS[ctx.name]["backward"],
            dy,
            x,
            saved,
            *_thirds(parameters, ctx.layers),
            *ctx.geometry,
            asked,
        )
        given = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return (*nothing, *given)


def _thirds(
    parameters: Sequence[Tensor], layers: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Filters, gammas, betas; the last two empty where BatchNorm has no parameters."""
    return (
        [*parameters[:layers]],
        [*parameters[layers : 2 * layers]],
        [*parameters[2 * layers :]],
    )


def train(
    name: str,
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    running: tuple[list[Tensor], list[Tensor], list[Tensor]],
    options: tuple[Any, ...],
) -> Tensor:
    """The operator `name` with the batch's statistics.

    running: means, variances, counters, each empty where not tracked. options: of the geometry,
    then momentum, eps, skip.
    """
    parameters = (*filters, *gammas, *betas)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parameters)):
        if not torch.compiler.is_compiling():
            begin_gradients(f"fused_inception::{name}")
        return _Differentiable.apply(name, len(filters), running, options, x, *parameters)
    op = _OPERATORS[name]["forward"]
    if not torch.compiler.is_compiling():
        refuse_tangents(op, (x, filters, gammas, betas))
    return call_below_autograd(op, x, filters, gammas, betas, *running, *options)[0]


def evaluate(
    name: str,
    x: Tensor,
    filters: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    options: tuple[Any, ...],
) -> Tensor:
    """The operator `name` with the running statistics; options: of the geometry, then eps."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *gammas, *betas)):
        *geometry, eps = options
        weights, biases = fold(filters, gammas, betas, means, variances, eps)
        return _FAMILIES[name].with_biases(x, weights, biases, geometry, True)[0]
    op = _OPERATORS[name]["eval"]
    if not torch.compiler.is_compiling():
        refuse_tangents(op, (x, filters, gammas, betas))
    return call_below_autograd(op, x, filters, gammas, betas, means, variances, *options)

"""The stem of the paper's GoogLeNet, from the image to the first Inception module, as one operator:
what is saved, fakes, gradients.

It exists on the Triton path alone, where it saves launches and memory; through ATen it would be the
five operators that it stands for, and `functional.googlenet_stem` calls those.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_inception.geometry import (
    ALIGN,
    NO_STEM_CONV,
    STEM_CHANNELS,
    STEM_CONV,
    why_no_norm_kernel,
    why_no_pool_kernel,
)
from fused_inception.ops.layout import as_saved, empty_channels_last, gradients_like, settle_all
from fused_inception.ops.registration import (
    needed_gradients,
    refuse_unsaved,
    register_autograd,
    register_with_backward,
)
from fused_inception.ops.replay import replayed
from fused_inception.ops.stages import Stem


def why_not(filters: Sequence[Tensor], stem: Stem) -> str | None:
    """Why there is no operator for such a stem; None where there is."""
    w1, w2, w3 = filters
    if (w1.shape[2], stem.stride, stem.padding) != STEM_CONV or w1.shape[1] > STEM_CHANNELS:
        return f"conv1 {NO_STEM_CONV}"
    widths = [w.shape[0] for w in (w1, w2, w3)]
    if any(width % ALIGN != 0 for width in widths):
        return f"widths must be multiples of {ALIGN}, got {widths}"
    pool, norm = max(stem.pool1.kernel, stem.pool2.kernel), max(stem.norm1[0], stem.norm2[0])
    return why_no_pool_kernel(pool) or why_no_norm_kernel(norm)


@replayed
def _forward(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    integers: list[int],
    constants: list[float],
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    from fused_inception.ops import stem_triton

    return stem_triton.forward(x, filters, biases, Stem.of(integers, constants), save)


def _forward_fake(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    integers: list[int],
    constants: list[float],
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    from fused_inception.kernels.stem_conv import packed_image_shape

    stem, (w1, w2, w3) = Stem.of(integers, constants), filters
    heights, widths = (stem.sides(side, w1.shape[2]) for side in x.shape[2:])

    def like(c: int, which: int, dtype: torch.dtype) -> Tensor:
        height, width = heights[which], widths[which]
        return empty_channels_last(x.shape[0], c, height, width, dtype=dtype, device=x.device)

    c1, c2, c3 = w1.shape[0], w2.shape[0], w3.shape[0]
    y = like(c3, 2, x.dtype)
    if not save:
        return y, []
    pooled, index1, z = like(c1, 1, x.dtype), like(c1, 1, torch.uint8), like(c1, 1, x.dtype)
    r, y2, index2 = like(c2, 1, x.dtype), like(c3, 1, x.dtype), like(c3, 2, torch.uint8)
    image = x.new_empty(packed_image_shape(x.shape[0], heights[0], widths[0]))
    return y, [pooled, index1, z, r, y2, index2, image]


@replayed
def _backward(
    dy: Tensor,
    x: Tensor | None,
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    integers: list[int],
    constants: list[float],
    needs: list[bool],
) -> list[Tensor]:
    from fused_inception.ops import stem_triton

    stem = Stem.of(integers, constants)
    maps, packed_image = as_saved(saved[:6]), saved[6]
    gradients = stem_triton.backward(dy, x, [*maps, packed_image], filters, biases, stem, needs)
    return settle_all(gradients, dy if x is None else x, (*filters, *biases), needs)


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    *options: Any,
) -> list[Tensor]:
    return gradients_like(dy if x is None else x, (*filters, *biases), options[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, filters, biases, ctx.integers, ctx.constants, ctx.saves = inputs
    _, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    if ctx.saves:
        # of the image behind the packed one only its own gradient needs to know
        kept = x if x.requires_grad else None
        ctx.save_for_backward(kept, *filters, *biases, *saved)


def _differentiate(ctx: Any, dy: Tensor | None, dsaved: Any) -> tuple[Any, ...]:
    if dy is None:
        return None, [None] * 3, [None] * 3, None, None, None
    refuse_unsaved(ctx.saves)
    x, *rest = ctx.saved_tensors
    filters, biases, saved = rest[:3], rest[3:6], rest[6:]
    needs_x, needs_filters, needs_biases = ctx.needs_input_grad[:3]
    needs = [needs_x, *needs_filters, *needs_biases]
    options = ctx.integers, ctx.constants
    dx, *rest = needed_gradients(
        googlenet_stem_backward, dy, x, saved, filters, biases, *options, needs=needs
    )
    return dx, rest[:3], rest[3:], None, None, None


_OPTIONS = "int[] integers, float[] constants"

googlenet_stem, googlenet_stem_backward = register_with_backward(
    "googlenet_stem",
    f"(Tensor x, Tensor[] filters, Tensor[] biases, {_OPTIONS}, bool save) -> (Tensor, Tensor[])",
    "(Tensor dy, Tensor? x, Tensor[] saved, Tensor[] filters, Tensor[] biases,"
    f" {_OPTIONS}, bool[] needs) -> Tensor[]",
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    cast_first=True,
)
register_autograd(googlenet_stem, _differentiate, _setup_context)

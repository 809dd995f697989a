"""Running statistics of BatchNorm layers, as an operator receives them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Running:
    """Of all BatchNorms of an operator; empty where none are tracked."""

    means: Sequence[Tensor]
    variances: Sequence[Tensor]
    batches: Sequence[Tensor]  # counters, int64
    momentum: float | None  # None: the average of all batches
    skip: bool  # leave out a batch's statistics where they are not finite

    def advance(self) -> None:
        """Count this batch, all layers at once."""
        if self.batches:
            torch._foreach_add_([*self.batches], 1)

    def of(self, layer: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(mean, variance, counter of a cumulative average) of one layer."""
        if not self.means:
            return None, None, None
        counter = self.batches[layer] if self.momentum is None else None
        return self.means[layer], self.variances[layer], counter

    def scratch(self, layer: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance of one layer as `batch_norm` may update them, in `dtype`: themselves
        where their own are not to be changed in another way, for `take`."""
        if not self.means:
            return None, None
        mean, var = self.means[layer], self.variances[layer]
        if self.skip or mean.dtype != dtype or var.dtype != dtype:
            return mean.to(dtype, copy=True), var.to(dtype, copy=True)
        if torch.compiler.is_compiling():
            return mean, var
        # .data: autograd keeps them, and would take what `mark` does for a change
        return mean.data, var.data

    def take(self, layer: int, mean: Tensor | None, var: Tensor | None) -> None:
        """Write back what `scratch` gave and `batch_norm` updated."""
        if mean is None or var is None:
            return
        finite = mean.isfinite() & var.isfinite() if self.skip else None
        for old, new in ((self.means[layer], mean), (self.variances[layer], var)):
            if finite is not None:
                old.copy_(torch.where(finite, new.to(old.dtype), old))
            elif new.dtype != old.dtype:
                old.copy_(new)

    def weight_of_new(self, layer: int) -> float:
        """The momentum; in a cumulative average one part of all batches."""
        if self.momentum is not None:
            return self.momentum
        return 1.0 / self.batches[layer].item() if self.batches else 0.0

    def mark(self) -> None:
        """Tell autograd and the filter cache that they have been written to."""
        if torch.compiler.is_compiling():  # which writes to them itself
            return
        buffers = (*self.means, *self.variances, *self.batches)
        # tensors made in inference mode have no version, and nothing caches them
        torch.autograd.graph.increment_version([b for b in buffers if not b.is_inference()])

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

    def mark(self) -> None:
        """Tell autograd and the filter cache that they have been written to."""
        buffers = (*self.means, *self.variances, *self.batches)
        # tensors made in inference mode have no version, and nothing caches them
        torch.autograd.graph.increment_version([b for b in buffers if not b.is_inference()])

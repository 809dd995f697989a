"""The layout in which an operator gets its input."""

import torch
from torch import Tensor

from fused_inception.backend import Implementation
from fused_inception.ops.layout import refuse_vmap, why_not_in_place


def settle(x: Tensor, impl: Implementation) -> Tensor:
    """`x` in the layout that `impl` reads: converted here, it is not converted again in backward.

    Channels that Triton has to pad are left to the operator, which does not keep the padded copy.
    """
    try:
        if impl == "triton" and why_not_in_place(x) is None:
            return x
        return x.contiguous(memory_format=torch.channels_last)
    except RuntimeError:
        refuse_vmap()
        raise

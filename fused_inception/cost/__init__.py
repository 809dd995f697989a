"""FLOPs, bytes, launches, saved memory and predicted time from geometry; no torch.

    cost = network("paper", batch=32, plan="fused")
    cost.flops, cost.saved_bytes, cost.launches("triton"), cost.seconds(H200)

Three plans walk through the same layers: eager PyTorch, torch.compile, and this library. Each
writes down its operators, with the tensors that they read and write, and the tensors that it saves
for backward. Time is a roofline with the figures of a `Device`: a prediction, never a measurement.
"""

from fused_inception.cost.device import H200, Device, Figure
from fused_inception.cost.layers import (
    PAPER_BUDGET,
    PAPER_TABLE_1,
    Aux,
    Conv,
    Module,
    Network,
    Pool,
)
from fused_inception.cost.ops import BACKWARD, FORWARD, Cost, Gemm, Op, Saved, Tensor
from fused_inception.cost.plans import ITEMSIZE, PLANS, block, inception, network
from fused_inception.geometry import VARIANTS

__all__ = [
    "BACKWARD",
    "FORWARD",
    "H200",
    "ITEMSIZE",
    "PAPER_BUDGET",
    "PAPER_TABLE_1",
    "PLANS",
    "VARIANTS",
    "Aux",
    "Conv",
    "Cost",
    "Device",
    "Figure",
    "Gemm",
    "Module",
    "Network",
    "Op",
    "Pool",
    "Saved",
    "Tensor",
    "block",
    "inception",
    "network",
]

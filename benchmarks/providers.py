"""Who is compared: one Inception module each, made from the same widths."""

from collections.abc import Callable

import torch
from torch import nn

import fused_inception as fi
from fused_inception import reference
from fused_inception.geometry import InceptionDims


def _fused(dims: InceptionDims) -> nn.Module:
    return fi.Inception(*dims.widths, kernel_5x5=dims.kernel_5x5)


def _eager(dims: InceptionDims) -> nn.Module:
    return reference.Inception(*dims.widths, kernel_5x5=dims.kernel_5x5)


# by the name that tests and results carry; the harness brings filters and inputs to channels last
PROVIDERS: dict[str, Callable[[InceptionDims], nn.Module]] = {
    "fused": _fused,
    "eager": _eager,
    "compile": _eager,
}


def build(
    name: str,
    dims: InceptionDims,
    filters: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> nn.Module:
    """The provider's module with these parameters, in their dtype and on their device.

    Filters are channels last. "compile" compiles whole graphs: what torch cannot compile is an
    error, never a silent return to eager.
    """
    module = PROVIDERS[name](dims)
    module.to(filters[0].device, filters[0].dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [t for pair in zip(filters, biases, strict=True) for t in pair]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)
    if name == "compile":
        module.compile(fullgraph=True, dynamic=False)
    return module

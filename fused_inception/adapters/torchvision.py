"""torchvision's GoogLeNet. torchvision itself is never imported: who has its blocks, has it."""

import sys
from collections.abc import Callable
from functools import partial

from torch import nn

from fused_inception.adapters.registry import Family, entries
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.inception import Inception

MODULE = "torchvision.models.googlenet"
EPS = 1e-3  # of its BatchNorm


def family() -> Family:
    """Its types, where it is imported."""
    module = sys.modules.get(MODULE)
    if module is None:
        return Family()
    return Family(
        entries(
            "torchvision's",
            lambda _: "batch",
            conv_block=module.BasicConv2d,
            inception=module.Inception,
            aux=module.InceptionAux,
            pool_of=lambda _: "adaptive",
        ),
        networks=(module.GoogLeNet,),
    )


def torchvision_blocks() -> list[Callable[..., nn.Module]]:
    """Fused blocks for torchvision's own injection point.

        torchvision.models.GoogLeNet(blocks=fi.torchvision_blocks(), init_weights=True)

    is torchvision's network, its state dict and its initialisation, with our `ConvBlock`,
    `Inception` (3x3 filters in the "5x5" branch, as torchvision has it) and `InceptionAux`, all
    with BatchNorm of eps 0.001. Its pools stay PyTorch's; `fuse_` takes them too.

    Returns:
        Three callables: convolution block, Inception module, auxiliary classifier.
    """
    return [
        partial(ConvBlock, norm="batch", eps=EPS),
        partial(Inception, norm="batch", kernel_5x5=3, eps=EPS),
        partial(InceptionAux, norm="batch", pool="adaptive"),
    ]

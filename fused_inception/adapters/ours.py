"""Our own modules: those of the reference, which can be fused, and those that are fused."""

from typing import NoReturn

from torch import nn

from fused_inception import reference
from fused_inception.adapters.registry import Entry, Family, checked, entries, leaf
from fused_inception.nn.adoption import origin_of
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.googlenet import GoogLeNet
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception
from fused_inception.nn.inception_naive import InceptionNaive, change_inside_naive
from fused_inception.nn.pooling import LocalResponseNorm, LRNMaxPool2d, MaxPool2d, MaxPoolLRN2d

# what `fuse_` finds done
FUSED: tuple[type[nn.Module], ...] = (
    ConvBlock,
    GlobalAvgPool2d,
    Inception,
    InceptionAux,
    InceptionNaive,
    LRNMaxPool2d,
    LocalResponseNorm,
    MaxPool2d,
    MaxPoolLRN2d,
)


def _not_scriptable(module: nn.Module) -> NoReturn:
    name = type(module).__name__
    way = "torch.compile can" if origin_of(module) is None else "unfuse_ the model first"
    raise RuntimeError(f"torch.jit.script cannot compile {name}, a fused block: {way}")


# torch.jit.script calls it of each module before it compiles the first one
for _cls in (*FUSED, GoogLeNet):
    _cls.__prepare_scriptable__ = _not_scriptable  # type: ignore[attr-defined]


def family() -> Family:
    """The types of the reference."""
    blocks = entries(
        "reference",
        lambda block: block.norm,
        conv_block=reference.ConvBlock,
        inception=reference.Inception,
        aux=reference.InceptionAux,
        pool_of=lambda block: block.pool,
    )
    blocks[reference.InceptionNaive] = Entry(
        "reference InceptionNaive",
        InceptionNaive,
        checked(lambda block: change_inside_naive(block, reference.ConvBlock)),
        InceptionNaive.adopt,
    )
    blocks[reference.LocalResponseNorm] = leaf("reference LocalResponseNorm", LocalResponseNorm)
    blocks[reference.GlobalAvgPool2d] = leaf("reference GlobalAvgPool2d", GlobalAvgPool2d)
    return Family(blocks, networks=(reference.GoogLeNet,))

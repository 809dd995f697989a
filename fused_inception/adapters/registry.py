"""What can be told of a block that is to be fused: is it what its type says, and what it becomes.

A family is the set of types of one library. Types are matched exactly: a subclass may compute
something else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fused_inception.geometry import why_no_conv_kernel, why_no_pool_kernel
from fused_inception.nn.adoption import adopt
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock, change_of, change_of_conv
from fused_inception.nn.head import GlobalAvgPool2d, change_of_mean
from fused_inception.nn.inception import Inception, change_inside
from fused_inception.nn.pooling import MaxPool2d, change_of_pool


@dataclass(frozen=True)
class Entry:
    """How blocks of one type become ours."""

    label: str
    becomes: type[nn.Module]
    # why a block cannot be fused; None where it can
    obstacle: Callable[[Any], str | None]
    # changes the block in place, returns the modules that changed
    adopt: Callable[[Any], list[nn.Module]]


@dataclass(frozen=True)
class Family:
    """The types of one library: its blocks, and networks whose own pools are fused too."""

    blocks: Mapping[type[nn.Module], Entry] = field(default_factory=dict)
    networks: tuple[type[nn.Module], ...] = ()


def entries(
    library: str,
    norm_of: Callable[[Any], str | None],
    *,
    conv_block: type[nn.Module],
    inception: type[nn.Module],
    aux: type[nn.Module],
    pool_of: Callable[[Any], str],
) -> dict[type[nn.Module], Entry]:
    """The three blocks of a GoogLeNet whose children have torchvision's names.

    Args:
        library: whose they are, for reports.
        norm_of: a convolution block -> None for a bias, "batch" for BatchNorm.
        conv_block, inception, aux: the types.
        pool_of: an auxiliary classifier -> "paper" or "adaptive".
    """

    def aux_obstacle(block: Any) -> str | None:
        expected = {"conv": conv_block, "fc1": nn.Linear, "fc2": nn.Linear, "dropout": nn.Dropout}
        if [*block._modules] != [*expected]:
            return "layers were added or removed"
        for name, cls in expected.items():
            child = block._modules[name]
            # a convolution block may be one of ours already
            cls = ConvBlock if type(child) is ConvBlock else cls
            change = change_of(child, cls)
            if change is not None:
                return f"{name} {change}"
        obstacle = _conv_block_obstacle(block.conv, norm_of(block.conv))
        return obstacle and f"conv.{obstacle}"

    def inception_obstacle(block: Any) -> str | None:
        first = block._modules.get("branch1")
        if type(first) not in (conv_block, ConvBlock):
            return f"branch1 is a {type(first).__name__}"
        return change_inside(block, norm_of(first), (conv_block,))

    def label(cls: type[nn.Module]) -> str:
        return f"{library} {cls.__name__}"

    return {
        conv_block: Entry(
            label(conv_block),
            ConvBlock,
            checked(lambda block: _conv_block_obstacle(block, norm_of(block))),
            lambda block: ConvBlock.adopt(block, norm_of(block)),
        ),
        inception: Entry(
            label(inception),
            Inception,
            checked(inception_obstacle),
            lambda block: Inception.adopt(block, norm_of(block.branch1)),
        ),
        aux: Entry(
            label(aux),
            InceptionAux,
            checked(aux_obstacle),
            lambda block: InceptionAux.adopt(block, norm_of(block.conv), pool_of(block)),
        ),
    }


def leaf(
    label: str,
    becomes: type[nn.Module],
    obstacle: Callable[[Any], str | None] = lambda _: None,
) -> Entry:
    """A layer without children whose attributes are named as ours are."""

    def change(module: nn.Module) -> list[nn.Module]:
        adopt(module, becomes)
        return [module]

    return Entry(label, becomes, checked(obstacle), change)


def _conv_block_obstacle(block: Any, norm: str | None) -> str | None:
    if [*block._modules] != (["conv"] if norm is None else ["conv", "bn"]):
        return "layers were added or removed"
    conv = block.conv
    change = change_of_conv(conv, norm)
    if change is not None:
        return f"conv {change}"
    if norm is not None:
        change = change_of(block.bn, nn.BatchNorm2d)
        if change is not None:
            return f"bn {change}"
    reason = why_no_conv_kernel(
        conv.in_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0]
    )
    return reason and f"conv has {reason}"


def _max_pool_obstacle(pool: Any) -> str | None:
    change = change_of_pool(pool)
    if change is not None:
        return change
    for name in ("kernel_size", "stride", "padding"):
        value = getattr(pool, name)
        if not isinstance(value, int) and len(set(value)) != 1:
            return f"has {name} {value}"
    kernel = pool.kernel_size if isinstance(pool.kernel_size, int) else pool.kernel_size[0]
    reason = why_no_pool_kernel(kernel)
    return reason and f"has {reason}"


def checked(obstacle: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """`obstacle` behind what holds for blocks of every type."""
    return lambda block: _wrapped(block) or obstacle(block) or _odd_tensor(block)


def _wrapped(block: nn.Module) -> str | None:
    if "forward" in vars(block):
        return "has a forward of its own"
    if getattr(block, "_compiled_call_impl", None) is not None:
        return "was compiled on its own: fuse first"
    return None


def _odd_tensor(block: nn.Module) -> str | None:
    """Parameters that are more than numbers: quantised, sharded, not there yet."""
    for name, parameter in block.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}"
    return None


# layers of PyTorch that are fused where they are children of a known network
POOLS: dict[type[nn.Module], Entry] = {
    nn.MaxPool2d: leaf("nn.MaxPool2d", MaxPool2d, _max_pool_obstacle),
    nn.AdaptiveAvgPool2d: leaf("nn.AdaptiveAvgPool2d", GlobalAvgPool2d, change_of_mean),
}

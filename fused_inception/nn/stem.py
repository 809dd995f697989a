"""The stem of the paper's network: seven layers as one operator where nothing looks in between."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import NO_STEM_CONV, STEM_CHANNELS, STEM_CONV
from fused_inception.nn.conv_block import ConvBlock, change_of, global_hook
from fused_inception.nn.pooling import (
    LocalResponseNorm,
    MaxPool2d,
    norm_then_pool,
    pool_then_norm,
    square_window,
    why_no_window,
)

# the layers in their order, by their names in the network
LAYERS: dict[str, type[nn.Module]] = {
    "conv1": ConvBlock,
    "maxpool1": MaxPool2d,
    "norm1": LocalResponseNorm,
    "conv2": ConvBlock,
    "conv3": ConvBlock,
    "norm2": LocalResponseNorm,
    "maxpool2": MaxPool2d,
}


def stem(x: Tensor, layers: Sequence[Any]) -> Tensor:
    """Images through `layers`, in the order of `LAYERS`; the norms may be None.

    One operator, `functional.googlenet_stem`, unless `obstacle` has a reason; else layer by layer,
    each pool with its norm.
    """
    conv1, maxpool1, norm1, conv2, conv3, norm2, maxpool2 = layers
    if obstacle(layers) is not None:
        x = pool_then_norm(conv1(x), maxpool1, norm1)
        return norm_then_pool(conv3(conv2(x)), norm2, maxpool2)
    convs = [block.conv for block in (conv1, conv2, conv3)]
    return functional.googlenet_stem(
        x,
        *(parameter for conv in convs for parameter in (conv.weight, conv.bias)),
        stride=convs[0].stride[0],
        padding=convs[0].padding[0],
        pool1=square_window(maxpool1),
        norm1=_numbers(norm1),
        norm2=_numbers(norm2),
        pool2=square_window(maxpool2),
    )


def obstacle(layers: Sequence[Any]) -> str | None:
    """Why the layers compute one by one; None where one operator does."""
    hook = global_hook()
    if hook is not None:
        return hook
    for (name, expected), layer in zip(LAYERS.items(), layers, strict=True):
        if layer is None:
            return f"there is no {name}"
        change = change_of(layer, expected)
        if change is None and expected is ConvBlock:
            change = _change_of_conv(layer, {"conv2": 1, "conv3": 3}.get(name))
        if change is None and expected is MaxPool2d:
            change = why_no_window(layer)
        if change is not None:
            return f"{name} {change}"
    return None


def _change_of_conv(block: ConvBlock, kernel: int | None) -> str | None:
    """What the operator takes for granted: with `kernel`, that the convolution is of this size and
    keeps that of its input; without, that it is conv1."""
    if block.norm is not None:
        return "has batch norm"
    if not block.is_fused:
        return "is plain PyTorch"
    conv, padding = block.conv, (kernel or 0) // 2
    sizes = (conv.kernel_size, conv.stride, conv.padding)
    if kernel is None:
        stem_sizes = tuple((n, n) for n in STEM_CONV)
        return None if sizes == stem_sizes and conv.in_channels <= STEM_CHANNELS else NO_STEM_CONV
    if sizes != ((kernel,) * 2, (1, 1), (padding,) * 2):
        return f"is no {kernel}x{kernel} convolution that keeps the size"
    return None


def _numbers(norm: Any) -> tuple[int, float, float, float]:
    return norm.size, norm.alpha, norm.beta, norm.k

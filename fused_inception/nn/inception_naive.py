"""The naive Inception module."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import NaiveDims
from fused_inception.nn.adoption import adopt
from fused_inception.nn.conv_block import FUSED, INSIDE, ConvBlock, global_hook
from fused_inception.nn.inception import Layers, change_of_layers


class InceptionNaive(nn.Module):
    """Four branches of one input, concatenated (figure 2a of arXiv 1409.4842).

    cat(1x1(x), 3x3(x), 5x5(x), 3x3 max pool(x)), each convolution with bias and ReLU, as one fused
    operator, `functional.inception_naive`: the output keeps all channels of the input. The children
    `branch1` to `branch4` hold the parameters. Where one of them has got a hook or is of another
    type than it was made, the children compute; `print` tells.

    Args:
        in_channels: channels of the input.
        ch1x1, ch3x3, ch5x5: widths of the three convolutions.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width below 1.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3: int,
        ch5x5: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = (in_channels, ch1x1, ch3x3, ch5x5)
        if min(widths) < 1:
            raise ValueError(f"widths must be at least 1, got {widths}")
        self.dims = NaiveDims(*widths)

        def conv(c_out: int, side: int) -> ConvBlock:
            block = ConvBlock(
                in_channels, c_out, kernel_size=side, padding=side // 2, device=device, dtype=dtype
            )
            block.path = INSIDE
            return block

        self.branch1 = conv(ch1x1, 1)
        self.branch2 = conv(ch3x3, 3)
        self.branch3 = conv(ch5x5, 5)
        self.branch4 = nn.MaxPool2d(3, stride=1, padding=1)

    @classmethod
    def adopt(cls, block: nn.Module) -> list[nn.Module]:
        """Make `block`, whose children have our names and types, one of ours in place.

        Returns:
            The modules that changed, for `adoption.release`.
        """
        blocks = _blocks_of(block)
        dims = NaiveDims(blocks[0].conv.in_channels, *(b.conv.out_channels for b in blocks))
        changed = [module for b in blocks for module in ConvBlock.adopt(b, None, INSIDE)]
        adopt(block, cls, dims=dims)
        return [*changed, block]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + C_in, H, W]."""
        blocks = _blocks_of(self)
        if not self.is_fused:
            return torch.cat([*(block(x) for block in blocks), self.branch4(x)], dim=1)
        parameters = [p for block in blocks for p in (block.conv.weight, block.conv.bias)]
        return functional.inception_naive(x, *parameters)

    def extra_repr(self) -> str:
        """Widths and path, for `print`."""
        d = self.dims
        return (
            f"{d.in_channels} -> {d.out_channels} (1x1: {d.ch1x1}, 3x3: {d.ch3x3}, "
            f"5x5: {d.ch5x5}, pool: {d.in_channels}), bias, relu, {self._obstacle() or FUSED}"
        )

    @property
    def is_fused(self) -> bool:
        """Whether forward is the fused operator."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the children compute; None where the fused operator does."""
        change = global_hook() or change_inside_naive(self, ConvBlock)
        return None if change is None else f"plain PyTorch: {change}"


def change_inside_naive(block: nn.Module, container: type[nn.Module]) -> str | None:
    """What the fused operator would pass over inside `block`; None where it is a naive module.

    `container` is the type that a convolution may be in.
    """
    return change_of_layers(block, _INSIDE, None, (container,))


def _blocks_of(module: Any) -> list[Any]:
    """1x1, 3x3 and 5x5: each has `conv`."""
    return [module.branch1, module.branch2, module.branch3]


_INSIDE: Layers = (
    ("branch1", ConvBlock, ()),
    ("branch1.conv", nn.Conv2d, (1,)),
    ("branch2", ConvBlock, ()),
    ("branch2.conv", nn.Conv2d, (3,)),
    ("branch3", ConvBlock, ()),
    ("branch3.conv", nn.Conv2d, (5,)),
    ("branch4", nn.MaxPool2d, ()),
)

"""The Inception module with dimension reduction."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import InceptionDims
from fused_inception.nn.conv_block import FUSED, PLAIN, ConvBlock, change_of


class Inception(nn.Module):
    """Four branches of one input, concatenated (figure 2b of arXiv 1409.4842).

    cat(1x1(x), 3x3(3x3 reduce(x)), 5x5(5x5 reduce(x)), projection(3x3 max pool(x))), each
    convolution with ReLU. With `norm=None` the module is one fused operator,
    `functional.inception`; with `norm="batch"` it is plain PyTorch for now. The children hold the
    parameters under torchvision's names: `branch1`, `branch2.0`, `branch2.1`, `branch3.0`,
    `branch3.1`, `branch4.1`. Where one of them has got a hook or is of another type than it was
    made, the children compute, so that nothing is passed over; `print` tells.

    Args:
        in_channels: channels of the input.
        ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj: widths of the six convolutions.
        norm: None for biases, "batch" for BatchNorm.
        kernel_5x5: 5, or 3 as torchvision has it.
        eps, momentum: of BatchNorm.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width below 1, an unknown `norm` or `kernel_5x5`.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        *,
        norm: str | None = None,
        kernel_5x5: int = 5,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = (in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj)
        if min(widths) < 1:
            raise ValueError(f"widths must be at least 1, got {widths}")
        if kernel_5x5 not in (3, 5):
            raise ValueError(f"kernel_5x5 must be 3 or 5, got {kernel_5x5}")
        self.dims = InceptionDims(*widths, kernel_5x5=kernel_5x5)
        self.norm = norm
        options: dict[str, Any] = {
            "norm": norm,
            "eps": eps,
            "momentum": momentum,
            "device": device,
            "dtype": dtype,
        }

        def conv(c_in: int, c_out: int, side: int) -> ConvBlock:
            return ConvBlock(c_in, c_out, kernel_size=side, padding=side // 2, **options)

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, ch3x3red, 1), conv(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, 1), conv(ch5x5red, ch5x5, kernel_5x5)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), conv(in_channels, pool_proj, 1)
        )
        if norm is None:
            for module in self.modules():
                if isinstance(module, ConvBlock):
                    module.path = "parameters of the fused module"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]."""
        if self._obstacle() is not None:
            branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
            return torch.cat(branches, dim=1)
        one, (reduce3, three), (reduce5, five) = self.branch1, self.branch2, self.branch3
        _, projection = self.branch4
        blocks: list[Any] = [one, reduce3, three, reduce5, five, projection]
        parameters = [p for block in blocks for p in (block.conv.weight, block.conv.bias)]
        return functional.inception(x, *parameters)

    def extra_repr(self) -> str:
        """Widths, mode and path, for `print`."""
        d, obstacle = self.dims, self._obstacle()
        k = d.kernel_5x5
        return (
            f"{d.in_channels} -> {d.out_channels} (1x1: {d.ch1x1}, 3x3: {d.ch3x3red} -> {d.ch3x3}, "
            f"{k}x{k}: {d.ch5x5red} -> {d.ch5x5}, pool: {d.pool_proj}), "
            f"{'batch norm' if self.norm else 'bias'}, relu, "
            f"{FUSED if obstacle is None else obstacle}"
        )

    @property
    def is_fused(self) -> bool:
        """Whether forward is the fused operator."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the children compute; None where the fused operator does."""
        if self.norm is not None:
            return PLAIN
        inside: list[nn.Module] = []
        _collect(self, inside)
        if len(inside) != len(_INSIDE):
            return "plain PyTorch: layers were added or removed"
        for (name, expected), module in zip(_INSIDE, inside, strict=True):
            change = change_of(module, expected)
            if change is not None:
                return f"plain PyTorch: {name} {change}"
        return None


def _collect(module: nn.Module, inside: list[nn.Module]) -> None:
    for child in module._modules.values():
        if child is not None:
            inside.append(child)
            _collect(child, inside)


# all that the fused operator stands for, depth first
_INSIDE: tuple[tuple[str, type[nn.Module]], ...] = (
    ("branch1", ConvBlock),
    ("branch1.conv", nn.Conv2d),
    ("branch2", nn.Sequential),
    ("branch2.0", ConvBlock),
    ("branch2.0.conv", nn.Conv2d),
    ("branch2.1", ConvBlock),
    ("branch2.1.conv", nn.Conv2d),
    ("branch3", nn.Sequential),
    ("branch3.0", ConvBlock),
    ("branch3.0.conv", nn.Conv2d),
    ("branch3.1", ConvBlock),
    ("branch3.1.conv", nn.Conv2d),
    ("branch4", nn.Sequential),
    ("branch4.0", nn.MaxPool2d),
    ("branch4.1", ConvBlock),
    ("branch4.1.conv", nn.Conv2d),
)

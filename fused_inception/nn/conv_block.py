"""Convolution, BatchNorm or bias, ReLU: the unit that GoogLeNet is made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import functional

PLAIN = "plain PyTorch: no fused kernel yet"
FUSED = "one fused operator"


def change_of(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """What a fused operator would pass over in an inner layer: type, hook, no bias."""
    if type(module) is not expected:
        return f"is a {type(module).__name__}"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "has a hook"
    if isinstance(module, nn.Conv2d) and module.bias is None:
        return "has no bias"
    return None


class ConvBlock(nn.Module):
    """relu(conv(x) + bias), or relu(batch_norm(conv(x))) with `norm="batch"`.

    Children: `conv`, and `bn` with BatchNorm; torchvision's names. With a bias it runs as
    `functional.conv2d_relu`, with BatchNorm as plain PyTorch so far; inside a fused `Inception` it
    only holds the parameters. Where `conv` has got a hook or another type, it computes itself.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: of the convolution.
        norm: None for a bias, "batch" for BatchNorm and no bias.
        eps, momentum: of the BatchNorm.
        device, dtype: of the parameters.

    Raises:
        ValueError: unknown `norm`.
    """

    # what `print` says of a fused block; a fused parent writes its own
    path = FUSED

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        norm: str | None = None,
        eps: float = 1e-3,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in (None, "batch"):
            raise ValueError(f'norm must be None or "batch", got {norm!r}')
        self.norm = norm
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            bias=norm is None,
            device=device,
            dtype=dtype,
        )
        if norm == "batch":
            self.bn = nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        conv: Any = self.conv
        if self.is_fused:
            stride, padding = conv.stride[0], conv.padding[0]
            return functional.conv2d_relu(x, conv.weight, conv.bias, stride, padding)
        x = conv(x)
        if self.norm == "batch":
            x = self.bn(x)
        return F.relu(x, inplace=True)

    @property
    def is_fused(self) -> bool:
        """Whether forward is the fused operator."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the children compute; None where the fused operator does."""
        if self.norm is not None:
            return PLAIN
        change = change_of(self.conv, nn.Conv2d)
        return None if change is None else f"plain PyTorch: conv {change}"

    def extra_repr(self) -> str:
        """Mode and path, for `print`."""
        mode = "bias" if self.norm is None else "batch norm"
        return f"{mode}, relu, {self._obstacle() or self.path}"

"""Convolution, BatchNorm or bias, ReLU: the unit that GoogLeNet is made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import functional

PLAIN = "plain PyTorch: no fused kernel yet"
FUSED = "one fused operator"


class ConvBlock(nn.Module):
    """relu(conv(x) + bias), or relu(batch_norm(conv(x))) with `norm="batch"`.

    Children: `conv`, and `bn` with BatchNorm; torchvision's names. With a bias it runs as
    `functional.conv2d_relu`, with BatchNorm as plain PyTorch so far; inside a fused `Inception` it
    only holds the parameters.

    Args:
        in_channels, out_channels, kernel_size, stride, padding: of the convolution.
        norm: None for a bias, "batch" for BatchNorm and no bias.
        eps, momentum: of the BatchNorm.
        device, dtype: of the parameters.

    Raises:
        ValueError: unknown `norm`.
    """

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
        # what `print` says; a fused parent writes its own
        self.path = FUSED if norm is None else PLAIN
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
        if self.norm is None and self.conv.bias is not None:
            stride, padding = self.conv.stride[0], int(self.conv.padding[0])
            return functional.conv2d_relu(x, self.conv.weight, self.conv.bias, stride, padding)
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def extra_repr(self) -> str:
        """Mode and path, for `print`."""
        return f"{'batch norm' if self.norm else 'bias'}, relu, {self.path}"

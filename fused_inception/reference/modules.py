"""The blocks of GoogLeNet in plain PyTorch; the names of their children are torchvision's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception.geometry import AUX_CHANNELS, aux_features
from fused_inception.reference.functions import global_avg_pool2d, local_response_norm


class ConvBlock(nn.Module):
    """Convolution and ReLU, with a bias (`norm=None`) or with BatchNorm (`norm="batch"`)."""

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
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        x = self.conv(x)
        if self.norm == "batch":
            x = self.bn(x)
        return F.relu(x, inplace=True)


class Inception(nn.Module):
    """The Inception module with dimension reduction; `kernel_5x5=3` is torchvision's form."""

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

        def conv(c_in: int, c_out: int, kernel_size: int) -> ConvBlock:
            return ConvBlock(
                c_in,
                c_out,
                kernel_size=kernel_size,
                padding=kernel_size // 2,
                norm=norm,
                eps=eps,
                momentum=momentum,
                device=device,
                dtype=dtype,
            )

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, ch3x3red, 1), conv(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, 1), conv(ch5x5red, ch5x5, kernel_5x5)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1, ceil_mode=True), conv(in_channels, pool_proj, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]."""
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(branches, dim=1)


class InceptionNaive(nn.Module):
    """The naive Inception module (figure 2a): its output keeps all channels of the input."""

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

        def conv(c_out: int, kernel_size: int) -> ConvBlock:
            return ConvBlock(
                in_channels,
                c_out,
                kernel_size=kernel_size,
                padding=kernel_size // 2,
                device=device,
                dtype=dtype,
            )

        self.branch1 = conv(ch1x1, 1)
        self.branch2 = conv(ch3x3, 3)
        self.branch3 = conv(ch5x5, 5)
        self.branch4 = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + C_in, H, W]."""
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
        return torch.cat(branches, dim=1)


class InceptionAux(nn.Module):
    """Auxiliary classifier: average pool, 128 1x1 filters, 1024 hidden units, the classes.

    `pool="paper"` averages 5x5 windows of stride 3 by the ceil rule, and `map_size`, the side of
    the incoming map, sizes `fc1`; `pool="adaptive"` is torchvision's 4x4 grid for any map.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        norm: str | None = None,
        pool: str = "paper",
        map_size: int = 14,
        dropout: float = 0.7,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pool not in ("paper", "adaptive"):
            raise ValueError(f'pool must be "paper" or "adaptive", got {pool!r}')
        features = aux_features(map_size) if pool == "paper" else 2048
        self.conv = ConvBlock(
            in_channels, AUX_CHANNELS, kernel_size=1, norm=norm, device=device, dtype=dtype
        )
        self.fc1 = nn.Linear(features, 1024, device=device, dtype=dtype)
        self.fc2 = nn.Linear(1024, num_classes, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, num_classes]."""
        if self.pool == "paper":
            x = F.avg_pool2d(x, 5, stride=3, ceil_mode=True)
        else:
            x = F.adaptive_avg_pool2d(x, 4)
        x = torch.flatten(self.conv(x), 1)
        x = F.relu(self.fc1(x), inplace=True)
        return self.fc2(self.dropout(x))


class LocalResponseNorm(nn.Module):
    """Local response normalisation across channels, as `local_response_norm` defines it."""

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return local_response_norm(x, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        """The four constants, for `print`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class GlobalAvgPool2d(nn.Module):
    """Mean over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]."""
        return global_avg_pool2d(x)

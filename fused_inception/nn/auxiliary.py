"""The auxiliary classifier, which only training uses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import AUX_CHANNELS, aux_features
from fused_inception.nn.adoption import adopt
from fused_inception.nn.conv_block import (
    FUSED,
    INSIDE,
    ConvBlock,
    change_of,
    change_of_conv,
    global_hook,
    relu_behind,
)

ADAPTIVE_SIDE = 4
# with BatchNorm
IN_PART = "its convolution is fused, pool and linear layers are PyTorch's"


class InceptionAux(nn.Module):
    """Average pool, 128 1x1 filters, 1024 hidden units with dropout, the classes.

    With a bias, pool and convolution run as `functional.avg_pool2d_conv1x1_relu` or its adaptive
    sibling; where a hook or another type in `conv` forbids that, and with BatchNorm so far, one by
    one, of which the convolution with BatchNorm is fused. The linear layers are PyTorch's.

    Children: `conv`, `fc1`, `fc2`, `dropout`; torchvision's names.

    Args:
        in_channels: channels of the map that it looks at.
        num_classes: outputs.
        norm: of `conv`, None for a bias or "batch".
        pool: "paper" averages 5x5 windows of stride 3 by Caffe's ceil rule; "adaptive" is
            torchvision's 4x4 grid of any map.
        map_size: side of the incoming map, which sizes `fc1` with `pool="paper"`.
        dropout: between the two linear layers.
        device, dtype: of the parameters.

    Raises:
        ValueError: unknown `norm` or `pool`; `map_size` below 3 with `pool="paper"`.
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
        features = aux_features(map_size) if pool == "paper" else AUX_CHANNELS * ADAPTIVE_SIDE**2
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pool = pool
        self.conv = ConvBlock(in_channels, AUX_CHANNELS, kernel_size=1, norm=norm, **factory)
        if norm is None:
            self.conv.path = INSIDE
        self.fc1 = nn.Linear(features, 1024, **factory)
        self.fc2 = nn.Linear(1024, num_classes, **factory)
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def adopt(cls, block: nn.Module, norm: str | None, pool: str) -> list[nn.Module]:
        """Make `block`, whose children have our names and types, one of ours in place.

        Returns:
            The modules that changed, for `adoption.release`.
        """
        conv: Any = block.conv
        changed = ConvBlock.adopt(conv, norm, INSIDE if norm is None else FUSED)
        adopt(block, cls, pool=pool)
        return [*changed, block]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, num_classes]."""
        features = self._features(x)
        fc1: Any = self.fc1
        taken = getattr(fc1, "in_features", features.shape[1])
        if taken and features.shape[1] != taken:  # a lazy layer takes 0 until then
            raise ValueError(
                f"a map of {x.shape[2]}x{x.shape[3]} gives {features.shape[1]} features, and fc1 "
                f"takes {taken}: it was made for maps of another size (map_size; image_size of the "
                "network)"
            )
        return self.fc2(self.dropout(relu_behind(fc1, fc1(features))))

    def _features(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, features]: pool and convolution, flattened."""
        # with BatchNorm the convolution block asks for itself what has changed in it
        block: Any = self._modules["conv"]
        if getattr(block, "norm", None) is not None or self._obstacle() is not None:
            if self.pool == "paper":
                x = F.avg_pool2d(x, 5, stride=3, ceil_mode=True)
            else:
                x = F.adaptive_avg_pool2d(x, ADAPTIVE_SIDE)
            return torch.flatten(block(x), 1)
        conv: Any = block.conv
        if self.pool == "paper":
            return functional.avg_pool2d_conv1x1_relu(x, conv.weight, conv.bias, 5, 3, True)
        return functional.adaptive_avg_pool2d_conv1x1_relu(x, conv.weight, conv.bias, ADAPTIVE_SIDE)

    @property
    def is_fused(self) -> bool:
        """Whether pool and convolution are one operator."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the children compute; None where the fused operator does."""
        block: Any = self.conv
        hook = global_hook()
        if hook is not None:
            return f"plain PyTorch: {hook}"
        change = change_of(block, ConvBlock)
        if change is not None:
            return f"plain PyTorch: conv {change}"
        if block.norm is not None:
            inside = block._obstacle()
            return IN_PART if inside is None else inside.replace(": ", ": conv.", 1)
        change = change_of_conv(block.conv, None, sides=(1,))
        return None if change is None else f"plain PyTorch: conv.conv {change}"

    def extra_repr(self) -> str:
        """Pool and path, for `print`."""
        path = self._obstacle() or f"with its convolution {FUSED}"
        return f"{self.pool} pool, {path}"

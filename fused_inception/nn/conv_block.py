"""Convolution, BatchNorm or bias, ReLU: the unit that GoogLeNet is made of."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fused_inception import functional
from fused_inception.geometry import why_no_conv_kernel
from fused_inception.nn.adoption import adopt
from fused_inception.nn.batch_norm import (
    arguments_of,
    keep_finite,
    mixture_of,
    running_of,
)
from fused_inception.nn.tensors import tensor_of

FUSED = "one fused operator"
INSIDE = "parameters of the fused module"


def change_of(module: nn.Module, expected: type[nn.Module]) -> str | None:
    """What a fused operator would pass over in an inner layer: its type, a hook."""
    if type(module) is not expected:
        cls = type(module)
        if cls.__name__ != expected.__name__:
            return f"is a {cls.__name__}"
        # as quantised layers have PyTorch's names
        return f"is a {cls.__module__}.{cls.__qualname__}"
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    ):
        return "has a hook"
    if "forward" in own:  # as some libraries wrap modules
        return "has a forward of its own"
    return None


def aten_path(reason: str | None) -> str | None:
    """For `print`: the path of an operator without a kernel, if there is a `reason`."""
    return reason and f"PyTorch's operators: {reason}"


def global_hook() -> str | None:
    """Why no fused operator may stand for layers: hooks that are registered for all modules, as
    counters of FLOPs do, would see none of them."""
    return "hooks of all modules are registered" if _has_any_global_hook() else None


def relu_behind(layer: Any, x: Tensor) -> Tensor:
    """relu of what `layer` gave: in place, but where backward hooks have made a view of it that
    autograd lets nobody write to."""
    hooked = layer._backward_hooks or layer._backward_pre_hooks or _has_any_global_hook()
    return F.relu(x, inplace=not hooked)


def change_of_conv(conv: Any, norm: str | None, sides: tuple[int, ...] = ()) -> str | None:
    """The same of a convolution, and options that no fused operator has.

    `sides`: which filters it may have, with stride 1 and the padding that keeps the size; none
    stands for any square filter, stride and padding.
    """
    change = change_of(conv, nn.Conv2d)
    if change is not None:
        return change
    if (tensor_of(conv, "bias") is None) != (norm is not None):
        return "has no bias" if norm is None else "has a bias besides BatchNorm"
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if conv.groups != 1:
        return f"has {conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"has dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"has padding_mode {conv.padding_mode!r}"
    if sides:
        fits = kernel[0] in sides and stride == (1, 1) and padding[0] == kernel[0] // 2
    else:
        fits = stride[0] == stride[1]
    if fits and kernel[0] == kernel[1] and padding[0] == padding[1] and type(padding) is tuple:
        return None
    return f"has kernel_size {kernel}, stride {stride}, padding {padding!r}"


class ConvBlock(nn.Module):
    """relu(conv(x) + bias), or relu(batch_norm(conv(x))) with `norm="batch"`.

    Children: `conv`, and `bn` with BatchNorm; torchvision's names. With a bias it runs as
    `functional.conv2d_relu`, with BatchNorm as `functional.conv2d_bn_relu`; inside a fused
    `Inception` it only holds the parameters. Where a child has got a hook, another type or an
    option that no fused operator has, the children compute.

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
    # channels of which a batch's statistics are not finite keep their running ones
    skip_nonfinite = False

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

    @classmethod
    def adopt(cls, block: nn.Module, norm: str | None, path: str = FUSED) -> list[nn.Module]:
        """Make `block`, whose children are `conv` and, with BatchNorm, `bn`, one of ours in place.

        `path` is what `print` says of it while it is fused.

        Returns:
            The modules that changed, for `adoption.release`: none if it was one of ours.
        """
        if type(block) is cls:
            return []
        adopt(block, cls, norm=norm, path=path)
        return [block]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        # not self.conv: attributes that are modules or parameters take ten times as long to find
        conv: Any = self._modules["conv"]
        if self._obstacle() is None:
            weight: Any = tensor_of(conv, "weight")
            stride, padding = conv.stride[0], conv.padding[0]
            if self.norm is None:
                bias: Any = tensor_of(conv, "bias")
                return functional.conv2d_relu(x, weight, bias, stride, padding)
            vectors, options = arguments_of([self._modules["bn"]])
            options["batches_tracked"] = options["batches_tracked"][0]
            return functional.conv2d_bn_relu(
                x, weight, *[of[0] for of in vectors], stride=stride, padding=padding,
                skip_nonfinite=self.skip_nonfinite, **options,
            )  # fmt: skip
        x = conv(x)
        if self.norm == "batch":
            before = running_of(self.bn) if self.skip_nonfinite else []
            x = self.bn(x)
            keep_finite(before)
        return relu_behind(conv if self.norm is None else self.bn, x)

    @property
    def is_fused(self) -> bool:
        """Whether forward is the fused operator."""
        return self._obstacle() is None

    def _obstacle(self) -> str | None:
        """Why the children compute; None where the fused operator does."""
        hook = global_hook()
        if hook is not None:
            return f"plain PyTorch: {hook}"
        change = change_of_conv(self._modules["conv"], self.norm)
        if change is not None:
            return f"plain PyTorch: conv {change}"
        if self.norm is None:
            return None
        bn: Any = self._modules["bn"]
        change = change_of(bn, nn.BatchNorm2d)
        if change is not None:
            return f"plain PyTorch: bn {change}"
        mixture = mixture_of([bn])
        return None if mixture is None else f"plain PyTorch: {mixture}"

    def extra_repr(self) -> str:
        """Mode and path, for `print`."""
        mode = "bias" if self.norm is None else "batch norm"
        return f"{mode}, relu, {self._obstacle() or aten_path(self._no_kernel()) or self.path}"

    def _no_kernel(self) -> str | None:
        """Why the operator runs through ATen everywhere; None where there is a kernel."""
        conv: Any = self.conv
        return why_no_conv_kernel(
            conv.in_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0]
        )

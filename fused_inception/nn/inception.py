"""The Inception module with dimension reduction."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_inception import functional
from fused_inception.geometry import InceptionDims
from fused_inception.nn.adoption import adopt
from fused_inception.nn.batch_norm import (
    arguments_of,
    keep_finite,
    mixture_of,
    running_of,
)
from fused_inception.nn.conv_block import (
    FUSED,
    INSIDE,
    ConvBlock,
    change_of,
    change_of_conv,
    global_hook,
)
from fused_inception.nn.pooling import change_of_pool
from fused_inception.nn.tensors import tensor_of

# depth first: name, type, filters that it may have
Layers = tuple[tuple[str, type[nn.Module], tuple[int, ...]], ...]


class Inception(nn.Module):
    """Four branches of one input, concatenated (figure 2b of arXiv 1409.4842).

    cat(1x1(x), 3x3(3x3 reduce(x)), 5x5(5x5 reduce(x)), projection(3x3 max pool(x))), each
    convolution with ReLU. The module is one fused operator, `functional.inception` or, with
    `norm="batch"`, `functional.inception_bn`. The children hold the parameters under torchvision's
    names: `branch1`, `branch2.0`, `branch2.1`, `branch3.0`, `branch3.1`, `branch4.1`. Where one of
    them has got a hook or another type, or an option that the operator does not have, the children
    compute, so that nothing is passed over; `print` tells.

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

    # channels of which a batch's statistics are not finite keep their running ones
    skip_nonfinite = False

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
        for block in _blocks_of(self):
            block.path = INSIDE

    @classmethod
    def adopt(cls, block: nn.Module, norm: str | None) -> list[nn.Module]:
        """Make `block`, whose children have our names and types, one of ours in place.

        Its convolution blocks become `ConvBlock`s; layers, parameters, hooks and mode stay.

        Returns:
            The modules that changed, for `adoption.release`.
        """
        blocks = _blocks_of(block)
        one, reduce3, three, reduce5, five, projection = (b.conv for b in blocks)
        dims = InceptionDims(
            in_channels=one.in_channels,
            ch1x1=one.out_channels,
            ch3x3red=reduce3.out_channels,
            ch3x3=three.out_channels,
            ch5x5red=reduce5.out_channels,
            ch5x5=five.out_channels,
            pool_proj=projection.out_channels,
            kernel_5x5=five.kernel_size[0],
        )
        changed = [module for b in blocks for module in ConvBlock.adopt(b, norm, INSIDE)]
        adopt(block, cls, dims=dims, norm=norm)
        return [*changed, block]

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]."""
        if self._obstacle() is not None:
            before = running_of(self) if self.skip_nonfinite else []
            branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]
            keep_finite(before)
            return torch.cat(branches, dim=1)
        if self.norm is None:
            return functional.inception(x, *parameters_of(self))
        blocks = _blocks_of(self)
        filters: Any = [tensor_of(block._modules["conv"], "weight") for block in blocks]
        vectors, options = arguments_of([block._modules["bn"] for block in blocks])
        return functional.inception_bn(
            x, filters, *vectors,
            skip_nonfinite=self.skip_nonfinite, **options,
        )  # fmt: skip

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
        change = global_hook() or change_inside(self, self.norm, (ConvBlock,))
        if change is not None:
            return f"plain PyTorch: {change}"
        if self.norm is None:
            return None
        mixture = mixture_of([block._modules["bn"] for block in _blocks_of(self)])
        return None if mixture is None else f"plain PyTorch: {mixture}"


def change_inside(
    block: nn.Module, norm: str | None, containers: tuple[type[nn.Module], ...]
) -> str | None:
    """What the fused operator would pass over inside `block`; None where it is an Inception module.

    `containers` are the types that a convolution and its BatchNorm may be in.
    """
    return change_of_layers(block, _INSIDE[norm], norm, containers)


def change_of_layers(
    block: nn.Module, expected: Layers, norm: str | None, containers: tuple[type[nn.Module], ...]
) -> str | None:
    """The same of a module whose layers are to be `expected`."""
    inside: list[nn.Module] = []
    _collect(block, inside)
    if len(inside) != len(expected):
        # a parametrisation is a layer, too
        for name, module in block.named_modules():
            if "parametrizations" in module._modules:
                return f"{name} is a {type(module).__name__}"
        return "layers were added or removed"
    for (name, cls, sides), module in zip(expected, inside, strict=True):
        if cls is nn.Conv2d:
            change = change_of_conv(module, norm, sides)
        elif cls is ConvBlock:
            change = change_of(module, type(module) if type(module) in containers else cls)
        else:
            change = change_of(module, cls)
            if change is None and cls is nn.MaxPool2d:
                change = _change_of_pool(module)
        if change is not None:
            return f"{name} {change}"
    return None


def _change_of_pool(pool: Any) -> str | None:
    """Options that make it another pool than 3x3, stride 1, same size."""
    for name, value in (("kernel_size", 3), ("stride", 1), ("padding", 1)):
        given = getattr(pool, name)
        if given != value and given != (value, value):
            return f"has {name} {given}"
    return change_of_pool(pool)


def parameters_of(module: Any) -> list[Tensor]:
    """Filters and biases in turn, in the order of `functional.inception`'s arguments."""
    convs = [block._modules["conv"] for block in _blocks_of(module)]
    found: Any = [tensor_of(conv, name) for conv in convs for name in ("weight", "bias")]
    return found


def _blocks_of(module: Any) -> list[Any]:
    """1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5 and projection: each has `conv`, and may have `bn`."""
    # not module.branch1: attributes that are modules or parameters take ten times as long to find
    children = module._modules
    reduce3, three = children["branch2"]._modules.values()
    reduce5, five = children["branch3"]._modules.values()
    _, projection = children["branch4"]._modules.values()
    return [children["branch1"], reduce3, three, reduce5, five, projection]


def _collect(module: nn.Module, inside: list[nn.Module]) -> None:
    for child in module._modules.values():
        if child is not None:
            inside.append(child)
            _collect(child, inside)


def _layers(norm: str | None) -> Layers:
    """All that the fused operator stands for."""

    def conv(name: str, *sides: int) -> list[tuple[str, type[nn.Module], tuple[int, ...]]]:
        layers: list[tuple[str, type[nn.Module], tuple[int, ...]]] = [
            (name, ConvBlock, ()),
            (f"{name}.conv", nn.Conv2d, sides),
        ]
        return layers if norm is None else [*layers, (f"{name}.bn", nn.BatchNorm2d, ())]

    return (
        *conv("branch1", 1),
        ("branch2", nn.Sequential, ()),
        *conv("branch2.0", 1),
        *conv("branch2.1", 3),
        ("branch3", nn.Sequential, ()),
        *conv("branch3.0", 1),
        *conv("branch3.1", 3, 5),
        ("branch4", nn.Sequential, ()),
        ("branch4.0", nn.MaxPool2d, ()),
        *conv("branch4.1", 1),
    )


_INSIDE = {norm: _layers(norm) for norm in (None, "batch")}

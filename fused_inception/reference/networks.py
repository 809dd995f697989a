"""GoogLeNet in plain PyTorch: the paper's network and torchvision's two forms of it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_inception.geometry import check_googlenet, googlenet_dims, googlenet_sizes
from fused_inception.reference.modules import (
    ConvBlock,
    GlobalAvgPool2d,
    Inception,
    InceptionAux,
    LocalResponseNorm,
)


class GoogLeNetOutputs(NamedTuple):
    """What a network with auxiliary classifiers returns in training; each is [N, num_classes], and
    None where one of the classifiers was taken out."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class GoogLeNet(nn.Module):
    """GoogLeNet; `googlenet` documents the arguments."""

    def __init__(
        self,
        variant: str = "paper",
        *,
        num_classes: int = 1000,
        aux_logits: bool = True,
        dropout: float | None = None,
        dropout_aux: float | None = None,
        transform_input: bool = False,
        init_weights: bool = True,
        image_size: int = 224,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_googlenet(variant, image_size, aux_logits)
        paper = variant == "paper"
        if dropout is None:
            dropout = 0.4 if paper else 0.2
        if dropout_aux is None:
            dropout_aux = 0.7
        self.variant = variant
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = None if paper else "batch"
        dims = googlenet_dims(kernel_5x5=3 if variant == "torchvision" else 5)

        def module(name: str) -> Inception:
            kernel_5x5 = dims[name].kernel_5x5
            return Inception(*dims[name].widths, norm=norm, kernel_5x5=kernel_5x5, **factory)

        def conv(c_in: int, c_out: int, **options: Any) -> ConvBlock:
            return ConvBlock(c_in, c_out, norm=norm, **options, **factory)

        def lrn() -> LocalResponseNorm | None:
            return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if paper else None

        # shapes of 224 x 224 images
        self.conv1 = conv(3, 64, kernel_size=7, stride=2, padding=3)  # [N, 64, 112, 112]
        self.maxpool1 = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # [N, 64, 56, 56]
        self.norm1 = lrn()
        self.conv2 = conv(64, 64, kernel_size=1)  # [N, 64, 56, 56]
        self.conv3 = conv(64, 192, kernel_size=3, padding=1)  # [N, 192, 56, 56]
        self.norm2 = lrn()
        self.maxpool2 = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # [N, 192, 28, 28]
        self.inception3a = module("3a")  # [N, 256, 28, 28]
        self.inception3b = module("3b")  # [N, 480, 28, 28]
        self.maxpool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)  # [N, 480, 14, 14]
        self.inception4a = module("4a")  # [N, 512, 14, 14]
        self.inception4b = module("4b")  # [N, 512, 14, 14]
        self.inception4c = module("4c")  # [N, 512, 14, 14]
        self.inception4d = module("4d")  # [N, 528, 14, 14]
        self.inception4e = module("4e")  # [N, 832, 14, 14]
        self.maxpool4 = nn.MaxPool2d(3 if paper else 2, stride=2, ceil_mode=True)  # [N, 832, 7, 7]
        self.inception5a = module("5a")  # [N, 832, 7, 7]
        self.inception5b = module("5b")  # [N, 1024, 7, 7]

        self.aux1: InceptionAux | None = None
        self.aux2: InceptionAux | None = None
        if aux_logits:
            head: dict[str, Any] = {"norm": norm, "dropout": dropout_aux, **factory}
            if paper:
                head |= {"pool": "paper", "map_size": googlenet_sizes(image_size).maxpool3}
            else:
                head |= {"pool": "adaptive"}
            self.aux1 = InceptionAux(dims["4a"].out_channels, num_classes, **head)
            self.aux2 = InceptionAux(dims["4d"].out_channels, num_classes, **head)

        self.avgpool = GlobalAvgPool2d()  # [N, 1024, 1, 1]
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(1024, num_classes, **factory)  # [N, num_classes]
        if init_weights:
            (init_paper if paper else init_torchvision)(self)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        """[N, 3, H, W] -> [N, num_classes]; with heads and in training, `GoogLeNetOutputs`."""
        if self.transform_input:
            x = from_imagenet_to_half(x)
        x = self.maxpool1(self.conv1(x))
        if self.norm1 is not None:
            x = self.norm1(x)
        x = self.conv3(self.conv2(x))
        if self.norm2 is not None:
            x = self.norm2(x)
        x = self.maxpool2(x)
        x = self.inception3a(x)
        x = self.inception3b(x)
        x = self.maxpool3(x)
        x = self.inception4a(x)
        aux1 = self.aux1(x) if self.aux1 is not None and self.training else None
        x = self.inception4b(x)
        x = self.inception4c(x)
        x = self.inception4d(x)
        aux2 = self.aux2(x) if self.aux2 is not None and self.training else None
        x = self.inception4e(x)
        x = self.maxpool4(x)
        x = self.inception5a(x)
        x = self.inception5b(x)
        x = torch.flatten(self.avgpool(x), 1)
        logits = self.fc(self.dropout(x))
        if aux1 is None and aux2 is None:
            return logits
        return GoogLeNetOutputs(logits=logits, aux_logits2=aux2, aux_logits1=aux1)


def googlenet(
    variant: str = "paper",
    *,
    num_classes: int = 1000,
    aux_logits: bool = True,
    dropout: float | None = None,
    dropout_aux: float | None = None,
    transform_input: bool = False,
    init_weights: bool = True,
    image_size: int = 224,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GoogLeNet:
    """GoogLeNet in plain PyTorch.

    Args:
        variant: "paper" (5x5 filters, local response normalisation, biases), "torchvision"
            (BatchNorm, 3x3 filters in the "5x5" branch) or "torchvision5x5" (BatchNorm, 5x5).
        num_classes: outputs of each classifier.
        aux_logits: build the two auxiliary classifiers, which run in training only.
        dropout: before the classifier; None is 0.4 in the paper's network, 0.2 in torchvision's.
        dropout_aux: in the auxiliary classifiers; None is 0.7.
        transform_input: turn images normalised by ImageNet's statistics into images normalised by
            mean 0.5 and deviation 0.5.
        init_weights: He-normal weights (classifiers: deviation 0.01) and zero biases in the paper's
            network, weights of deviation 0.01 in torchvision's; else PyTorch's defaults.
        image_size: side of the images, which sizes the auxiliary heads of the paper's network.
        device, dtype: of the parameters.

    Raises:
        ValueError: unknown variant; heads of the paper's network and `image_size` below 47.
    """
    return GoogLeNet(
        variant,
        num_classes=num_classes,
        aux_logits=aux_logits,
        dropout=dropout,
        dropout_aux=dropout_aux,
        transform_input=transform_input,
        init_weights=init_weights,
        image_size=image_size,
        device=device,
        dtype=dtype,
    )


def init_paper(network: nn.Module) -> None:
    """He-normal weights (classifiers: deviation 0.01) and zero biases, of a network with the names
    of `GoogLeNet`."""
    layers = dict(network.named_modules())
    for module in layers.values():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    # no ReLU follows a classifier; small weights start the loss at the logarithm of the classes
    for name in ("aux1.fc2", "aux2.fc2", "fc"):
        if name in layers:
            nn.init.normal_(network.get_parameter(f"{name}.weight"), std=0.01)


def init_torchvision(network: nn.Module) -> None:
    """Weights of deviation 0.01."""
    # BatchNorm starts at scale 1 and shift 0 by itself
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.01, a=-2, b=2)


def from_imagenet_to_half(x: Tensor) -> Tensor:
    """From ImageNet's mean and deviation per channel to mean 0.5 and deviation 0.5."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"x must be of shape [N, 3, H, W], got {list(x.shape)}")
    # numbers, not tensors: to copy these to a GPU waits for it
    each = zip(x.split(1, dim=1), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    return torch.cat([c * (std / 0.5) + (mean - 0.5) / 0.5 for c, mean, std in each], dim=1)

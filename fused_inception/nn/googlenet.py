"""GoogLeNet as a column: the paper's network and torchvision's two forms of it."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.geometry import (
    TooSmallError,
    check_googlenet,
    googlenet_dims,
    googlenet_sizes,
    smallest_image,
)
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception
from fused_inception.nn.pooling import LocalResponseNorm, MaxPool2d
from fused_inception.nn.stem import LAYERS, obstacle, stem
from fused_inception.nn.trunk import STAGES, stage
from fused_inception.nn.trunk import obstacle as obstacle_in_stage
from fused_inception.reference.networks import (
    GoogLeNetOutputs,
    from_imagenet_to_half,
    init_paper,
    init_torchvision,
)


class GoogLeNet(nn.Module):
    """GoogLeNet with fused Inception modules; `googlenet` documents the arguments.

    The keys of its state dict are those of `reference.googlenet` and, in the torchvision variants,
    of torchvision's own.
    """

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
        self.variant = variant
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = None if paper else "batch"
        dims = googlenet_dims(kernel_5x5=3 if variant == "torchvision" else 5)

        def conv(c_in: int, c_out: int, **options: Any) -> ConvBlock:
            return ConvBlock(c_in, c_out, norm=norm, **options, **factory)

        def pool(side: int = 3) -> MaxPool2d:
            return MaxPool2d(side, stride=2, ceil_mode=True)

        def lrn() -> LocalResponseNorm | None:
            return LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) if paper else None

        def inception(name: str) -> Inception:
            widths = dims[name].widths
            return Inception(*widths, norm=norm, kernel_5x5=dims[name].kernel_5x5, **factory)

        # shapes for 224 x 224 images
        self.conv1 = conv(3, 64, kernel_size=7, stride=2, padding=3)  # [N, 64, 112, 112]
        self.maxpool1 = pool()  # [N, 64, 56, 56]
        self.norm1 = lrn()
        self.conv2 = conv(64, 64, kernel_size=1)
        self.conv3 = conv(64, 192, kernel_size=3, padding=1)  # [N, 192, 56, 56]
        self.norm2 = lrn()
        self.maxpool2 = pool()  # [N, 192, 28, 28]
        self.inception3a = inception("3a")  # [N, 256, 28, 28]
        self.inception3b = inception("3b")  # [N, 480, 28, 28]
        self.maxpool3 = pool()  # [N, 480, 14, 14]
        self.inception4a = inception("4a")  # [N, 512, 14, 14]
        self.inception4b = inception("4b")  # [N, 512, 14, 14]
        self.inception4c = inception("4c")  # [N, 512, 14, 14]
        self.inception4d = inception("4d")  # [N, 528, 14, 14]
        self.inception4e = inception("4e")  # [N, 832, 14, 14]
        self.maxpool4 = pool(3 if paper else 2)  # [N, 832, 7, 7]
        self.inception5a = inception("5a")  # [N, 832, 7, 7]
        self.inception5b = inception("5b")  # [N, 1024, 7, 7]
        self.aux1: InceptionAux | None = None
        self.aux2: InceptionAux | None = None
        if aux_logits:
            head: dict[str, Any] = {"norm": norm, **factory}
            head["dropout"] = 0.7 if dropout_aux is None else dropout_aux
            if paper:
                head |= {"pool": "paper", "map_size": googlenet_sizes(image_size).maxpool3}
            else:
                head |= {"pool": "adaptive"}
            self.aux1 = InceptionAux(dims["4a"].out_channels, num_classes, **head)  # after 4a
            self.aux2 = InceptionAux(dims["4d"].out_channels, num_classes, **head)  # after 4d
        self.avgpool = GlobalAvgPool2d()  # [N, 1024, 1, 1]
        self.dropout = nn.Dropout((0.4 if paper else 0.2) if dropout is None else dropout)
        self.fc = nn.Linear(1024, num_classes, **factory)  # [N, num_classes]
        if init_weights:
            (init_paper if paper else init_torchvision)(self)

    def forward(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        """[N, 3, H, W] -> [N, num_classes]; with heads and in training, `GoogLeNetOutputs`."""
        if torch.compiler.is_compiling():
            return self._layers(x)
        # asked when a layer fails, not before: others may have been put in, for smaller images
        try:
            return self._layers(x)
        except TooSmallError as error:
            heads = self.training and self.aux1 is not None
            least = smallest_image(self.variant, heads)
            height, width = x.shape[2:]
            if min(height, width) >= least:
                raise
            larger = least > smallest_image(self.variant, heads=False)
            raise TooSmallError(
                f'images of {height}x{width} are too small: the "{self.variant}" network takes '
                f"{least}x{least} or more{', in training with auxiliary classifiers' * larger}"
            ) from error

    def _layers(self, x: Tensor) -> Tensor | GoogLeNetOutputs:
        if self.transform_input:
            x = from_imagenet_to_half(x)
        heads = {"inception4a": self.aux1, "inception4d": self.aux2}
        readers = {name: head for name, head in heads.items() if head is not None and self.training}
        stage3, stage4, stage5 = self._stages()
        x = stem(x, self._stem())
        x, _ = stage(x, stage3, {})
        x, read = stage(x, stage4, readers)
        aux = {name: head(y) for (name, head), y in zip(readers.items(), read, strict=True)}
        x, _ = stage(x, stage5, {})
        logits = self.fc(x)
        if not aux:
            return logits
        return GoogLeNetOutputs(logits, aux.get("inception4d"), aux.get("inception4a"))

    def _stem(self) -> list[nn.Module | None]:
        """conv1 to maxpool2."""
        return [getattr(self, name) for name in LAYERS]

    def _stages(self) -> list[dict[str, nn.Module]]:
        """inception3a to dropout."""
        return [{name: getattr(self, name) for name in names} for names in STAGES]

    def extra_repr(self) -> str:
        """Variant and what is fused in it, for `print`."""
        modules = [m for m in self.modules() if isinstance(m, Inception)]
        inside = {block for m in modules for block in m.modules()}
        convs = [m for m in self.modules() if isinstance(m, ConvBlock) and m not in inside]
        heads = [head for head in (self.aux1, self.aux2) if head is not None]
        names = ("maxpool1", "norm1", "norm2", "maxpool2", "maxpool3", "maxpool4", "avgpool")
        pools = [layer for layer in map(self._modules.get, names) if layer is not None]
        own = (MaxPool2d, LocalResponseNorm, GlobalAvgPool2d)
        parts = {"stem": obstacle(self._stem())}
        for layers, readers in zip(self._stages(), ([], heads, []), strict=True):
            parts[f"stage {next(iter(layers))[-2]}"] = obstacle_in_stage(layers, readers)
        paths = [
            f"{part}: one operator on the Triton path"
            if reason is None
            else f"{part}: layer by layer, {reason}"
            for part, reason in parts.items()
        ]
        head = (
            f'"{self.variant}", fused: {sum(m.is_fused for m in modules)} of {len(modules)} '
            f"Inception modules, {sum(m.is_fused for m in convs)} of {len(convs)} other "
            f"convolutions,\n{sum(type(layer) in own for layer in pools)} of {len(pools)} pools "
            "and local response norms; all else is plain PyTorch"
        )
        return "\n".join([head, *paths])


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
    """GoogLeNet (arXiv 1409.4842) with fused Inception modules.

    Args:
        variant: "paper" (5x5 filters, local response normalisation, biases), "torchvision"
            (BatchNorm, 3x3 filters in the "5x5" branch) or "torchvision5x5" (BatchNorm, 5x5).
        num_classes: outputs of each classifier.
        aux_logits: build the two auxiliary classifiers, which run in training only.
        dropout: before the classifier; None is 0.4 in the paper's network, 0.2 in torchvision's.
        dropout_aux: in the auxiliary classifiers; None is 0.7.
        transform_input: turn images normalised by ImageNet's statistics into images normalised by
            mean 0.5 and deviation 0.5.
        init_weights: the paper's network: He-normal filters (classifiers: deviation 0.01) and zero
            biases; torchvision's: weights of deviation 0.01. False keeps PyTorch's defaults.
        image_size: side of the images, which sizes the auxiliary heads of the paper's network.
        device, dtype: of the parameters.

    Returns:
        A module from [N, 3, H, W] to [N, num_classes]; with heads and in training to
        `GoogLeNetOutputs(logits, aux_logits2, aux_logits1)`.

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

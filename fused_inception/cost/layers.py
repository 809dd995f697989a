"""The layers of a GoogLeNet from geometry: pixels, parameters, multiply-adds, the paper's table."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fused_inception.geometry import (
    AUX_CHANNELS,
    InceptionDims,
    check_googlenet,
    googlenet_dims,
    googlenet_sizes,
    pool_out,
    smallest_image,
)

AUX_HIDDEN = 1024  # hidden units of an auxiliary classifier
AUX_POOLED = 4  # side of the adaptive average pool of torchvision's auxiliary classifiers
# modules whose output an auxiliary classifier reads
AUX_OF = {"4a": "aux1", "4d": "aux2"}
# pools that follow a module
POOL_AFTER = {"3b": "maxpool3", "4e": "maxpool4"}


@dataclass(frozen=True)
class Conv:
    """A convolution (or, with a kernel and maps of one pixel, a linear layer)."""

    name: str
    layer: str
    c_in: int
    c_out: int
    kernel: int
    inputs: int  # pixels of one image
    outputs: int
    norm: bool  # BatchNorm in place of a bias

    @property
    def weights(self) -> int:
        """Elements of the filter."""
        return self.c_in * self.c_out * self.kernel**2

    @property
    def parameters(self) -> int:
        """Filter and bias, or filter, scale and shift."""
        return self.weights + self.c_out * (2 if self.norm else 1)

    @property
    def multiply_adds(self) -> int:
        """Of one image, taps on the padding included."""
        return self.weights * self.outputs

    @property
    def kind(self) -> str:
        """Of its GEMM."""
        return "pointwise" if self.kernel == 1 else "window"


@dataclass(frozen=True)
class Pool:
    """A max pool between the blocks, with the normalisation that goes with it."""

    layer: str
    channels: int
    inputs: int  # pixels of one image
    outputs: int
    lrn: str = ""  # "" none, "before" or "after" the pool

    @property
    def lrn_pixels(self) -> int:
        """Pixels of one image that the normalisation works on."""
        return self.inputs if self.lrn == "before" else self.outputs


@dataclass(frozen=True)
class Module:
    """An Inception module at one size of map."""

    name: str
    dims: InceptionDims
    pixels: int  # of one image
    norm: bool

    @cached_property
    def convs(self) -> tuple[Conv, ...]:
        """Its six convolutions: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, projection."""
        names = ("1x1", "3x3 reduce", "3x3", "5x5 reduce", "5x5", "projection")
        return tuple(
            Conv(
                f"{self.name} {name}", self.name, c_in, c_out, kernel, self.pixels, self.pixels,
                self.norm,
            )
            for name, (c_out, c_in, kernel, _) in zip(names, self.dims.filter_shapes, strict=True)
        )  # fmt: skip


@dataclass(frozen=True)
class Aux:
    """An auxiliary classifier: average pool, 1x1 convolution, two linear layers."""

    name: str
    inputs: int  # pixels of the map that it reads
    conv: Conv
    hidden: Conv
    classes: Conv
    adaptive: bool


class Row(NamedTuple):
    """A row of the paper's table 1 as printed; parameters in units of 1024."""

    name: str
    layers: tuple[str, ...]
    parameters: float
    multiply_adds: int  # in millions


# Szegedy et al., arXiv 1409.4842, table 1: columns "params" and "ops", weights only. Counted
# exactly, conv1 has 9,408 weights and 118 million multiply-adds, 4c 509,440 weights, 5a 1,042,432
# weights and 51 million multiply-adds; the other rows agree but for rounding.
PAPER_TABLE_1 = (
    Row("convolution 7x7/2", ("conv1",), 2.7, 34),
    Row("convolution 3x3/1", ("conv2", "conv3"), 112, 360),
    Row("inception (3a)", ("3a",), 159, 128),
    Row("inception (3b)", ("3b",), 380, 304),
    Row("inception (4a)", ("4a",), 364, 73),
    Row("inception (4b)", ("4b",), 437, 88),
    Row("inception (4c)", ("4c",), 463, 100),
    Row("inception (4d)", ("4d",), 580, 119),
    Row("inception (4e)", ("4e",), 840, 170),
    Row("inception (5a)", ("5a",), 1072, 54),
    Row("inception (5b)", ("5b",), 1388, 71),
    Row("linear", ("head",), 1000, 1),
)
# the same paper, introduction: "a computational budget of 1.5 billion multiply-adds at inference"
PAPER_BUDGET = 1_500_000_000


class Network:
    """A GoogLeNet as geometry: its layers for square images.

    Raises:
        ValueError: unknown variant; images too small for the network or for its auxiliary heads.
    """

    def __init__(
        self,
        variant: str = "paper",
        *,
        image_size: int = 224,
        aux_logits: bool = True,
        num_classes: int = 1000,
    ) -> None:
        check_googlenet(variant, image_size, aux_logits)
        if image_size < (least := smallest_image(variant, heads=False)):
            raise ValueError(
                f"image_size must be at least {least} for the {variant} network, got {image_size}"
            )
        paper = variant == "paper"
        self.variant = variant
        self.image_size = image_size
        self.norm = not paper
        sides = googlenet_sizes(image_size, pool4_kernel=3 if paper else 2)
        dims = googlenet_dims(3 if variant == "torchvision" else 5)
        first, second = sides.conv1**2, sides.maxpool1**2
        third, fourth, fifth = sides.maxpool2**2, sides.maxpool3**2, sides.maxpool4**2

        def stem(name: str, c_in: int, c_out: int, kernel: int, inputs: int, outputs: int) -> Conv:
            return Conv(name, name, c_in, c_out, kernel, inputs, outputs, self.norm)

        self.conv1 = stem("conv1", 3, 64, 7, image_size**2, first)
        self.conv2 = stem("conv2", 64, 64, 1, second, second)
        self.conv3 = stem("conv3", 64, 192, 3, second, second)
        self.pool1 = Pool(
            "maxpool1 norm1" if paper else "maxpool1", 64, first, second, "after" if paper else ""
        )
        self.pool2 = Pool(
            "norm2 maxpool2" if paper else "maxpool2", 192, second, third, "before" if paper else ""
        )
        self.modules = tuple(
            Module(name, module, sides.module(name) ** 2, self.norm)
            for name, module in dims.items()
        )
        self.pools = {
            "3b": Pool(POOL_AFTER["3b"], dims["3b"].out_channels, third, fourth),
            "4e": Pool(POOL_AFTER["4e"], dims["4e"].out_channels, fourth, fifth),
        }
        pooled = pool_out(sides.maxpool3, 5, 3, ceil_mode=True) if paper and aux_logits else 0
        grid = pooled if paper else AUX_POOLED
        self.aux = {
            module: self._aux(name, dims[module].out_channels, fourth, grid**2, num_classes)
            for module, name in AUX_OF.items()
            if aux_logits
        }
        self.last_pixels = fifth
        self.classifier = _linear("fc", "head", dims["5b"].out_channels, num_classes)

    def _aux(self, name: str, c_in: int, inputs: int, pooled: int, num_classes: int) -> Aux:
        conv = Conv(f"{name} conv", name, c_in, AUX_CHANNELS, 1, pooled, pooled, self.norm)
        return Aux(
            name,
            inputs,
            conv,
            _linear(f"{name} fc1", name, AUX_CHANNELS * pooled, AUX_HIDDEN),
            _linear(f"{name} fc2", name, AUX_HIDDEN, num_classes),
            self.norm,
        )

    @property
    def layers(self) -> dict[str, tuple[Conv, ...]]:
        """Every layer in forward order with what it multiplies; pools have nothing."""
        column: dict[str, tuple[Conv, ...]] = {
            "conv1": (self.conv1,),
            self.pool1.layer: (),
            "conv2": (self.conv2,),
            "conv3": (self.conv3,),
            self.pool2.layer: (),
        }
        for module in self.modules:
            column[module.name] = module.convs
            if module.name in self.pools:
                column[self.pools[module.name].layer] = ()
            if module.name in self.aux:
                aux = self.aux[module.name]
                column[aux.name] = (aux.conv, aux.hidden, aux.classes)
        column["head"] = (self.classifier,)
        return column

    def weights(self, *layers: str) -> int:
        """Elements of the filters and matrices of the layers; of all without arguments."""
        return sum(conv.weights for conv in self._convs(layers))

    def parameters(self, *layers: str) -> int:
        """Elements of all parameters of the layers; of all without arguments."""
        return sum(conv.parameters for conv in self._convs(layers))

    def multiply_adds(self, *layers: str) -> int:
        """Of one image's forward through the layers; of all without arguments, heads included."""
        return sum(conv.multiply_adds for conv in self._convs(layers))

    def inference_multiply_adds(self) -> int:
        """Of one image without the auxiliary classifiers, which inference does not run."""
        heads = {aux.name for aux in self.aux.values()}
        return self.multiply_adds(*(layer for layer in self.layers if layer not in heads))

    def _convs(self, layers: tuple[str, ...]) -> list[Conv]:
        column = self.layers
        return [conv for layer in layers or column for conv in column[layer]]


def _linear(name: str, layer: str, features: int, outputs: int) -> Conv:
    return Conv(name, layer, features, outputs, 1, 1, 1, norm=False)

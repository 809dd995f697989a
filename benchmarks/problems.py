"""What is timed: single operators, the nine modules, the stem, whole networks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fused_inception as fi
from fused_inception import reference
from fused_inception.geometry import googlenet_dims, googlenet_sizes
from fused_inception.tools.loop import objective

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,  # IEEE products
    "tf32": torch.float32,
}
IMAGE_SIZE = 224
CLASSES = 1000
GROUPS = ("kernels", "modules", "stem", "network")
# forward: inference. backward: the gradients of a forward that ran before the clock started.
# step: forward in training mode and backward, of a network with its loss; no optimiser
DIRECTIONS = ("forward", "backward", "step")


@dataclass(frozen=True)
class Case:
    """A module, made by our library or by the reference, and the shape of its input.

    `make` gets `fused_inception` or `fused_inception.reference`.
    """

    make: Callable[[ModuleType], nn.Module]
    input: tuple[int, int, int]  # C, H, W
    image: bool = False  # needs no gradient


class Function(nn.Module):
    """A function of x with parameters."""

    def __init__(self, function: Callable[..., Any], *shapes: Sequence[int], **options: Any):
        super().__init__()
        self.function = function
        self.options = options
        # a list would reach torch.compile as a constant of its length; names keep it plain
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.empty(*shape)))

    def forward(self, x: Tensor) -> Any:
        """The function's own result."""
        return self.function(x, *self._parameters.values(), **self.options)


class _Parallel(Function):
    """`parallel_conv1x1_relu`, whose filters are a list."""

    def forward(self, x: Tensor) -> Any:
        p = [*self._parameters.values()]
        half = len(p) // 2
        return self.function(x, p[:half], p[half:])


def _function(name: str, *shapes: Sequence[int], **options: Any) -> Callable[..., nn.Module]:
    kind = _Parallel if name == "parallel_conv1x1_relu" else Function

    def make(library: ModuleType) -> nn.Module:
        functions = library.functional if library is fi else library
        return kind(getattr(functions, name), *shapes, **options)

    return make


def _conv(c_in: int, c_out: int, kernel: int) -> Callable[..., nn.Module]:
    shapes = (c_out, c_in, kernel, kernel), (c_out,)
    return _function("conv2d_relu", *shapes, padding=kernel // 2)


def _module(name: str, *, norm: str | None) -> Case:
    # torchvision's network has 3x3 filters in the branch of the 5x5
    dims = googlenet_dims(3 if norm else 5)[name]
    side = googlenet_sizes(IMAGE_SIZE).module(name)

    def make(library: ModuleType) -> nn.Module:
        return library.Inception(*dims.widths, kernel_5x5=dims.kernel_5x5, norm=norm)

    return Case(make, (dims.in_channels, side, side))


def _network(variant: str) -> Case:
    def make(library: ModuleType) -> nn.Module:
        # dropout of different programs draws different numbers, which no gate could compare
        return library.googlenet(
            variant, init_weights=False, image_size=IMAGE_SIZE, dropout=0.0, dropout_aux=0.0
        )

    return Case(make, (3, IMAGE_SIZE, IMAGE_SIZE), image=True)


_POOL = dict(kernel_size=3, stride=2, ceil_mode=True)
_STEM = ((64, 3, 7, 7), (64,), (64, 64, 1, 1), (64,), (192, 64, 3, 3), (192,))

# sizes of GoogLeNet at 224 x 224
CASES: dict[str, dict[str, Case]] = {
    "kernels": {
        "max_pool2d": Case(_function("max_pool2d", **_POOL), (480, 28, 28)),
        "local_response_norm": Case(_function("local_response_norm", size=5), (192, 56, 56)),
        "max_pool2d_lrn": Case(_function("max_pool2d_lrn", size=5, **_POOL), (64, 112, 112)),
        "lrn_max_pool2d": Case(_function("lrn_max_pool2d", size=5, **_POOL), (192, 56, 56)),
        "conv2d_relu_1x1": Case(_conv(64, 64, 1), (64, 56, 56)),
        "conv2d_relu_3x3": Case(_conv(128, 192, 3), (128, 28, 28)),
        "conv2d_relu_3x3_stem": Case(_conv(64, 192, 3), (64, 56, 56)),
        "conv2d_relu_5x5": Case(_conv(32, 96, 5), (32, 28, 28)),
        "conv2d_relu_7x7_images": Case(
            _function("conv2d_relu", (64, 3, 7, 7), (64,), stride=2, padding=3),
            (3, IMAGE_SIZE, IMAGE_SIZE), image=True,
        ),
        "parallel_conv1x1_relu": Case(
            _function(
                "parallel_conv1x1_relu",
                (128, 256, 1, 1), (128, 256, 1, 1), (32, 256, 1, 1), (128,), (128,), (32,),
            ),
            (256, 28, 28),
        ),
        "global_avg_pool2d": Case(_function("global_avg_pool2d"), (1024, 7, 7)),
        "avg_pool2d_conv1x1_relu": Case(
            _function("avg_pool2d_conv1x1_relu", (128, 512, 1, 1), (128,)), (512, 14, 14)
        ),
        "conv2d_bn_relu_7x7_images": Case(
            lambda library: library.ConvBlock(
                3, 64, kernel_size=7, stride=2, padding=3, norm="batch"
            ),
            (3, IMAGE_SIZE, IMAGE_SIZE), image=True,
        ),
        "conv2d_bn_relu_3x3": Case(
            lambda library: library.ConvBlock(128, 192, kernel_size=3, padding=1, norm="batch"),
            (128, 28, 28),
        ),
        "inception_naive": Case(lambda library: library.InceptionNaive(192, 64, 128, 32),
                                (192, 28, 28)),
    },
    "modules": {
        **{name: _module(name, norm=None) for name in googlenet_dims()},
        **{f"{name}-bn": _module(name, norm="batch") for name in googlenet_dims()},
    },
    "stem": {
        "stem": Case(_function("googlenet_stem", *_STEM), (3, IMAGE_SIZE, IMAGE_SIZE), image=True)
    },
    "network": {variant: _network(variant) for variant in ("paper", "torchvision")},
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """A case at a batch size, in a dtype, on a device.

    In 16 bits filters, biases and activations are 16-bit, and BatchNorm layers stay fp32.
    """

    group: str
    case: str
    batch: int
    dtype: str
    device: torch.device

    @property
    def whole(self) -> bool:
        """A network: its step has a loss, its tolerance is that of networks."""
        return self.group == "network"

    @property
    def _case(self) -> Case:
        return CASES[self.group][self.case]

    @property
    def directions(self) -> tuple[str, ...]:
        """A backward alone is of no use to anybody who trains a network, of which the step matters
        most, and comes first."""
        return ("step", "forward") if self.whole else DIRECTIONS

    def module(self, library: ModuleType) -> nn.Module:
        """On the device and in the dtype, with random parameters that are the same for both
        libraries."""
        module = self._case.make(library).to(self.device, DTYPES[self.dtype])
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in sorted(module.named_parameters()):
                gain = ".bn." in f".{name}" and name.endswith("weight")
                std = (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1
                p.copy_(torch.randn(p.shape, generator=draw) * std + (1.0 if gain else 0.0))
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.float()
        return module

    def x(self) -> Tensor:
        """Random, the same at every call: images, or a map as behind a ReLU; channels last."""
        x = self._normal(1, (self.batch, *self._case.input))
        x = x if self._case.image else x.relu()
        x = x.to(DTYPES[self.dtype]).contiguous(memory_format=torch.channels_last)
        return x if self._case.image else x.requires_grad_()

    def labels(self) -> Tensor:
        """Classes of the images of a network."""
        return torch.arange(self.batch, device=self.device) % CLASSES

    def gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random gradients of the outputs, in their dtype, channels last."""
        return [self._normal(2 + i, tuple(y.shape)).to(y.dtype) for i, y in enumerate(outputs)]

    def _normal(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        draw = torch.Generator(self.device).manual_seed(seed)
        values = torch.randn(shape, generator=draw, device=self.device)
        last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return values.contiguous(memory_format=last)

    def flops(self, direction: str) -> int:
        """Of convolutions and linear layers, 2 for a multiply-add, taps on the padding included."""
        return _counts(self).flops[direction]

    def bytes(self, direction: str) -> int:
        """Of the inputs and outputs of the whole, each once: the least that memory has to move."""
        return _counts(self).bytes[direction]


def loss_of(outputs: Any, labels: Tensor) -> Tensor:
    """The paper's loss, in fp32 at least."""
    if isinstance(outputs, Tensor):
        return objective(_wide(outputs), labels)[0]
    return objective(type(outputs)(*map(_wide, outputs)), labels)[0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a result, which is one or a tuple of some."""
    return [outputs] if isinstance(outputs, Tensor) else [*outputs]


@dataclass(frozen=True)
class _Counts:
    flops: dict[str, int]
    bytes: dict[str, int]


@cache
def _counts(problem: Problem) -> _Counts:
    """By running the reference on tensors without data."""
    case = problem._case
    meta = torch.device("meta")
    module = case.make(reference).to(meta)
    x = torch.empty(problem.batch, *case.input, device=meta, requires_grad=not case.image)
    with FlopCounterMode(display=False) as forward:
        outputs = tensors(module(x))
    leaves = [*([] if case.image else [x]), *module.parameters()]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])
    flops = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    flops["step"] = flops["forward"] + flops["backward"]
    size = DTYPES[problem.dtype].itemsize
    ins, outs = x.numel(), sum(y.numel() for y in outputs)
    filters = sum(p.numel() for p in module.parameters() if p.ndim > 1)
    parameters = sum(p.numel() for p in module.parameters())
    dx = 0 if case.image else ins
    elements = {
        "forward": ins + parameters + outs,
        # dy, and what filters and their gradients need: x and the filters; dx, all gradients
        "backward": outs + (ins + filters if filters else 0) + dx + parameters,
        "step": ins + parameters + outs + outs + dx + parameters,
    }
    return _Counts(flops, {name: size * count for name, count in elements.items()})

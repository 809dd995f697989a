"""The cost model's view of a block: from its layers, its input and its output."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fused_inception import cost
from fused_inception.cost import BACKWARD, FORWARD, Aux, Conv, Cost, Module, Op, Pool
from fused_inception.cost import Tensor as Memory
from fused_inception.geometry import IMAGE_CHANNELS
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception
from fused_inception.nn.pooling import LocalResponseNorm, LRNMaxPool2d, MaxPool2d, MaxPoolLRN2d

Layer = Conv | Pool | Module | Aux


def cost_of(block: nn.Module, x: Tensor, y: Tensor, *, plan: str, training: bool) -> Cost | None:
    """What a block of ours costs from `x` to `y` and, in training, back; None where that is not
    known.

    `plan` is one of `cost.PLANS`. Activations and parameters count in the dtype of `y`.
    """
    dtype = str(y.dtype).removeprefix("torch.")
    if dtype not in cost.ITEMSIZE or not x.shape[0]:
        return None
    layer_of = _LAYERS.get(type(block))
    if layer_of is not None:
        layer = layer_of(block, x, y)
        image = isinstance(layer, Conv) and layer.c_in <= IMAGE_CHANNELS
        return cost.block(
            layer, batch=x.shape[0], dtype=dtype, plan=plan, training=training, image=image
        )
    if plan == "fused" and isinstance(block, GlobalAvgPool2d | LocalResponseNorm):
        return _stream(x, y, training=training, keeps_x=isinstance(block, LocalResponseNorm))
    return None


def _stream(x: Tensor, y: Tensor, *, training: bool, keeps_x: bool) -> Cost:
    """One launch each way that reads and writes its maps once."""
    read, written = (Memory(name, t.numel() * y.itemsize) for name, t in (("x", x), ("y", y)))
    ops = [Op("forward", "block", FORWARD, "triton", (read,), (written,))]
    if training:
        reads = (written, read) if keeps_x else (written,)
        ops.append(Op("backward", "block", BACKWARD, "triton", reads, (read,)))
    return Cost(tuple(ops), ())


def _pixels(t: Tensor) -> int:
    return t.shape[2] * t.shape[3]


def _conv_of(block: Any, x: Tensor, y: Tensor) -> Conv:
    c_out, c_in, kernel, _ = block.conv.weight.shape
    norm = block.norm is not None
    return Conv("conv", "conv", c_in, c_out, kernel, _pixels(x), _pixels(y), norm)


def _module_of(block: Any, x: Tensor, y: Tensor) -> Module:
    return Module("module", block.dims, _pixels(x), block.norm is not None)


def _pool_of(lrn: str) -> Callable[[Any, Tensor, Tensor], Pool]:
    return lambda block, x, y: Pool("maxpool", x.shape[1], _pixels(x), _pixels(y), lrn)


def _aux_of(block: Any, x: Tensor, y: Tensor) -> Aux:
    filters, norm = block.conv.conv.weight.shape[0], block.conv.norm is not None
    pooled = block.fc1.in_features // filters
    conv = Conv("conv", "aux", x.shape[1], filters, 1, pooled, pooled, norm)
    hidden, classes = (
        Conv("linear", "aux", layer.in_features, layer.out_features, 1, 1, 1, norm=False)
        for layer in (block.fc1, block.fc2)
    )
    return Aux("aux", _pixels(x), conv, hidden, classes, block.pool == "adaptive")


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], Layer]] = {
    ConvBlock: _conv_of,
    Inception: _module_of,
    InceptionAux: _aux_of,
    LRNMaxPool2d: _pool_of("before"),
    MaxPool2d: _pool_of(""),
    MaxPoolLRN2d: _pool_of("after"),
}

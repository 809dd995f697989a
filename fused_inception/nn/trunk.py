"""The Inception modules, the pools between them and the global pool as one operator, where nothing
looks in between."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fused_inception import functional
from fused_inception.nn.conv_block import change_of
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception, parameters_of
from fused_inception.nn.pooling import MaxPool2d, square_window, why_not_square

# the layers in their order, by their names in the network
LAYERS: dict[str, type[nn.Module]] = {
    "inception3a": Inception,
    "inception3b": Inception,
    "maxpool3": MaxPool2d,
    "inception4a": Inception,
    "inception4b": Inception,
    "inception4c": Inception,
    "inception4d": Inception,
    "inception4e": Inception,
    "maxpool4": MaxPool2d,
    "inception5a": Inception,
    "inception5b": Inception,
    "avgpool": GlobalAvgPool2d,
}
MODULES = [name for name, kind in LAYERS.items() if kind is Inception]


def trunk(
    x: Tensor, layers: Sequence[Any], tapped: Sequence[str]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`x` through `layers`, in the order of `LAYERS`, of which `obstacle` has nothing to say: the
    mean behind the last module, and the outputs of the modules named in `tapped`."""
    parameters, pools = [], {}
    for layer in layers:
        if isinstance(layer, Inception):
            parameters.append(parameters_of(layer))
        elif isinstance(layer, MaxPool2d):
            pools[len(parameters) - 1] = square_window(layer)
    taps = [MODULES.index(name) for name in tapped]
    return functional.inception_trunk(x, parameters, pools=pools, taps=taps)


def obstacle(layers: Sequence[Any]) -> str | None:
    """Why the layers compute one by one; None where one operator does."""
    for (name, expected), layer in zip(LAYERS.items(), layers, strict=True):
        change = change_of(layer, expected)
        if change is None and expected is Inception:
            if layer.norm is not None:
                change = "has batch norm"
            elif not layer.is_fused:
                change = "is plain PyTorch"
        if change is None and expected is MaxPool2d:
            change = why_not_square(layer)
        if change is not None:
            return f"{name} {change}"
    return None

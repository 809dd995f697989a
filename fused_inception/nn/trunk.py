"""The Inception modules of GoogLeNet, from pool to pool: each run of them as one operator, where
nothing looks in between."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fused_inception import functional
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import change_of, global_hook
from fused_inception.nn.head import GlobalAvgPool2d, change_of_mean, pool_then_dropout
from fused_inception.nn.inception import Inception, parameters_of
from fused_inception.nn.pooling import MaxPool2d, square_window, why_no_window

# the layers in their order, by their names in the network; an operator for each stage gives back
# what it keeps for backward as soon as its own has run
STAGES: tuple[dict[str, type[nn.Module]], ...] = (
    {"inception3a": Inception, "inception3b": Inception, "maxpool3": MaxPool2d},
    {
        "inception4a": Inception,
        "inception4b": Inception,
        "inception4c": Inception,
        "inception4d": Inception,
        "inception4e": Inception,
        "maxpool4": MaxPool2d,
    },
    {
        "inception5a": Inception,
        "inception5b": Inception,
        "avgpool": GlobalAvgPool2d,
        "dropout": nn.Dropout,
    },
)
_TYPES = {name: cls for layers in STAGES for name, cls in layers.items()}


def stage(
    x: Tensor, layers: Mapping[str, Any], readers: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    """`x` through `layers`, those of one of `STAGES`; flat behind the dropout.

    readers: by the name of a layer the auxiliary classifier that reads its output too. Those
    outputs come second.

    One operator, `functional.inception_trunk`, unless `obstacle` has a reason; else layer by layer.
    """
    if obstacle(layers, readers.values()) is not None:
        return _one_by_one(x, layers, readers)
    parameters: list[list[Tensor]] = []
    pools, taps, dropout = {}, [], layers.get("dropout")
    for name, layer in layers.items():
        if isinstance(layer, Inception):
            if name in readers:
                taps.append(len(parameters))
            parameters.append(parameters_of(layer))
        elif isinstance(layer, MaxPool2d):
            pools[len(parameters) - 1] = square_window(layer)
    x, tapped = functional.inception_trunk(
        x,
        parameters,
        pools=pools,
        taps=taps,
        global_pool=dropout is not None,
        dropout=dropout.p if dropout is not None and dropout.training else 0.0,
    )
    return x if dropout is None else x.flatten(1), list(tapped)


def _one_by_one(
    x: Tensor, layers: Mapping[str, Any], readers: Mapping[str, Any]
) -> tuple[Tensor, list[Tensor]]:
    tapped: list[Tensor] = []
    for name, layer in layers.items():
        if name == "avgpool":
            return pool_then_dropout(x, layer, layers["dropout"]), tapped
        x = layer(x)
        if name in readers:
            tapped.append(x)
    return x, tapped


def obstacle(layers: Mapping[str, Any], readers: Iterable[Any]) -> str | None:
    """Why the layers compute one by one; None where one operator does."""
    hook = global_hook()
    if hook is not None:
        return hook
    for name, layer in layers.items():
        change = change_of(layer, _TYPES[name])
        if change is None and isinstance(layer, Inception):
            if layer.norm is not None:
                change = "has batch norm"
            elif not layer.is_fused:
                change = "is plain PyTorch"
        if change is None and isinstance(layer, MaxPool2d):
            change = why_no_window(layer)
        if change is None and isinstance(layer, GlobalAvgPool2d):
            change = change_of_mean(layer)
        if change is not None:
            return f"{name} {change}"
    # a hook there may look at the gradient of the map, of which the operator adds up the parts
    for reader in readers:
        change = change_of(reader, InceptionAux)
        if change is not None:
            return f"an auxiliary classifier {change}"
    return None

"""The plain-PyTorch twin of a model: what a fused model is compared with."""

import copy
from typing import Any

from torch import Tensor, nn

from fused_inception import reference
from fused_inception.nn.adoption import origin_of, release
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.googlenet import GoogLeNet
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception
from fused_inception.nn.inception_naive import InceptionNaive
from fused_inception.nn.pooling import LocalResponseNorm, LRNMaxPool2d, MaxPool2d, MaxPoolLRN2d


def plain_twin(model: nn.Module) -> nn.Module:
    """A deep copy of `model` without anything of ours in it.

    What `fuse_` fused is undone; modules that were made fused become those of the reference.
    """
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        if origin_of(module) is not None:
            release(module)
        if type(module) in _PLAIN:
            cls, attributes = _PLAIN[type(module)]
            vars(module).update(attributes)
            module.__class__ = cls
    return twin


class _PlainLRNMaxPool2d(LRNMaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return _pool(self, _norm(self, x))


class _PlainMaxPoolLRN2d(MaxPoolLRN2d):
    def forward(self, x: Tensor) -> Tensor:
        return _norm(self, _pool(self, x))


def _norm(module: Any, x: Tensor) -> Tensor:
    return reference.local_response_norm(x, module.size, module.alpha, module.beta, module.k)


def _pool(module: Any, x: Tensor) -> Tensor:
    return reference.max_pool2d(
        x, module.kernel_size, module.stride, module.padding, ceil_mode=module.ceil_mode
    )


# the class that computes the same with the same children, and attributes that ours does not have
_PLAIN: dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]] = {
    ConvBlock: (reference.ConvBlock, {}),
    GlobalAvgPool2d: (reference.GlobalAvgPool2d, {}),
    GoogLeNet: (reference.GoogLeNet, {}),
    Inception: (reference.Inception, {}),
    InceptionAux: (reference.InceptionAux, {}),
    InceptionNaive: (reference.InceptionNaive, {}),
    LRNMaxPool2d: (_PlainLRNMaxPool2d, {}),
    LocalResponseNorm: (reference.LocalResponseNorm, {}),
    MaxPool2d: (nn.MaxPool2d, {"dilation": 1, "return_indices": False}),
    MaxPoolLRN2d: (_PlainMaxPoolLRN2d, {}),
}

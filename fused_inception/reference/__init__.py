"""The yardstick: every function, block and network of the library in plain PyTorch.

Any floating dtype and any device. Nothing here is shared with the fused kernels, so nothing here
can be wrong in the same way as they are.
"""

from fused_inception.reference.functions import (
    adaptive_avg_pool2d_conv1x1_relu,
    avg_pool2d_conv1x1_relu,
    conv2d_bn_relu,
    conv2d_relu,
    global_avg_pool2d,
    global_avg_pool2d_dropout,
    googlenet_stem,
    inception,
    inception_bn,
    inception_naive,
    inception_trunk,
    local_response_norm,
    lrn_max_pool2d,
    max_pool2d,
    max_pool2d_lrn,
    parallel_conv1x1_relu,
)
from fused_inception.reference.modules import (
    ConvBlock,
    GlobalAvgPool2d,
    Inception,
    InceptionAux,
    InceptionNaive,
    LocalResponseNorm,
)
from fused_inception.reference.networks import GoogLeNet, GoogLeNetOutputs, googlenet

__all__ = [
    "ConvBlock",
    "GlobalAvgPool2d",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception",
    "InceptionAux",
    "InceptionNaive",
    "LocalResponseNorm",
    "adaptive_avg_pool2d_conv1x1_relu",
    "avg_pool2d_conv1x1_relu",
    "conv2d_bn_relu",
    "conv2d_relu",
    "global_avg_pool2d",
    "global_avg_pool2d_dropout",
    "googlenet",
    "googlenet_stem",
    "inception",
    "inception_bn",
    "inception_naive",
    "inception_trunk",
    "local_response_norm",
    "lrn_max_pool2d",
    "max_pool2d",
    "max_pool2d_lrn",
    "parallel_conv1x1_relu",
]

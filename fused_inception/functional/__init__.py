"""The public functions: check once, bring to channels last, call the operator."""

from fused_inception.functional.batch_norm import conv2d_bn_relu, inception_bn
from fused_inception.functional.classifier import (
    adaptive_avg_pool2d_conv1x1_relu,
    avg_pool2d_conv1x1_relu,
    global_avg_pool2d,
    global_avg_pool2d_dropout,
)
from fused_inception.functional.convolution import conv2d_relu, parallel_conv1x1_relu
from fused_inception.functional.inception import inception, inception_naive
from fused_inception.functional.pooling import (
    local_response_norm,
    lrn_max_pool2d,
    max_pool2d,
    max_pool2d_lrn,
)
from fused_inception.functional.stem import googlenet_stem
from fused_inception.functional.trunk import inception_trunk

__all__ = [
    "adaptive_avg_pool2d_conv1x1_relu",
    "avg_pool2d_conv1x1_relu",
    "conv2d_bn_relu",
    "conv2d_relu",
    "global_avg_pool2d",
    "global_avg_pool2d_dropout",
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

"""Fused Triton kernels for the Inception modules of GoogLeNet, as PyTorch operators.

Importing the package loads neither Triton nor a CUDA context.
"""

from fused_inception import functional, reference
from fused_inception.adapters.fuse import fuse_, fused, unfuse_
from fused_inception.adapters.report import FusionError, FusionReport
from fused_inception.adapters.torchvision import torchvision_blocks
from fused_inception.backend import BackendError, backend
from fused_inception.launches import Launch, record_launches
from fused_inception.nn.auxiliary import InceptionAux
from fused_inception.nn.conv_block import ConvBlock
from fused_inception.nn.googlenet import GoogLeNet, googlenet
from fused_inception.nn.head import GlobalAvgPool2d
from fused_inception.nn.inception import Inception
from fused_inception.nn.inception_naive import InceptionNaive
from fused_inception.nn.pooling import LocalResponseNorm, LRNMaxPool2d, MaxPool2d, MaxPoolLRN2d
from fused_inception.ops.filter_cache import clear as clear_cache
from fused_inception.reference import GoogLeNetOutputs
from fused_inception.tools.checkpoint import load_checkpoint
from fused_inception.tools.explain import ExplainReport, explain
from fused_inception.tools.graphs import graphed
from fused_inception.tools.precompile import PrecompileReport, precompile
from fused_inception.tools.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "ConvBlock",
    "ExplainReport",
    "FusionError",
    "FusionReport",
    "GlobalAvgPool2d",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "Inception",
    "InceptionAux",
    "InceptionNaive",
    "LRNMaxPool2d",
    "Launch",
    "LocalResponseNorm",
    "MaxPool2d",
    "MaxPoolLRN2d",
    "PrecompileReport",
    "VerifyReport",
    "__version__",
    "backend",
    "clear_cache",
    "explain",
    "functional",
    "fuse_",
    "fused",
    "googlenet",
    "graphed",
    "load_checkpoint",
    "precompile",
    "record_launches",
    "reference",
    "torchvision_blocks",
    "unfuse_",
    "verify",
]

"""The checks of arguments and their messages: what was expected, what came."""

from fused_inception.checks.norms import (
    batch_counters,
    batch_statistics,
    norm_pair,
    norm_vectors,
    one_dtype,
    written_to,
)
from fused_inception.checks.options import count, pool_window, probability
from fused_inception.checks.parameters import (
    conv_filter,
    conv_parameters,
    inception_filters,
    inception_parameters,
    naive_parameters,
    pointwise_parameters,
    stem_parameters,
    trunk_parameters,
)
from fused_inception.checks.tensors import image_batch, integer, tensor

__all__ = [
    "batch_counters",
    "batch_statistics",
    "conv_filter",
    "conv_parameters",
    "count",
    "image_batch",
    "inception_filters",
    "inception_parameters",
    "integer",
    "naive_parameters",
    "norm_pair",
    "norm_vectors",
    "one_dtype",
    "pointwise_parameters",
    "pool_window",
    "probability",
    "stem_parameters",
    "tensor",
    "trunk_parameters",
    "written_to",
]

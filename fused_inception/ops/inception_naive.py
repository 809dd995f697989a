"""The naive Inception module, bias and ReLU, as one operator."""

from typing import Any

from fused_inception.ops.layout import naive_dims_of
from fused_inception.ops.module import ModuleForm, define


def _script() -> Any:
    from fused_inception.ops import inception_naive_triton

    return inception_naive_triton


inception_naive, inception_naive_backward = define(
    ModuleForm("inception_naive", naive_dims_of, _script)
)

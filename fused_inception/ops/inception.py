"""The Inception module, bias and ReLU, as one operator."""

from typing import Any

from fused_inception.ops.layout import dims_of
from fused_inception.ops.module import ModuleForm, define


def _script() -> Any:
    from fused_inception.ops import inception_triton

    return inception_triton


inception, inception_backward = define(ModuleForm("inception", dims_of, _script))

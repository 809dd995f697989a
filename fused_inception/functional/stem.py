"""The stem of the paper's GoogLeNet."""

import torch
from torch import Tensor

from fused_inception import checks
from fused_inception.backend import resolve
from fused_inception.functional.convolution import conv2d_relu
from fused_inception.functional.fitting import once
from fused_inception.functional.pooling import pool
from fused_inception.geometry import STEM_NORM, STEM_POOL, Window
from fused_inception.ops import pooling as _pooling
from fused_inception.ops import stem as _stem
from fused_inception.ops.measured import measured
from fused_inception.ops.registration import autocast, autocasts, call
from fused_inception.ops.stages import Stem


@measured
def googlenet_stem(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    *,
    stride: int = 2,
    padding: int = 3,
    pool1: Window = STEM_POOL,
    norm1: tuple[int, float, float, float] = STEM_NORM,
    norm2: tuple[int, float, float, float] = STEM_NORM,
    pool2: Window = STEM_POOL,
) -> Tensor:
    """The stem of the paper's GoogLeNet: all that comes before its first Inception module.

    y = maxpool(lrn(conv3(conv2(lrn(maxpool(conv1(x))))))), each convolution with bias and ReLU

    Source: Szegedy et al., arXiv 1409.4842, table 1, with the order of pool and normalisation of
    Caffe's model. On the Triton path one operator: five launches forward; six backward, and one
    more for the gradient of the image. Elsewhere, and for images of more than 3 channels, another
    conv1 than 7 x 7 of stride 2 and padding 3, widths that are no multiples of 8 or pools of more
    than 3 x 3, it is `conv2d_relu`, `max_pool2d_lrn`, `conv2d_relu` twice and `lrn_max_pool2d`.

    Args:
        x: images [N, C_in, H, W] in fp16, bf16, fp32 or fp64, read in their own layout.
        w1: filters [C_1, C_in, K, K] of conv1, in the dtype of `x`.
        w2, w3: filters [C_2, C_1, 1, 1] and [C_3, C_2, 3, 3]; their padding keeps the size.
        b1, b2, b3: one bias for each filter, in the dtype of `x` or fp32.
        stride, padding: of conv1.
        pool1, pool2: windows of the max pools, `fused_inception.geometry.Window`.
        norm1, norm2: size, alpha, beta and k of `local_response_norm`.

    Under autocast `x` is cast, and the filters inside; biases stay as they are.

    Returns:
        [N, C_3, H_out, W_out] in the dtype of `x`, exactly channels last; 28 x 28 of 224 x 224.

    Raises:
        ValueError: a shape, an option or a device that does not fit.
        TypeError: a dtype that does not fit, or float64 under the backend "triton".
        BackendError: the backend "triton" cannot run here.

    Autograd saves, besides the parameters, on the Triton path the first pooled map before
    and after its norm, the outputs of conv2 and conv3 and one byte a pooled element; no ReLU mask:
    the gates are in these maps. conv1 reads a packed image, which is saved too, 16 elements for
    2 x 2 pixels, and `x` only where it needs a gradient. A double backward raises RuntimeError.
    """
    filters, biases = [w1, w2, w3], [b1, b2, b3]
    checks.image_batch(x)
    stride, padding = checks.integer("stride", stride), checks.integer("padding", padding)
    casts, pools = autocasts(x), (pool1, pool2)
    once(
        checks.stem_parameters,
        [x, *filters, *biases],
        (stride, padding, pools),
        *(x, filters, biases, stride, padding, pools),
        casts=casts,
    )
    for size in (norm1[0], norm2[0]):
        checks.count("size", size)
    impl = resolve(x)
    stem = Stem(stride, padding, pool1, norm1, norm2, pool2)
    if impl == "triton" and _stem.why_not(filters, stem) is None:
        x = autocast(x) if casts else x
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *filters, *biases))
        y, _ = call(_stem.googlenet_stem, x, filters, biases, stem.integers, stem.constants, save)
        return y
    x = conv2d_relu(x, w1, b1, stride, padding)
    x = pool(_pooling.max_pool2d_lrn, x, pool1, *norm1)
    x = conv2d_relu(conv2d_relu(x, w2, b2), w3, b3, padding=1)
    return pool(_pooling.lrn_max_pool2d, x, pool2, *norm2)

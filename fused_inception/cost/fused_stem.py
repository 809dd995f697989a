"""The launches of the stem as one operator, in training with biases."""

import math
from collections.abc import Callable
from dataclasses import replace

from fused_inception.cost.layers import Conv, Network, Pool
from fused_inception.cost.module_tensors import FP32
from fused_inception.cost.ops import Gemm, Tensor, gradient
from fused_inception.cost.plan import IMAGE, Plan
from fused_inception.geometry import align_up, sums_in_stages

# a packed image: elements of a pixel, pixels beyond conv1's output each way, depth of the product
PACKED_CHANNELS, PACKED_BORDER, PACKED_DEPTH = 16, 3, 256


def stem(plan: Plan, launch: Callable[..., None], network: Network, x: Tensor) -> Tensor:
    """Images `x` to the input of the first module; `launch` writes down a launch of ours.

    No ReLU mask is kept: the first pooled map, conv3's input and its output are the gates. conv1
    reads a packed image, which is kept in place of the image. What serves several convolutions
    counts as conv3's, the largest, but packing with the image as conv1's.
    """
    conv1, conv2, conv3 = network.conv1, network.conv2, network.conv3
    pool1, pool2 = network.pool1, network.pool2
    y1, r, y3 = (plan.tensor(c.name, c.outputs, c.c_out) for c in (conv1, conv2, conv3))
    z = plan.tensor(f"{pool1.layer} output", pool1.outputs, pool1.channels)
    pooled = plan.tensor(f"{pool1.layer} pooled", pool1.outputs, align_up(pool1.channels))
    y = plan.tensor(f"{pool2.layer} output", pool2.outputs, pool2.channels)
    index1, index2 = (_index(plan, pool) for pool in (pool1, pool2))
    weights = [plan.parameter(f"{c.name} weight", c.weights) for c in (conv1, conv2, conv3)]
    packed = [
        plan.parameter(f"{c.name} packed", elements)
        for c, elements in (
            (conv1, PACKED_DEPTH * conv1.c_out), (conv2, conv2.weights), (conv3, conv3.weights)
        )
    ]  # fmt: skip
    image = packed_image(plan, conv1)

    def pack(layer: str, reads: list[Tensor], writes: list[Tensor], kernel: str) -> None:
        launch("pack", layer, reads, writes, kernel=kernel)

    def forward(conv: Conv, reads: list[Tensor], write: Tensor, kernel: str) -> None:
        gemm = plan.gemm(conv.outputs, conv.c_out, _depth(conv, conv1), conv.kind)
        gemm = replace(gemm, useful=plan.batch * conv.multiply_adds)
        launch("conv", conv.layer, reads, [write], [gemm], kernel=kernel)

    pack(conv1.layer, [x, *weights], [image, *packed], "_stem_pack_kernel")
    forward(conv1, [image, packed[0]], y1, "_stem_conv_fwd_kernel")
    launch("pool", pool1.layer, [y1], [z, pooled, index1], kernel="_max_pool_lrn_fwd_kernel")
    forward(conv2, [z, packed[1]], r, "_conv2d_fwd_kernel")
    forward(conv3, [r, packed[2]], y3, "_conv2d_fwd_kernel")
    launch("pool", pool2.layer, [y3], [y, index2], kernel="_lrn_max_pool_fwd_kernel")
    plan.save(conv1.layer, image)
    plan.save(pool1.layer, pooled, index1)
    plan.save(conv2.layer, z)
    plan.save(conv3.layer, r)
    plan.save(pool2.layer, y3, index2)

    def data(conv: Conv, reads: list[Tensor], write: Tensor) -> None:
        gemm = plan.gemm(conv.inputs, conv.c_in, conv.c_out * conv.kernel**2, conv.kind)
        launch("data gradient", conv.layer, reads, [write], [gemm], kernel="_conv2d_dgrad_kernel")

    def backward() -> None:
        dz1, dz2, dz3 = gradient(y1), gradient(r), gradient(y3)
        launch("pool backward", pool2.layer, [gradient(y), index2, y3], [dz3],
               kernel="_lrn_max_pool_bwd_kernel")  # fmt: skip
        pack(conv3.layer, weights[1:], packed[1:], "_pack_kernel")
        data(conv3, [dz3, packed[2], r], dz2)
        data(conv2, [dz2, packed[1]], gradient(z))
        launch("pool backward", pool1.layer, [gradient(z), index1, pooled], [dz1],
               kernel="_max_pool_lrn_bwd_kernel")  # fmt: skip
        gemms: list[Gemm] = [
            replace(
                plan.filters_gemm(_depth(c, conv1), c.c_out, c.outputs),
                useful=plan.batch * c.multiply_adds,
            )
            for c in (conv1, conv3, conv2)
        ]
        elements = sum(gemm.splits * gemm.rows * gemm.columns for gemm in gemms)
        partials = Tensor("stem partials", elements * FP32)
        # dz3 once more for the gradient of its bias
        reads = [image, dz1, r, dz3, z, dz2, dz3]
        launch("filter gradients", conv3.layer, reads, [partials], gemms,
               kernel="_stem_wgrad_kernel")  # fmt: skip
        if sums_in_stages(plan.batch * conv1.outputs):
            elements = gemms[0].splits * gemms[0].rows * gemms[0].columns
            of_conv1 = Tensor("conv1 partials", elements * FP32)
            total = Tensor("conv1 sums", elements // gemms[0].splits * FP32)
            launch("sums of sums", conv1.layer, [of_conv1], [total], kernel="_finish_kernel")
        launch("F", conv3.layer, [partials], [gradient(w) for w in weights],
               kernel="_stem_finish_kernel")  # fmt: skip

    plan.later(backward)
    return y


def packed_image(plan: Plan, conv1: Conv) -> Tensor:
    """What conv1 reads in the place of its image."""
    side = math.isqrt(conv1.outputs) + PACKED_BORDER
    return plan.tensor(f"{IMAGE} packed", side**2, PACKED_CHANNELS)


def _depth(conv: Conv, conv1: Conv) -> int:
    """Of a convolution's product."""
    return PACKED_DEPTH if conv is conv1 else conv.c_in * conv.kernel**2


def _index(plan: Plan, pool: Pool) -> Tensor:
    return plan.tensor(f"{pool.layer} index", pool.outputs, align_up(pool.channels), 1)

"""The launches of the stem as one operator, in training with biases."""

from collections.abc import Callable

from fused_inception.cost.layers import Conv, Network, Pool
from fused_inception.cost.module_tensors import FP32
from fused_inception.cost.ops import Gemm, Tensor, gradient
from fused_inception.cost.plan import Plan
from fused_inception.geometry import align_up


def stem(plan: Plan, launch: Callable[..., None], network: Network, x: Tensor) -> Tensor:
    """Images `x` to the input of the first module; `launch` writes down a launch of ours.

    No ReLU mask is kept: the first pooled map, conv3's input and its output are the gates. What
    serves several convolutions counts as conv3's, the largest.
    """
    conv1, pool1, conv2, conv3, pool2 = (
        *(network.conv1, network.pool1),
        *(network.conv2, network.conv3, network.pool2),
    )
    y1, r, y3 = (plan.tensor(c.name, c.outputs, c.c_out) for c in (conv1, conv2, conv3))
    z = plan.tensor(f"{pool1.layer} output", pool1.outputs, pool1.channels)
    pooled = plan.tensor(f"{pool1.layer} pooled", pool1.outputs, align_up(pool1.channels))
    y = plan.tensor(f"{pool2.layer} output", pool2.outputs, pool2.channels)
    index1, index2 = (_index(plan, pool) for pool in (pool1, pool2))
    weights = [plan.parameter(f"{c.name} weight", c.weights) for c in (conv1, conv2, conv3)]
    packed = [
        Tensor(f"{c.name} packed", plan.parameter(c.name, c.weights).bytes) for c in (conv2, conv3)
    ]

    def pack() -> None:
        launch("pack", conv3.layer, weights[1:], packed, kernel="_stem_pack_kernel",
               source="packing")  # fmt: skip

    def forward(conv: Conv, reads: list[Tensor], write: Tensor, kernel: str) -> None:
        gemm = plan.gemm(conv.outputs, conv.c_out, conv.c_in * conv.kernel**2, conv.kind)
        launch("conv", conv.layer, reads, [write], [gemm], kernel=kernel)

    forward(conv1, [x, weights[0]], y1, "_image_conv_fwd_kernel")
    launch("pool", pool1.layer, [y1], [z, pooled, index1], kernel="_max_pool_lrn_fwd_kernel")
    pack()
    forward(conv2, [z, packed[0]], r, "_conv2d_fwd_kernel")
    forward(conv3, [r, packed[1]], y3, "_conv2d_fwd_kernel")
    launch("pool", pool2.layer, [y3], [y, index2], kernel="_lrn_max_pool_fwd_kernel")
    plan.save(conv1.layer, x)
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
        pack()
        data(conv3, [dz3, packed[1], r], dz2)
        data(conv2, [dz2, packed[0]], gradient(z))
        launch("pool backward", pool1.layer, [gradient(z), index1, pooled], [dz1],
               kernel="_max_pool_lrn_bwd_kernel")  # fmt: skip
        gemms: list[Gemm] = [
            plan.filters_gemm(c.c_in * c.kernel**2, c.c_out, c.outputs)
            for c in (conv1, conv3, conv2)
        ]
        elements = sum(gemm.splits * gemm.rows * gemm.columns for gemm in gemms)
        partials = Tensor("stem partials", elements * FP32)
        # dz3 once more for the gradient of its bias
        launch("filter gradients", conv3.layer, [x, dz1, r, dz3, z, dz2, dz3], [partials], gemms,
               kernel="_stem_wgrad_kernel")  # fmt: skip
        launch("F", conv3.layer, [partials], [gradient(w) for w in weights],
               kernel="_stem_finish_kernel")  # fmt: skip

    plan.later(backward)
    return y


def _index(plan: Plan, pool: Pool) -> Tensor:
    return plan.tensor(f"{pool.layer} index", pool.outputs, align_up(pool.channels), 1)

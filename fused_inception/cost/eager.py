"""Eager PyTorch, channels last: one record for each call of an ATen operator.

The names are ATen's, so that a trace of the reference network can be held against them. How many
kernels such a call launches on a GPU is an assumption: one, but for a bias beside a convolution,
each gradient of a convolution, and a fill before a scatter.
"""

from fused_inception.cost.layers import Aux, Conv, Module, Pool
from fused_inception.cost.ops import Tensor, gradient
from fused_inception.cost.plan import IMAGE, Plan

INDEX_BYTES = 8  # torch's pooling indices are int64
LRN_MARGIN = 4  # channels of zeros around the window of five


class Eager(Plan):
    """PyTorch's own operators, one after another."""

    def __init__(self, batch: int, itemsize: int, *, training: bool) -> None:
        super().__init__(batch, itemsize, training=training)
        # where a gradient lies that is a slice of another: name of the tensor -> gradient
        self._slices: dict[str, Tensor] = {}
        self._given: set[str] = set()

    def conv(self, conv: Conv, x: Tensor) -> Tensor:
        """Convolution, bias or BatchNorm, ReLU in place."""
        raw = self.tensor(conv.name, conv.outputs, conv.c_out)
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        bias = self.parameter(f"{conv.name} bias", conv.c_out)
        biases = [] if conv.norm else [bias]
        forward = [self.gemm(conv.outputs, conv.c_out, conv.c_in * conv.kernel**2, conv.kind)]
        self.op(
            "convolution", conv.layer, [x, weight, *biases], [raw], forward,
            launches=1 + len(biases),
        )  # fmt: skip
        self.save(conv.layer, x)
        y = self._batch_norm(conv, raw) if conv.norm else raw
        self.op("relu_", conv.layer, [y], [y])
        self.save(conv.layer, y)

        def backward() -> None:
            dy, dz = self._slices.get(y.name, gradient(y)), gradient(raw)
            self.op("threshold_backward", conv.layer, [dy, y], [dz])
            if conv.norm:
                scale = self.parameter(f"{conv.name} scale", conv.c_out)
                # once for the sums over the batch, once for the gradient
                reads = [dz, raw, dz, raw, scale]
                affine = [gradient(scale), gradient(bias)]
                self.op("native_batch_norm_backward", conv.layer, reads, [dz, *affine])
            dw = [gradient(weight), *map(gradient, biases)]
            dx = [] if x.name == IMAGE else [gradient(x)]
            taps = conv.kernel**2
            gemms = [self.filters_gemm(conv.c_in * taps, conv.c_out, conv.outputs)]
            if dx:
                depth = conv.c_out * taps
                gemms.append(self.gemm(conv.inputs, conv.c_in, depth, conv.kind))
            self.op(
                "convolution_backward", conv.layer, [dz, x, weight], [*dx, *dw], gemms,
                launches=len(dx) + len(dw),
            )  # fmt: skip
            if dx:
                self._give(conv.layer, x)

        self.later(backward)
        return y

    def _batch_norm(self, conv: Conv, raw: Tensor) -> Tensor:
        y = Tensor(f"{conv.name} normalised", raw.bytes)
        affine = self.parameter(f"{conv.name} affine and running", 4 * conv.c_out)
        if not self.training:
            self.op("native_batch_norm", conv.layer, [raw, affine], [y])
            return y
        self.op("add_", conv.layer, [], [])  # the number of batches, 8 bytes
        moments = self.parameter(f"{conv.name} mean and deviation", 2 * conv.c_out, 4)
        # once for the statistics, once for the result
        self.op("native_batch_norm", conv.layer, [raw, raw, affine], [y, moments])
        self.save(conv.layer, raw, moments)
        return y

    def pool(self, pool: Pool, x: Tensor) -> Tensor:
        """The max pool and the normalisation, each on its own."""
        if pool.lrn == "before":
            x = self._lrn(pool, x)
        x = self._max_pool(pool.layer, pool.channels, pool.outputs, x)
        return self._lrn(pool, x) if pool.lrn == "after" else x

    def _max_pool(self, layer: str, channels: int, outputs: int, x: Tensor) -> Tensor:
        y = self.tensor(f"{layer} pooled", outputs, channels)
        index = self.tensor(f"{layer} indices", outputs, channels, INDEX_BYTES)
        self.op("max_pool2d_with_indices", layer, [x], [y, index], scatters=True)
        self.save(layer, x, index)

        def backward() -> None:
            dx = gradient(x)
            self.op(
                "max_pool2d_with_indices_backward", layer, [gradient(y), index], [dx, dx],
                launches=2, scatters=True,
            )  # fmt: skip
            self._give(layer, x)

        self.later(backward)
        return y

    def _lrn(self, pool: Pool, x: Tensor) -> Tensor:
        """`torch.nn.functional.local_response_norm`: x / (k + alpha * mean of squares) ** beta."""

        def like(name: str, channels: int = pool.channels) -> Tensor:
            return self.tensor(f"{pool.layer} {name}", pool.lrn_pixels, channels)

        def op(name: str, reads: list[Tensor], writes: list[Tensor], launches: int = 1) -> None:
            self.op(name, pool.layer, reads, writes, launches=launches)

        square, mean, scaled = like("square"), like("mean"), like("scaled")
        padded = like("padded", pool.channels + LRN_MARGIN)
        base, power, y = like("base"), like("power"), like("normalised")
        op("mul", [x, x], [square])
        op("constant_pad_nd", [square], [padded], launches=2)
        op("avg_pool3d", [padded], [mean])
        op("mul", [mean], [scaled])
        op("add", [scaled], [base])
        op("pow", [base], [power])
        op("div", [x, power], [y])
        self.save(pool.layer, x, padded, base, power)

        def backward() -> None:
            dx, dy = gradient(x), gradient(y)
            inner = [like(f"gradient {i}") for i in range(4)]
            op("div", [dy, power], [dx])
            self._given.add(x.name)
            op("neg", [dy], [inner[0]])
            op("div", [x, power], [inner[1]])
            op("div", [inner[1], power], [inner[2]])
            op("mul", [inner[0], inner[2]], [inner[3]])
            op("pow", [base], [inner[0]])
            op("mul", [inner[0]], [inner[1]])
            op("mul", [inner[3], inner[1]], [inner[2]])
            op("mul", [inner[2]], [inner[0]])
            op("avg_pool3d_backward", [inner[0]], [gradient(padded)], launches=2)
            op("constant_pad_nd", [gradient(padded)], [inner[1]])
            for _ in range(2):
                op("mul", [inner[1], x], [inner[2]])
                self._give(pool.layer, x, inner[2])

        self.later(backward)
        return y

    def module(self, module: Module, x: Tensor) -> Tensor:
        """Four branches and the concatenation."""
        one, reduce3, three, reduce5, five, projection = module.convs
        channels = module.dims.in_channels
        branches = [
            self.conv(one, x),
            self.conv(three, self.conv(reduce3, x)),
            self.conv(five, self.conv(reduce5, x)),
            self.conv(projection, self._max_pool(module.name, channels, module.pixels, x)),
        ]
        y = self.tensor(f"{module.name} output", module.pixels, module.dims.out_channels)
        self.op("cat", module.name, branches, [y])
        for branch in branches:
            self._slices[branch.name] = Tensor(gradient(y).name, branch.bytes)
        return y

    def aux(self, aux: Aux, x: Tensor) -> None:
        """Average pool, convolution, two linear layers; flattening channels last is a copy."""
        pooling = "_adaptive_avg_pool2d" if aux.adaptive else "avg_pool2d"
        pooled = self.tensor(f"{aux.name} pooled", aux.conv.inputs, aux.conv.c_in)
        self.op(pooling, aux.name, [x], [pooled])
        self.save(aux.name, x)

        def backward() -> None:
            self.op(f"{pooling}_backward", aux.name, [gradient(pooled)], [gradient(x)])
            self._give(aux.name, x)

        self.later(backward)
        flat = self.conv(aux.conv, pooled)
        if aux.conv.outputs > 1:
            copy = Tensor(f"{aux.name} flat", flat.bytes)
            self.op("clone", aux.name, [flat], [copy])
            self._slices[flat.name] = gradient(copy)
            flat = copy
        self.classify(aux, flat)

    def head(self, classifier: Conv, pixels: int, x: Tensor) -> None:
        """Mean, dropout, classifier."""
        layer = classifier.layer
        mean = self.tensor("mean", 1, classifier.c_in)
        self.op("mean", layer, [x], [mean])

        def backward() -> None:
            # channels-last strides are put on the mean by as_strided_: its gradient is a copy
            self.op("new_zeros", layer, [], [gradient(mean)])
            self.op("copy_", layer, [gradient(mean)], [gradient(mean)])
            self.op("div", layer, [gradient(mean)], [gradient(x)])

        self.later(backward)
        self.linear(classifier, self.dropout(layer, mean) if self.training else mean)

    def _give(self, layer: str, x: Tensor, source: Tensor | None = None) -> None:
        """`x` has got a gradient, in memory of its own; a second one is added to the first."""
        dx = gradient(x)
        if x.name in self._given:
            self.op("add", layer, [dx, source or dx], [dx])
        self._given.add(x.name)

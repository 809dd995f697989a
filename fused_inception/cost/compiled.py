"""torch.compile with library convolutions: Inductor's pointwise kernels between them.

What is saved is what the partitioner of AOTAutograd keeps (torch 2.13), and tests hold it. The
kernels are read off Inductor's schedules for a GPU: bias, ReLU, masks and dropout ride in one
pointwise kernel behind each convolution, or in the pool or normalisation that reads it; backward
of a max pool is a fill and atomic additions in fp32; gradients of an output of a module that come
from several readers are summed where they are used. Bias gradients ride in the pointwise kernel
that makes the masked gradient and are finished by a small second kernel.
"""

from fused_inception.cost.eager import LRN_MARGIN
from fused_inception.cost.layers import Aux, Conv, Module, Pool
from fused_inception.cost.ops import Tensor, gradient
from fused_inception.cost.plan import IMAGE, Plan

ATOMIC_BYTES = 4  # atomic additions run in fp32


class Compiled(Plan):
    """What Inductor makes of the network."""

    def __init__(self, batch: int, itemsize: int, *, training: bool) -> None:
        super().__init__(batch, itemsize, training=training)
        # the tensors whose sum is the gradient of an activation: name of it -> these
        self._parts: dict[str, list[Tensor]] = {}

    def _pointwise(
        self, layer: str, reads: list[Tensor], writes: list[Tensor], name: str = "pointwise"
    ) -> None:
        self.op(name, layer, reads, writes, source="inductor")

    def _parts_of(self, x: Tensor) -> list[Tensor]:
        return self._parts.get(x.name) or [gradient(x)]

    def _library_conv(self, conv: Conv, x: Tensor) -> Tensor:
        """The convolution alone, and in BatchNorm mode the statistics of its result."""
        raw = self.tensor(f"{conv.name} raw", conv.outputs, conv.c_out)
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        gemm = self.gemm(conv.outputs, conv.c_out, conv.c_in * conv.kernel**2, conv.kind)
        self.op("convolution", conv.layer, [x, weight], [raw], [gemm])
        self.save(conv.layer, x)
        if conv.norm and self.training:
            moments = self.parameter(f"{conv.name} mean and deviation", 2 * conv.c_out, 4)
            self._pointwise(conv.layer, [raw], [moments], "statistics")
            self._pointwise(conv.layer, [moments], [moments], "finish statistics")
            self.save(conv.layer, raw, moments)
        return raw

    def _masked_gradient(self, conv: Conv, parts: list[Tensor], gate: Tensor, raw: Tensor) -> None:
        """The gradient behind ReLU, in BatchNorm mode behind the normalisation."""
        dz = gradient(raw)
        if not conv.norm:
            self._pointwise(conv.layer, [*parts, gate], [dz])
            return
        if len(parts) > 1:
            total = self.tensor(f"{conv.name} sum", conv.outputs, conv.c_out, ATOMIC_BYTES)
            self._pointwise(conv.layer, [*parts, raw], [total])
            parts = [total]
        self._pointwise(conv.layer, [*parts, raw], [], "statistics")
        self._pointwise(conv.layer, [], [], "finish statistics")
        self._pointwise(conv.layer, [*parts, raw], [dz])

    def _conv_backward(self, conv: Conv, x: Tensor, raw: Tensor, dx: Tensor | None) -> None:
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        taps = conv.kernel**2
        if not conv.norm:
            self._pointwise(conv.layer, [], [], "finish bias gradient")
        dz = gradient(raw)
        if dx is not None:
            gemm = self.gemm(conv.inputs, conv.c_in, conv.c_out * taps, conv.kind)
            self.op("convolution_backward input", conv.layer, [dz, weight], [dx], [gemm])
        gemm = self.filters_gemm(conv.c_in * taps, conv.c_out, conv.outputs)
        self.op("convolution_backward weight", conv.layer, [dz, x], [gradient(weight)], [gemm])

    def conv(self, conv: Conv, x: Tensor) -> Tensor:
        """The paper's conv1 and conv3 leave bias and ReLU to the pool or normalisation behind."""
        raw = self._library_conv(conv, x)
        lazy = conv.name in ("conv1", "conv3") and not conv.norm
        y = raw
        if not lazy:
            y = self.tensor(conv.name, conv.outputs, conv.c_out)
            self._pointwise(conv.layer, [raw], [y])
        gate = y
        if conv.name == "conv1" and not conv.norm and self.training:
            gate = self.tensor(f"{conv.name} mask", conv.outputs, conv.c_out, 1)
            self._pointwise(conv.layer, [raw], [gate])
            self.save(conv.layer, gate)

        def backward() -> None:
            # the normalisation behind conv3 masks the gradient that it makes
            if not (lazy and conv.name == "conv3"):
                self._masked_gradient(conv, self._parts_of(y), gate, raw)
            self._conv_backward(conv, x, raw, None if x.name == IMAGE else gradient(x))

        self.later(backward)
        return y

    def pool(self, pool: Pool, x: Tensor) -> Tensor:
        """A pool with 1-byte offsets; a normalisation of three kernels, one in inference."""
        if pool.lrn == "before":
            x = self._lrn(pool, x)
        x = self._max_pool(pool.layer, pool.channels, pool.inputs, pool.outputs, x)
        return self._lrn(pool, x) if pool.lrn == "after" else x

    def _max_pool(self, layer: str, channels: int, inputs: int, outputs: int, x: Tensor) -> Tensor:
        y = self.tensor(f"{layer} pooled", outputs, channels)
        offsets = self.tensor(f"{layer} offsets", outputs, channels, 1)
        self._pointwise(layer, [x], [y, offsets] if self.training else [y], "max pool")
        self.save(layer, offsets)

        def backward() -> None:
            dx = self.tensor(f"d {x.name} through {y.name}", inputs, channels, ATOMIC_BYTES)
            self._pointwise(layer, [], [dx], "fill")
            self.op(
                "max pool backward", layer, [*self._parts_of(y), offsets, dx], [dx],
                source="inductor", scatters=True,
            )  # fmt: skip
            self._parts.setdefault(x.name, []).append(dx)

        self.later(backward)
        return y

    def _lrn(self, pool: Pool, x: Tensor) -> Tensor:
        def like(name: str, channels: int = pool.channels) -> Tensor:
            return self.tensor(f"{pool.layer} {name}", pool.lrn_pixels, channels)

        padded, mean = like("padded", pool.channels + LRN_MARGIN), like("mean")
        y = like("normalised")
        if not self.training:
            self._pointwise(pool.layer, [x], [y], "normalise")
            return y
        self._pointwise(pool.layer, [x], [padded], "pad")
        self._pointwise(pool.layer, [padded], [mean], "mean of squares")
        self._pointwise(pool.layer, [x, mean], [y], "normalise")
        self.save(pool.layer, x, padded, mean, y)

        def backward() -> None:
            d_padded, d_mean = gradient(padded), gradient(mean)
            parts = self._parts_of(y)
            self._pointwise(pool.layer, [*parts, y, mean], [d_padded], "normalise backward")
            self._pointwise(pool.layer, [d_padded], [d_mean], "mean of squares backward")
            self._pointwise(pool.layer, [*parts, mean, d_mean, x], [gradient(x)], "sum")

        self.later(backward)
        return y

    def module(self, module: Module, x: Tensor) -> Tensor:
        """The last pointwise kernel of each branch stores into its slice of the output."""
        layer, dims = module.name, module.dims
        y = self.tensor(f"{layer} output", module.pixels, dims.out_channels)
        one, reduce3, three, reduce5, five, projection = module.convs
        raws: list[Tensor] = []

        def branch(conv: Conv, source: Tensor, d_source: Tensor) -> None:
            raw = self._library_conv(conv, source)
            raws.append(raw)
            gate = self.tensor(f"{conv.name} mask", conv.outputs, conv.c_out, 1)
            if self.training:
                into = Tensor(y.name, raw.bytes)
                self._pointwise(layer, [raw], [into] if conv.norm else [into, gate])
            if not conv.norm:
                self.save(layer, gate)

            def backward() -> None:
                share = raw.bytes / y.bytes if y.bytes else 0.0
                parts = [Tensor(t.name, int(t.bytes * share)) for t in self._parts_of(y)]
                self._masked_gradient(conv, parts, gate, raw)
                self._conv_backward(conv, source, raw, d_source)

            self.later(backward)

        def reduction(conv: Conv) -> Tensor:
            raw = self._library_conv(conv, x)
            r = self.tensor(conv.name, conv.outputs, conv.c_out)
            self._pointwise(layer, [raw], [r])

            def backward() -> None:
                dx = Tensor(f"d {x.name} through {conv.name}", x.bytes)
                self._masked_gradient(conv, [gradient(r)], r, raw)
                self._conv_backward(conv, x, raw, dx)
                self._parts.setdefault(x.name, []).append(dx)

            self.later(backward)
            return r

        dx = Tensor(f"d {x.name} through {one.name}", x.bytes)
        self.later(lambda: self._parts.setdefault(x.name, []).append(dx))
        branch(one, x, dx)
        for reduce, conv in ((reduce3, three), (reduce5, five)):
            r = reduction(reduce)
            branch(conv, r, gradient(r))
        pooled = self._max_pool(layer, dims.in_channels, module.pixels, module.pixels, x)
        branch(projection, pooled, gradient(pooled))
        if not self.training:
            self._pointwise(layer, raws, [y])
        return y

    def aux(self, aux: Aux, x: Tensor) -> None:
        """Its gradient is summed with the other parts of that of `x` in one kernel."""
        layer = aux.name
        pooled = self.tensor(f"{layer} pooled", aux.conv.inputs, aux.conv.c_in)
        self._pointwise(layer, [x], [pooled], "average pool")

        def backward() -> None:
            total = gradient(x)
            self._pointwise(layer, [*self._parts_of(x), gradient(pooled)], [total], "sum")
            self._parts[x.name] = [total]

        self.later(backward)
        raw = self._library_conv(aux.conv, pooled)
        flat = self.tensor(f"{layer} flat", aux.conv.outputs, aux.conv.c_out)
        gate = self.tensor(f"{layer} mask", aux.conv.outputs, aux.conv.c_out, 1)
        self._pointwise(layer, [raw], [flat] if aux.conv.norm else [flat, gate])
        if not aux.conv.norm:
            self.save(layer, gate)

        def conv_backward() -> None:
            self._masked_gradient(aux.conv, [gradient(flat)], gate, raw)
            self._conv_backward(aux.conv, pooled, raw, gradient(pooled))

        self.later(conv_backward)
        hidden = self.linear(aux.hidden, flat)
        dropped = Tensor(f"{layer} dropout", hidden.bytes)
        masks = [Tensor(f"{layer} {m}", hidden.bytes // self.itemsize) for m in ("relu", "drop")]
        self._pointwise(layer, [hidden], [dropped, *masks])
        self.save(layer, *masks)
        self.later(lambda: self._pointwise(layer, [gradient(dropped), *masks], [gradient(hidden)]))
        self.linear(aux.classes, dropped)

    def head(self, classifier: Conv, pixels: int, x: Tensor) -> None:
        """Mean and dropout in one kernel; its gradient is never spread over the pixels."""
        layer = classifier.layer
        mean = self.tensor("mean", 1, classifier.c_in)
        mask = Tensor("head dropout mask", mean.bytes // self.itemsize)
        self._pointwise(layer, [x], [mean, mask] if self.training else [mean], "mean")
        self.save(layer, mask)

        def backward() -> None:
            d_mean = Tensor("d mean, dropped", mean.bytes)
            self._pointwise(layer, [gradient(mean), mask], [d_mean])
            self._parts[x.name] = [d_mean]

        self.later(backward)
        self.linear(classifier, mean)

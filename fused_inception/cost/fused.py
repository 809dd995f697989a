"""This library: which launches run, on which tensors.

A test runs the real network, records its launches and holds the records against them.

Left out of the bytes, being under a hundredth: column partials of bias gradients, and biases.
"""

from collections.abc import Callable, Iterable

from fused_inception.cost.fused_stem import packed_image, stem
from fused_inception.cost.layers import Aux, Conv, Module, Network, Pool
from fused_inception.cost.module_tensors import COEFFICIENTS, FP32, ModuleTensors
from fused_inception.cost.ops import Gemm, Tensor, gradient
from fused_inception.cost.plan import IMAGE, Plan
from fused_inception.geometry import (
    align_up,
    finished_together,
    power_of_two,
    sums_in_stages,
)

# above so many pixels, a power of two, the pool branch is a launch of its own in training, and the
# gradients of input and filters are two
APART_PIXELS = 64 * 132


class Fused(Plan):
    """Our kernels; linear layers, losses and sums of gradients are the library's."""

    def __init__(self, batch: int, itemsize: int, *, training: bool) -> None:
        super().__init__(batch, itemsize, training=training)
        self._given: set[str] = set()
        # masks of the modules of a trunk, whose gradients are masked where they are made, by the
        # names of their outputs
        self._masks: dict[str, Tensor] = {}
        self._is_trunk = False
        self._outputs: dict[str, Tensor] = {}  # of the modules of a trunk
        self._unfinished: list[ModuleTensors] = []
        self._finishes: set[str] = set()  # modules of a trunk behind which launch F comes

    def _launch(
        self,
        name: str,
        layer: str,
        reads: Iterable[Tensor],
        writes: Iterable[Tensor],
        gemms: Iterable[Gemm] = (),
        *,
        kernel: str,
    ) -> None:
        """One launch of ours; that named "pack" packs filters."""
        source = "packing" if name == "pack" else "triton"
        self.op(name, layer, reads, writes, gemms, source=source, kernel=kernel)

    def _launcher(self, layer: str) -> Callable[..., None]:
        """`_launch` for one layer: of name, reads, writes, kernel and its GEMMs."""

        def launch(
            name: str, reads: list[Tensor], writes: list[Tensor], kernel: str, *gemms: Gemm
        ) -> None:
            self._launch(name, layer, reads, writes, gemms, kernel=kernel)

        return launch

    def _give(self, layer: str, x: Tensor) -> None:
        """A second gradient of `x` is added to the first by autograd, but in a trunk."""
        if x.name in self._given and x.name not in self._masks:
            self.op("add", layer, [gradient(x), gradient(x)], [gradient(x)])
        self._given.add(x.name)

    def _mask_of(self, x: Tensor) -> list[Tensor]:
        """The mask that what makes the gradient of `x` applies: none, but in a trunk."""
        return [self._masks[x.name]] if x.name in self._masks else []

    # modules

    def network(self, network: Network) -> None:
        """In training with biases the modules of each stage, with what is behind them, are one
        operator, a trunk; the auxiliary classifiers run behind that of the fourth."""
        if network.norm or not self.training:
            super().network(network)
            return
        self._is_trunk = True
        x = self.stem(network, self.tensor(IMAGE, network.image_size**2, 3))
        stage: list[Module] = []
        for module in network.modules:
            stage.append(module)
            if module.name in network.pools:
                x = self.pool(network.pools[module.name], self._modules(stage, x))
                for behind in stage:
                    if behind.name in network.aux:
                        self.aux(network.aux[behind.name], self._outputs[behind.name])
                stage.clear()
        x = self._modules(stage, x)
        self.head(network.classifier, network.last_pixels, x)

    def _modules(self, stage: list[Module], x: Tensor) -> Tensor:
        """Those of a trunk: their filters are packed together, and their gradients are finished
        together, at the latest behind the last."""
        parts = []
        for module in stage:
            parts.append(ModuleTensors(self, module, x))
            x = self._outputs[module.name] = parts[-1].y
        first, last = stage[0].name, stage[-1].name
        ends = finished_together([of.partials.bytes for of in reversed(parts)])
        self._finishes |= {stage[-1 - at].name for at in ends}
        self._pack(first, parts)
        for module, tensors in zip(stage, parts, strict=True):
            self._forward(module, tensors)
        # behind the pool's backward, before that of any module
        self.later(lambda: self._pack(last, parts))
        return x

    def module(self, module: Module, x: Tensor) -> Tensor:
        """Bias mode, or BatchNorm in eval folded into filters and bias: A, B; M, L1, L2, L3, F."""
        if module.norm and self.training:
            return self._norm_module(module, x)
        parts = ModuleTensors(self, module, x)
        if self.training:  # else the packed filters stay until a parameter changes
            self._pack(module.name, [parts])
        self._forward(module, parts)
        return parts.y

    def _forward(self, module: Module, parts: "ModuleTensors") -> None:
        layer, dims, x, y = module.name, module.dims, parts.x, parts.y
        pool = [parts.y_slice(dims.pool_proj)]
        if self.training:
            pool += [parts.index, parts.mask_slice(dims.pool_proj)]
        one = [parts.y_slice(dims.ch1x1), parts.r]
        window = [parts.y_slice(dims.ch3x3 + dims.ch5x5)]
        if self.training:
            one.append(parts.mask_slice(dims.ch1x1))
            window.append(parts.mask_slice(dims.ch3x3 + dims.ch5x5))
        gemm, pool_gemm = parts.pointwise_gemms
        kernel = "_pointwise_kernel"
        reads = [x, parts.packed_cat]
        if self.training and power_of_two(self.batch * module.pixels) > APART_PIXELS:
            self._launch("A", layer, reads, one, [gemm], kernel=kernel)
            reads = [x, parts.packed_projection]
            self._launch("A pool", layer, reads, pool, [pool_gemm], kernel=kernel)
        else:
            reads.append(parts.packed_projection)
            self._launch("A", layer, reads, [*one, *pool], [gemm, pool_gemm], kernel=kernel)
        reads, kernel = [parts.r, parts.packed_windows], "_branches_kernel"
        self._launch("B", layer, reads, window, parts.window_gemms, kernel=kernel)
        self.save(layer, x, parts.r, parts.index, parts.mask)
        if self._is_trunk:
            self._masks[y.name] = parts.mask
            parts.dz = gradient(y)
        self.later(lambda: self._module_backward(module, parts))

    def _pack(self, layer: str, parts: "list[ModuleTensors]") -> None:
        self._launch(
            "pack", layer, [of.filters for of in parts], [of.packed for of in parts],
            kernel="_pack_kernel",
        )  # fmt: skip

    def _finish(self, layer: str) -> None:
        """Launch F, of all modules whose partial sums wait."""
        reads = [of.partials for of in self._unfinished]
        writes = [gradient(of.filters) for of in self._unfinished]
        self._launch("F", layer, reads, writes, kernel="_finish_kernel")
        self._unfinished.clear()

    def _module_backward(self, module: Module, parts: "ModuleTensors") -> None:
        layer = module.name
        if not self._is_trunk:
            self._launch(
                "M", layer, [gradient(parts.y), parts.mask], [parts.dz], kernel="_relu_mask_kernel"
            )
            self._pack(layer, [parts])
        self._reduction_gradients(module, parts)
        self._input_and_filter_gradients(module, parts)
        self._unfinished.append(parts)
        if not self._is_trunk or layer in self._finishes:
            self._finish(layer)

    def _reduction_gradients(self, module: Module, parts: "ModuleTensors") -> None:
        dims, pixels = module.dims, module.pixels
        gemms = [
            self.gemm(pixels, dims.ch3x3red, 9 * dims.ch3x3, "window"),
            self.gemm(pixels, dims.ch5x5red, dims.kernel_5x5**2 * dims.ch5x5, "window"),
            self.gemm(pixels, dims.in_channels, dims.pool_proj, "pointwise"),
        ]
        dz = parts.dz_slice(dims.ch3x3 + dims.ch5x5 + dims.pool_proj)
        reads = [dz, parts.r, parts.packed_windows, parts.packed_projection]
        writes = [parts.dr, parts.dp]
        self._launch("L1", module.name, reads, writes, gemms, kernel="_dgrad_kernel")

    def _input_and_filter_gradients(self, module: Module, parts: "ModuleTensors") -> None:
        """L2 and L3, of small maps one launch."""
        dims, kernel = module.dims, "_gradients_kernel"
        width = dims.ch1x1 + dims.ch3x3red + dims.ch5x5red
        gemms = [self.gemm(module.pixels, dims.in_channels, width, "pointwise")]
        reads = [parts.dz_slice(dims.ch1x1), parts.dr, parts.dp, parts.index, parts.packed_cat]
        if parts.x.name in self._given:  # what others add to it
            reads.append(gradient(parts.x))
        reads += self._mask_of(parts.x)
        filter_reads = [parts.x, parts.r, parts.dz, parts.dr]
        writes = [gradient(parts.x), parts.partials]
        if power_of_two(self.batch * module.pixels) > APART_PIXELS:
            self._launch("L2", module.name, reads, writes[:1], gemms, kernel=kernel)
            filters = parts.filter_gemms
            self._launch("L3", module.name, filter_reads, writes[1:], filters, kernel=kernel)
        else:
            # each operand once
            operands = dict.fromkeys([parts.dz, *filter_reads, *reads[1:]])
            gemms += parts.filter_gemms
            self._launch("L2, L3", module.name, operands, writes, gemms, kernel=kernel)
        self._give(module.name, parts.x)

    def _norm_module(self, module: Module, x: Tensor) -> Tensor:
        """BatchNorm in training: raw results and their statistics, then a pass that normalises."""
        parts = ModuleTensors(self, module, x)
        layer, dims = module.name, module.dims
        raw, moments = parts.raw, parts.moments
        activated = Tensor(f"{layer} activated", parts.r.bytes)
        self._pack(layer, [parts])
        launch = self._launcher(layer)
        reads = [x, parts.packed_cat, parts.packed_projection]
        writes = [parts.raw_slice(dims.ch1x1 + dims.pool_proj), parts.r, parts.index]
        launch("A", reads, writes, "_pointwise_kernel", *parts.pointwise_gemms)
        many = sums_in_stages(self.batch * module.pixels)
        if many:
            launch("merge", [moments], [moments], "_merge_moments_kernel")
        launch("statistics", [moments], [moments], "_batch_statistics_kernel")
        launch("normalise reductions", [parts.r, moments], [activated], "_normalise_kernel")
        reads = [activated, parts.packed_windows]
        writes = [parts.raw_slice(dims.ch3x3 + dims.ch5x5)]
        launch("B", reads, writes, "_branches_kernel", *parts.window_gemms)
        if many:
            launch("merge", [moments], [moments], "_merge_moments_kernel")
        launch("normalise", [raw, moments], [parts.y], "_normalise_kernel")
        self.save(layer, x, parts.r, raw, parts.index, moments)

        def backward() -> None:
            dz = parts.dz
            launch("sums", [gradient(parts.y), raw, moments], [moments], "_norm_sums_kernel")
            if many:
                launch("sums of sums", [moments], [moments], "_finish_kernel")
            reads = [gradient(parts.y), raw, moments]
            launch("normalise backward", reads, [dz], "_norm_grad_kernel")
            self._pack(layer, [parts])
            self._reduction_gradients(module, parts)
            if many:
                launch("sums of sums", [moments], [moments], "_finish_kernel")
            reads, writes = [parts.dr, parts.r, moments], [parts.dr, activated]
            launch("reductions backward", reads, writes, "_reduce_norm_grad_kernel")
            self._input_and_filter_gradients(module, parts)
            launch("F", [parts.partials], [gradient(parts.filters)], "_finish_kernel")

        self.later(backward)
        return parts.y

    # stem

    def stem(self, network: Network, x: Tensor) -> Tensor:
        """In training with biases one operator; else layer by layer, which launches as much in
        inference."""
        if network.norm or not self.training:
            return super().stem(network, x)
        return stem(self, self._launch, network, x)

    def conv(self, conv: Conv, x: Tensor) -> Tensor:
        """A convolution with its epilogue: A; M, the gradients of input and filter, F."""
        layer = conv.layer
        y = self.tensor(conv.name, conv.outputs, conv.c_out)
        raw = self.tensor(f"{conv.name} raw", conv.outputs, align_up(conv.c_out))
        mask = self.tensor(f"{conv.name} mask", conv.outputs, align_up(conv.c_out) // 8, 1)
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        packed = Tensor(f"{conv.name} packed", weight.bytes)
        image = x.name == IMAGE  # whose filter is read as it is
        taps = conv.kernel**2
        normalises = conv.norm and self.training
        slots = align_up(conv.c_out)
        moments = self.parameter(f"{conv.name} coefficients", COEFFICIENTS * slots, FP32)
        launch = self._launcher(layer)
        many = sums_in_stages(self.batch * conv.outputs)
        reads, kernel = [x, weight] if image else [x, packed], "_image_conv" if image else "_conv2d"
        keeps_packed = image and normalises  # what conv1 reads
        if keeps_packed or (image and many):
            kernel, reads = "_stem_conv", [packed_image(self, conv), packed]
            launch("pack", [x, weight], reads, "_stem_pack_kernel")
        elif self.training and not image:
            launch("pack", [weight], [packed], "_pack_kernel")
        writes = [raw] if normalises else [y, mask] if self.training else [y]
        forward = self.gemm(conv.outputs, conv.c_out, conv.c_in * taps, conv.kind)
        launch("conv", reads, writes, f"{kernel}_fwd_kernel", forward)
        if normalises:
            if many:
                launch("merge", [moments], [moments], "_merge_moments_kernel")
            launch("statistics", [moments], [moments], "_batch_statistics_kernel")
            launch("normalise", [raw, moments], [y], "_normalise_kernel")
        self.save(layer, x, *([raw, moments] if conv.norm else [mask]))
        self.save(layer, *(reads[:1] if keeps_packed else []))

        def backward() -> None:
            dz = gradient(y)
            if normalises:
                launch("sums", [dz, raw, moments], [moments], "_norm_sums_kernel")
                if many:
                    launch("sums of sums", [moments], [moments], "_finish_kernel")
                launch("normalise backward", [dz, raw, moments], [dz], "_norm_grad_kernel")
            else:
                launch("M", [dz, mask], [dz], "_relu_mask_kernel")
            if not image:
                data = self.gemm(conv.inputs, conv.c_in, conv.c_out * taps, conv.kind)
                launch("pack", [weight], [packed], "_pack_kernel")
                launch("data gradient", [dz, packed], [gradient(x)], "_conv2d_dgrad_kernel", data)
            filters = self.filters_gemm(conv.c_in * taps, conv.c_out, conv.outputs)
            partials = Tensor(f"{conv.name} partials", filters.splits * conv.weights * FP32)
            read, of, finish = x, "_image_conv" if image else "_conv2d", "_finish_kernel"
            if keeps_packed:
                read, of, finish = reads[0], "_packed", "_stem_finish_kernel"
            launch("filter gradient", [read, dz], [partials], f"{of}_wgrad_kernel", filters)
            if image and many:
                launch("sums of sums", [partials], [gradient(weight)], "_finish_kernel")
            launch("F", [partials], [gradient(weight)], finish)

        self.later(backward)
        return y

    def pool(self, pool: Pool, x: Tensor) -> Tensor:
        """Max pool and normalisation in one launch each way; 1-byte indices, gather backward."""
        layer, channels = pool.layer, pool.channels
        index = self.tensor(f"{layer} index", pool.outputs, align_up(channels), 1)
        y = self.tensor(f"{layer} output", pool.outputs, channels)
        # what the normalisation is recomputed from
        source = {
            "": [],
            "before": [x],
            "after": [self.tensor(f"{layer} pooled", pool.outputs, align_up(channels))],
        }[pool.lrn]
        kernel = {"": "_max_pool", "before": "_lrn_max_pool", "after": "_max_pool_lrn"}[pool.lrn]
        extra = [index, *(source if pool.lrn == "after" else [])] if self.training else []
        self._launch("pool", layer, [x], [y, *extra], kernel=f"{kernel}_fwd_kernel")
        self.save(layer, index, *source)

        def backward() -> None:
            masks = self._mask_of(x)
            reads, writes = [gradient(y), index, *source, *masks], [gradient(x)]
            name = f"{'_masked' if masks else ''}{kernel}_bwd_kernel"
            self._launch("pool backward", layer, reads, writes, kernel=name)

        self.later(backward)
        return y

    # classifiers

    def aux(self, aux: Aux, x: Tensor) -> None:
        """Pool and convolution; the linear layers are the library's."""
        y = self._norm_pool_conv(aux, x) if aux.conv.norm else self._pool_conv(aux, x)
        self.classify(aux, y)

    def _norm_pool_conv(self, aux: Aux, x: Tensor) -> Tensor:
        """The library's pool, our convolution; flattening channels last is a copy."""
        layer, pooling = aux.name, "_adaptive_avg_pool2d" if aux.adaptive else "avg_pool2d"
        pooled = self.tensor(f"{layer} pooled", aux.conv.inputs, aux.conv.c_in)
        self.op(pooling, layer, [x], [pooled])
        self.save(layer, x)

        def backward() -> None:
            self.op(f"{pooling}_backward", layer, [gradient(pooled)], [gradient(x)])
            self._give(layer, x)

        self.later(backward)
        y = self.conv(aux.conv, pooled)
        if aux.conv.outputs == 1:
            return y
        flat = Tensor(f"{layer} flat", y.bytes)
        self.op("clone", layer, [y], [flat])
        return flat

    def _pool_conv(self, aux: Aux, x: Tensor) -> Tensor:
        """Average pool, convolution and ReLU in one launch; forward keeps the pooled map."""
        layer, conv = aux.name, aux.conv
        pooled = self.tensor(f"{layer} pooled", conv.inputs, conv.c_in)
        y = self.tensor(conv.name, conv.outputs, conv.c_out)
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        packed = Tensor(f"{conv.name} packed", weight.bytes)
        launch = self._launcher(layer)
        launch("pack", [weight], [packed], "_pack_kernel")
        gemm = self.gemm(conv.outputs, conv.c_out, conv.c_in, "pointwise")
        launch("pool conv", [x, packed], [pooled, y], "_avg_pool_project_fwd_kernel", gemm)
        self.save(layer, pooled, y)

        def backward() -> None:
            dz = gradient(y)
            launch("pack", [weight], [packed], "_pack_kernel")
            filters = self.filters_gemm(conv.c_in, conv.c_out, conv.outputs)
            partials = Tensor(f"{layer} partials", filters.splits * conv.weights * FP32)
            data = self.gemm(conv.outputs, conv.c_in, conv.c_out, "pointwise")
            reads, writes = [dz, y, pooled, packed], [gradient(x), partials]
            kernel = "_avg_pool_project_bwd_kernel"
            launch("pool conv backward", reads, writes, kernel, data, filters)
            launch("finish", [partials], [gradient(weight)], "_finish_kernel")
            self._give(layer, x)

        self.later(backward)
        return y

    def head(self, classifier: Conv, pixels: int, x: Tensor) -> None:
        """Mean and dropout in one launch each way; the library draws what dropout keeps."""
        layer = classifier.layer
        mean = self.tensor("mean", 1, classifier.c_in)
        kept = [self.tensor(f"{layer} dropout mask", 1, classifier.c_in, 1)] * self.training
        if self.training:
            self.op("native_dropout", layer, [mean], [mean, *kept])
            self.save(layer, *kept)
        self._launch("mean", layer, [x, *kept], [mean], kernel="_global_pool_fwd_kernel")

        def backward() -> None:
            reads, writes = [gradient(mean), *kept, *self._mask_of(x)], [gradient(x)]
            self._launch("mean backward", layer, reads, writes, kernel="_global_pool_bwd_kernel")

        self.later(backward)
        self.linear(classifier, mean)

"""What every plan can do: walk through a module or a network, layer by layer."""

from abc import ABC, abstractmethod

from fused_inception.cost.layers import Aux, Conv, Module, Network, Pool
from fused_inception.cost.ops import Recorder, Tensor, gradient

IMAGE = "image"  # needs no gradient


class Plan(Recorder, ABC):
    """A way to run the layers; each method writes down a layer's forward and leaves its backward
    behind, and returns the layer's output."""

    @abstractmethod
    def conv(self, conv: Conv, x: Tensor) -> Tensor:
        """A convolution of the stem with bias (or BatchNorm) and ReLU."""

    @abstractmethod
    def pool(self, pool: Pool, x: Tensor) -> Tensor:
        """A max pool between blocks, with its local response normalisation."""

    @abstractmethod
    def module(self, module: Module, x: Tensor) -> Tensor:
        """An Inception module."""

    @abstractmethod
    def aux(self, aux: Aux, x: Tensor) -> None:
        """An auxiliary classifier, in training."""

    @abstractmethod
    def head(self, classifier: Conv, pixels: int, x: Tensor) -> None:
        """Global average pool over `pixels`, dropout, classifier."""

    def network(self, network: Network) -> None:
        """The whole column; the loss is not part of it."""
        x = self.stem(network, self.tensor(IMAGE, network.image_size**2, 3))
        for module in network.modules:
            x = self.module(module, x)
            if module.name in network.aux and self.training:
                self.aux(network.aux[module.name], x)
            if module.name in network.pools:
                x = self.pool(network.pools[module.name], x)
        self.head(network.classifier, network.last_pixels, x)

    def stem(self, network: Network, x: Tensor) -> Tensor:
        """All before the first module, layer by layer."""
        x = self.conv(network.conv1, x)
        x = self.pool(network.pool1, x)
        x = self.conv(network.conv2, x)
        x = self.conv(network.conv3, x)
        return self.pool(network.pool2, x)

    def linear(self, conv: Conv, x: Tensor) -> Tensor:
        """A linear layer of the library: one GEMM forward, two and the sum of the bias's gradient
        backward."""
        y = self.tensor(conv.name, 1, conv.c_out)
        weight = self.parameter(f"{conv.name} weight", conv.weights)
        bias = self.parameter(f"{conv.name} bias", conv.c_out)
        forward = [self.gemm(1, conv.c_out, conv.c_in, "pointwise")]
        self.op("addmm", conv.layer, [x, weight, bias], [y], forward)
        self.save(conv.layer, x)

        def backward() -> None:
            dy = gradient(y)
            data = [self.gemm(1, conv.c_in, conv.c_out, "pointwise")]
            filters = [self.filters_gemm(conv.c_in, conv.c_out, 1)]
            self.op("mm", conv.layer, [dy, weight], [gradient(x)], data)
            self.op("mm", conv.layer, [dy, x], [gradient(weight)], filters)
            self.op("sum", conv.layer, [dy], [gradient(bias)])

        self.later(backward)
        return y

    def classify(self, aux: Aux, x: Tensor) -> None:
        """The linear layers of an auxiliary classifier, of the library, with ReLU and dropout."""
        layer, hidden = aux.name, self.linear(aux.hidden, x)
        self.op("relu_", layer, [hidden], [hidden])
        self.save(layer, hidden)
        d_hidden = gradient(hidden)
        self.later(lambda: self.op("threshold_backward", layer, [d_hidden, hidden], [d_hidden]))
        self.linear(aux.classes, self.dropout(layer, hidden))

    def dropout(self, layer: str, x: Tensor) -> Tensor:
        """Dropout of the library, which keeps one byte an element."""
        y = Tensor(f"{layer} dropout", x.bytes)
        mask = Tensor(f"{layer} dropout mask", x.bytes // self.itemsize)
        self.op("native_dropout", layer, [x], [y, mask])
        self.save(layer, mask)
        self.later(
            lambda: self.op("native_dropout_backward", layer, [gradient(y), mask], [gradient(x)])
        )
        return y

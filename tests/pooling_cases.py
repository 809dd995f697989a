"""Named pooling and normalisation problems, and the operators in one form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_inception import reference
from fused_inception.geometry import Window


@dataclass(frozen=True)
class PoolingCase:
    """A window, the constants of a norm, and the shape of the input."""

    name: str
    shape: tuple[int, int, int, int]
    window: Window
    norm: tuple[int, float, float, float] = (5, 0.5, 0.75, 1.0)  # size, alpha, beta, k

    def options(self, op: str) -> list[Any]:
        """What operator `op` takes behind x, in its order."""
        window = self.window
        flat = [window.kernel, window.stride, window.padding, window.ceil_mode]
        return [*self.norm] * (op != "max_pool2d") + flat * (op != "local_response_norm")

    def out_shape(self, op: str) -> tuple[int, int, int, int]:
        """The shape of its result."""
        n, c, h, w = self.shape
        if op == "local_response_norm":
            return self.shape
        return n, c, self.window.out(h), self.window.out(w)

    def tensors(
        self, op: str, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """x, at least 0 and with ties at 0 as behind a ReLU, and dy; channels last."""
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(self.shape, generator=draw).relu()
        dy = torch.randn(self.out_shape(op), generator=draw)
        last = torch.channels_last
        return x.to(device, dtype, memory_format=last), dy.to(device, dtype, memory_format=last)

    def call(self, module: Any, op: str) -> Callable[[Tensor], Tensor]:
        """Operator `op` of `functional` or of `reference`, as a function of x."""
        norm = dict(zip(("size", "alpha", "beta", "k"), self.norm, strict=True))
        window = dict(
            kernel_size=self.window.kernel,
            stride=self.window.stride,
            padding=self.window.padding,
            ceil_mode=self.window.ceil_mode,
        )
        options: dict[str, Any] = {}
        if op != "max_pool2d":
            options |= norm
        if op != "local_response_norm":
            options |= window
        return lambda x: getattr(module, op)(x, **options)

    def plain(self, op: str, x: Tensor, dy: Tensor) -> list[Tensor]:
        """y and the gradient of x by the reference."""
        x = x.detach().requires_grad_()
        y = self.call(reference, op)(x)
        return [y.detach(), *torch.autograd.grad(y, x, dy)]


OPS = ("max_pool2d", "local_response_norm", "lrn_max_pool2d", "max_pool2d_lrn")

POOLING_CASES = (
    PoolingCase("one-pixel", (2, 24, 1, 1), Window(3, 2, 1)),
    PoolingCase("one-channel", (1, 1, 5, 4), Window(2, 2)),
    PoolingCase("empty-batch", (0, 8, 5, 6), Window(3, 2)),
    PoolingCase("conv1-of-the-paper", (1, 64, 9, 7), Window(3, 2, 0, True), (5, 1e-4, 0.75, 1.0)),
    PoolingCase("conv2-of-the-paper", (1, 192, 5, 4), Window(3, 2, 0, True), (5, 1e-4, 0.75, 1.0)),
    PoolingCase("odd-map", (1, 13, 15, 15), Window(3, 2, 1, True)),
    PoolingCase("pool4-of-torchvision", (2, 16, 7, 6), Window(2, 2, 0, True), (3, 0.3, 0.75, 2.0)),
    PoolingCase("stride-1", (1, 24, 6, 5), Window(3, 1, 1), (4, 0.5, 0.6, 1.5)),
    PoolingCase("windows-apart", (1, 8, 8, 9), Window(2, 3), (1, 1.0, 1.0, 0.5)),
    PoolingCase("large-window", (1, 8, 9, 7), Window(5, 2, 2), (2, 0.5, 0.5, 1.0)),
    PoolingCase("norm-beyond-the-channels", (1, 3, 3, 4), Window(2, 1), (9, 1.0, 0.75, 1.0)),
    PoolingCase("wide-norm", (1, 24, 4, 3), Window(2, 1), (21, 1.0, 0.75, 1.0)),
    # in fp32 the last vector of a pixel is padding
    PoolingCase("half-a-slot", (2, 12, 5, 6), Window(3, 2, 1)),
    PoolingCase("slots-and-a-half", (1, 20, 4, 5), Window(2, 1), (7, 1.0, 0.5, 1.0)),
    PoolingCase("beta-0", (1, 8, 4, 3), Window(2, 1), (3, 1.0, 0.0, 0.5)),
)

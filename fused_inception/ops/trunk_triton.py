"""The script of the trunk on the Triton path: those of its modules and pools in turn, but for
launch M, whose work is done by the launch that makes the gradient."""

from collections.abc import Iterator

from torch import Tensor

from fused_inception.ops import global_pool_triton, inception_triton, pooling_triton
from fused_inception.ops.inception_triton import Masked, ReluBelow, saved_like
from fused_inception.ops.layout import channels_last
from fused_inception.ops.problem import dims_of
from fused_inception.ops.trunk import CONVS, Trunk, of_modules

__all__ = ["backward", "forward", "saved_like"]


def forward(
    x: Tensor, filters: list[Tensor], biases: list[Tensor], trunk: Trunk, save: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The mean of the last module's output, [N, C, 1, 1]; outputs of the modules that are tapped;
    with `save` what `backward` needs beside x, these and the filters.

    Saved, module by module: what the module keeps, the winning taps of the pool behind it, 1 byte
    each, and the next one's input, unless it is a tapped output.
    """
    tapped: list[Tensor] = []
    saved: list[Tensor] = []
    modules = list(zip(of_modules(filters), of_modules(biases), strict=True))
    for i, (w, b) in enumerate(modules):
        x, kept = inception_triton.forward(x, w, b, save)
        saved += kept
        if i in trunk.taps:
            tapped.append(x)
        elif save and i not in trunk.pools and i + 1 < len(modules):
            saved.append(x)
        if i in trunk.pools:
            x, index = pooling_triton.max_pool2d(x, trunk.pools[i], save)
            if save:
                saved += [*index, x]
    return global_pool_triton.forward(x, None, 1.0), tapped, saved


class _Module:
    """One module as `backward` sees it."""

    def __init__(self, x: Tensor, filters: list[Tensor], kept: list[Tensor]) -> None:
        self.x = x
        self.filters = filters
        self.kept = kept
        self.dims = dims_of(filters)

    @property
    def mask(self) -> Tensor:
        """ReLU bits of its output."""
        return self.kept[2]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, C_OUT, H, W]."""
        n, _, height, width = self.x.shape
        return n, self.dims.out_channels, height, width


def backward(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    x: Tensor,
    tapped: list[Tensor],
    saved: list[Tensor],
    filters: list[Tensor],
    biases: list[Tensor],
    trunk: Trunk,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, all filters, all biases; 0 elements where `needs` says no.

    dy: [N, C, 1, 1] of any strides; d_taps: those of the tapped outputs, likewise; None is zero,
    and at least one is not None.
    """
    modules, indices = _modules(x, tapped, saved, filters, trunk)
    of_tap = dict(zip(trunk.taps, d_taps, strict=True))
    dx = x.new_empty(0)
    filter_grads, biases_grads = [x.new_empty(0)] * len(filters), [x.new_empty(0)] * len(biases)
    masked = None
    if dy is not None:
        last = modules[-1]
        masked = Masked(*global_pool_triton.backward_masked(dy, last.mask, last.output_shape))
    for i in reversed(range(len(modules))):
        module, below = modules[i], modules[i - 1] if i else None
        if masked is None:
            d_tap = of_tap.get(i)
            if d_tap is None:
                continue
            masked = inception_triton.mask_gradient(module.dims, d_tap, module.mask)
        own = slice(CONVS * i, CONVS * (i + 1))
        need_w, need_b = needs[1 : 1 + len(filters)], needs[1 + len(filters) :]
        need_below = needs[0] or any(need_w[: own.start]) or any(need_b[: own.start])
        relu = None
        if below is not None and i - 1 not in trunk.pools:
            other = of_tap.get(i - 1)
            relu = ReluBelow(below.mask, None if other is None else channels_last(other))
        dx, sums, gradients = inception_triton.backward_of_masked(
            masked, module.x, module.kept, module.filters, [b.dtype for b in biases[own]],
            [need_below, *need_w[own], *need_b[own]], relu,
        )  # fmt: skip
        filter_grads[own], biases_grads[own] = gradients[:CONVS], gradients[CONVS:]
        if below is None or not need_below:
            break
        if relu is None:
            window, index = trunk.pools[i - 1], indices[i - 1]
            dx, sums = pooling_triton.max_pool2d_backward_masked(
                dx, below.output_shape, index, window, below.mask
            )
        masked = Masked(dx, sums)
    return [dx if needs[0] else x.new_empty(0), *filter_grads, *biases_grads]


def _modules(
    x: Tensor, tapped: list[Tensor], saved: list[Tensor], filters: list[Tensor], trunk: Trunk
) -> tuple[list[_Module], dict[int, Tensor]]:
    """The modules, and the winning taps of the pools behind them, from what `forward` kept."""
    flat: Iterator[Tensor] = iter(saved)
    outputs = dict(zip(trunk.taps, tapped, strict=True))
    modules: list[_Module] = []
    indices: dict[int, Tensor] = {}
    of_each = of_modules(filters)
    for i, w in enumerate(of_each):
        modules.append(_Module(x, w, [next(flat) for _ in range(3)]))
        if i in trunk.pools:
            indices[i], x = next(flat), next(flat)
        elif i in outputs:
            x = outputs[i]
        elif i + 1 < len(of_each):
            x = next(flat)
    return modules, indices

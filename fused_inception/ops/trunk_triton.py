"""The script of the trunk on the Triton path: those of its modules and pools in turn, but for
launch M, whose work is done by the launch that makes the gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fused_inception.geometry import InceptionDims, finished_together
from fused_inception.kernels.finish import Unfinished, launch_finish
from fused_inception.kernels.gradients import partial_bytes
from fused_inception.ops import global_pool_triton, inception_triton, pooling_triton
from fused_inception.ops.inception_triton import Masked, ReluBelow
from fused_inception.ops.layout import channels_last
from fused_inception.ops.problem import dims_of, problem_of
from fused_inception.ops.replay import replayed
from fused_inception.ops.stages import CONVS, Trunk, of_modules
from fused_inception.tuning import chosen, heuristic


def forward(
    x: Tensor,
    filters: list[Tensor],
    biases: list[Tensor],
    kept: Tensor | None,
    scale: float,
    trunk: Trunk,
    save_from: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What is behind the last module, a map or the mean [N, C, 1, 1], of which dropout has `kept`
    some; outputs of the modules that are tapped; what `backward` needs beside x, these and the
    filters, of the modules from number `save_from` on.

    Saved, module by module: what the module keeps, the winning taps of the pool behind it, 1 byte
    each, and the next one's input, unless it is a tapped output.
    """
    modules = of_modules(filters)
    dims = [*map(dims_of, modules)]
    packed = inception_triton.packed_modules(
        dims, modules, of_modules(biases), x.dtype, save=save_from < len(modules)
    )
    return _of_packed(x, dims, packed, kept, scale, trunk, save_from)


@replayed
def _of_packed(
    x: Tensor,
    dims: list[InceptionDims],
    packed: list[inception_triton.Packed],
    kept: Tensor | None,
    scale: float,
    trunk: Trunk,
    save_from: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """`forward`, with filters and biases of `packed_modules`."""
    tapped: list[Tensor] = []
    saved: list[Tensor] = []
    for i, of in enumerate(dims):
        saves, next_saves = i >= save_from, save_from <= i + 1 < len(dims)
        x, kept_of_module = inception_triton.forward_of_packed(x, of, packed[i], saves)
        saved += kept_of_module
        if i in trunk.pools:
            x, index = pooling_triton.max_pool2d(x, trunk.pools[i], saves)
            saved += index
        if i in trunk.taps:
            tapped.append(x)
        elif next_saves:
            saved.append(x)
    if trunk.mean:
        x = global_pool_triton.forward(x, kept, scale)
    return x, tapped, saved


class _Module:
    """One module as `backward` sees it."""

    def __init__(self, x: Tensor, filters: list[Tensor], kept: list[Tensor]) -> None:
        self.x = x
        self.filters = filters
        self.kept = kept
        self.dims = dims_of(filters)
        self.index: Tensor | None = None  # winning taps of the pool behind it

    @property
    def mask(self) -> Tensor:
        """ReLU bits of its output."""
        return self.kept[2]

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, C_OUT, H, W]."""
        n, _, height, width = self.x.shape
        return n, self.dims.out_channels, height, width


class Memory:
    """What forward left."""

    def __init__(
        self,
        x: Tensor,
        filters: list[Tensor],
        tapped: list[Tensor],
        saved: list[Tensor],
        kept: Tensor | None,
        scale: float,
        trunk: Trunk,
        save_from: int,
    ) -> None:
        self.trunk = trunk
        self.kept = kept
        self.scale = scale
        self.first = save_from
        flat: Iterator[Tensor] = iter(saved)
        taps = [at for at in trunk.taps if at >= save_from - 1]
        outputs = dict(zip(taps, tapped, strict=True))
        self.modules: dict[int, _Module] = {}
        of_each = of_modules(filters)
        if save_from > 0:
            x = outputs[save_from - 1] if save_from - 1 in outputs else next(flat)
        for i in range(save_from, len(of_each)):
            module = _Module(x, of_each[i], [next(flat) for _ in range(3)])
            self.modules[i] = module
            if i in trunk.pools:
                module.index = next(flat)
            if i in outputs:
                x = outputs[i]
            elif i + 1 < len(of_each):
                x = next(flat)

    def masked(self, i: int, dy: Tensor) -> Masked:
        """The gradient behind the ReLU of module i, from that of what is behind the module."""
        module = self.modules[i]
        if module.index is not None:
            window = self.trunk.pools[i]
            found = pooling_triton.max_pool2d_backward_masked(
                dy, module.output_shape, module.index, window, module.mask
            )
            return Masked(*found)
        if self.trunk.mean and i == max(self.modules):
            drawn = self.kept, self.scale
            shape = module.output_shape
            return Masked(*global_pool_triton.backward_masked(dy, *drawn, shape, module.mask))
        return inception_triton.mask_gradient(module.dims, dy, module.mask)


def backward(
    dy: Tensor | None,
    d_taps: list[Tensor | None],
    memory: Memory,
    biases_dtype: list[torch.dtype],
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, all filters, all biases; 0 elements where `needs` says no.

    dy: of what is behind the last module; d_taps: those of the tapped outputs; of any strides, None
    is zero, and at least one is not None.
    """
    count = len(biases_dtype)
    none = memory.modules[memory.first].x.new_empty(0)
    dx, filter_grads, bias_grads = none, [none] * count, [none] * count
    of_tap = dict(zip(memory.trunk.taps, d_taps, strict=True))
    # where gradients begin
    i, begin = max(memory.modules), dy
    while begin is None:
        begin = of_tap.get(i)
        i -= begin is None
    masked = memory.masked(i, begin)
    reached = _needs_of_modules(i, count, needs)
    packed = _packed(memory, reached, none.dtype)
    unfinished: list[Unfinished] = []
    sizes = [_partial_bytes(memory.modules[i]) for i in reached]
    ends = finished_together(sizes)
    for at, (i, needs_of) in enumerate(reached.items()):
        module = memory.modules[i]
        relu = None
        if i > 0 and needs_of[0] and i - 1 not in memory.trunk.pools:
            other = of_tap.get(i - 1)
            mask = memory.modules[i - 1].mask
            relu = ReluBelow(mask, None if other is None else channels_last(other))
        own = slice(CONVS * i, CONVS * (i + 1))
        found = inception_triton.backward_of_masked(
            module.dims, masked, module.x, module.kept, module.filters, packed.get(i),
            biases_dtype[own], needs_of, relu,
        )  # fmt: skip
        filter_grads[own], bias_grads[own] = found.parameters[:CONVS], found.parameters[CONVS:]
        unfinished += found.unfinished
        if at in ends:
            launch_finish(unfinished, heuristic.finish_config())
            unfinished = []
        dx = found.dx
        if i > 0 and needs_of[0]:
            masked = Masked(dx, found.sums) if relu is not None else memory.masked(i - 1, dx)
    return [dx if needs[0] else none, *filter_grads, *bias_grads]


def _partial_bytes(module: _Module) -> int:
    """Of the module's partial sums: of its batch's bucket, so that batches of one bucket launch the
    same kernels."""
    ops, target, pixels = problem_of(module.x)
    return partial_bytes(module.dims, chosen.wgrad_config(module.dims, pixels, ops, target))


def _needs_of_modules(last: int, count: int, needs: list[bool]) -> dict[int, list[bool]]:
    """Of each module that a gradient reaches, from number `last` down, which gradients are needed:
    of its input, six filters, six biases."""
    need_x, need_w, need_b = needs[0], needs[1 : 1 + count], needs[1 + count :]
    found = {}
    for i in range(last, -1, -1):
        own = slice(CONVS * i, CONVS * (i + 1))
        below = need_x or any(need_w[: own.start]) or any(need_b[: own.start])
        found[i] = [below, *need_w[own], *need_b[own]]
        if not below:
            break
    return found


def _packed(memory: Memory, needs: dict[int, list[bool]], dtype: torch.dtype) -> dict[int, Tensor]:
    """Filters for the data gradients of the modules that compute any."""
    of = [i for i, needs_of in needs.items() if inception_triton.reads_packed(needs_of)]
    if not of:
        return {}
    modules = [memory.modules[i] for i in of]
    packed = inception_triton.packed_for_gradients(
        [module.dims for module in modules], [module.filters for module in modules], dtype
    )
    return dict(zip(of, packed, strict=True))

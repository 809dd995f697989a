"""The functions with PyTorch's own differentiable operators: any device, any floating dtype; but
for local response normalisation, see `pooling_aten`.

What runs where no kernel of ours does. PyTorch records the gradients, so that a step costs what the
unfused layers cost: an operator of ours with a gradient of its own would keep all that it saved
until its end, where PyTorch frees it map by map.
"""

import weakref
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_inception.geometry import AvgWindow, Window
from fused_inception.ops.layout import channels_last
from fused_inception.ops.nested import tensors_in
from fused_inception.ops.registration import autocasts, begin_gradients
from fused_inception.ops.running import Running


class _Strides(torch.autograd.Function):
    """The tensors themselves; their gradients once, in the tensors' own strides."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.strides = [t.stride() if _is_dense(t) else None for t in tensors]
        ctx.set_materialize_grads(False)
        # not the tensors, of which autograd would make views: where one is then written to, before
        # its gradient is taken, it would complain about those, instead of naming what was written
        return tuple([t.detach() for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(map(_in_strides, grads, ctx.strides))


def _in_strides(grad: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    if grad is None or strides is None or grad.stride() == strides:
        return grad
    if grad.is_contiguous() and grad.is_contiguous(memory_format=torch.channels_last):
        return grad.as_strided(grad.shape, strides)  # of 1x1: only strides of sizes 1 differ
    like = torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device)
    return like.copy_(grad)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)


class _Once(torch.autograd.Function):
    """A gradient that no other can be taken of: the kernels have no second derivative either, so
    that what runs here runs there."""

    @staticmethod
    def forward(ctx: Any, name: str, dy: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return dy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(
            f"double backward is not implemented for fused_inception.functional.{ctx.name}; "
            f"fused_inception.reference.{ctx.name} has gradients of any order"
        )


def _function(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What the functions here share: no autocast inside, as the caller has cast `x`; exact strides
    of a map, and of the gradients of x and of the filters; one derivative."""

    @wraps(of)
    def run(x: Tensor, filters: Sequence[Tensor] = (), *arguments: Any) -> Tensor:
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return run(x, filters, *arguments)
        tensors, trains = [x, *filters], False
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tensors, trains = _trained(of.__name__, tensors), True
        x, *filters = tensors
        y = of(x, [w if w.dtype == x.dtype else w.to(x.dtype) for w in filters], *arguments)
        y = channels_last(y) if y.dim() == 4 else y
        if trains and y.requires_grad:
            _differentiate_once(of.__name__, y, tensors, arguments)
        return y

    return run


def _trained(name: str, tensors: list[Tensor]) -> list[Tensor]:
    """x and filters, behind `_Strides` where PyTorch might give their gradients other strides."""
    needs = [t.requires_grad for t in tensors]
    if True not in needs:
        return tensors
    begin_gradients(f"fused_inception.functional.{name}")
    at = [
        i
        for i, t in enumerate(tensors)
        if needs[i] and not (_keeps_strides(t) and (i or not t.is_contiguous()))
    ]
    if at:
        tensors = [*tensors]
        for i, t in zip(at, _Strides.apply(*[tensors[i] for i in at]), strict=True):
            tensors[i] = t
    return tensors


def _keeps_strides(t: Tensor) -> bool:
    """Whether convolutions give the gradient of `t` its strides: on a CPU where they are exactly
    channels last; cuDNN has no channels last in fp64. The sum of several has them only if nothing
    else would do."""
    if not t.is_cpu or t.dim() != 4:
        return False
    _, c, h, w = t.shape
    return t.stride() == (h * w * c, 1, w * c, c)


def _differentiate_once(
    name: str, y: Tensor, tensors: Sequence[Tensor], arguments: Sequence[Any]
) -> None:
    """Let the gradient of `y` be `_Once`, where it is to be differentiated: of all that `y` is made
    of and that the graph still holds. Where hooks of saved tensors keep x elsewhere, its sources
    have PyTorch's second derivative."""
    sources = [*map(weakref.ref, tensors)]

    def once(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
        if not torch.is_grad_enabled():
            return None
        alive = [t for t in (source() for source in sources) if t is not None]
        made_of = (*alive, *tensors_in(arguments))
        return tuple(None if dy is None else _Once.apply(name, dy, *made_of) for dy in grads)

    node: Any = y.grad_fn
    node.register_prehook(once)


@_function
def conv2d_relu(
    x: Tensor, filters: Sequence[Tensor], bias: Tensor, stride: int, padding: int
) -> Tensor:
    """One filter."""
    return _conv_relu(x, filters[0], bias, stride, padding)


@_function
def inception(x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""

    def layer(i: int, source: Tensor) -> Tensor:
        return _conv_relu(source, filters[i], biases[i], 1, filters[i].shape[-1] // 2)

    return _branches(x, layer)


@_function
def inception_naive(x: Tensor, filters: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """1x1, 3x3, 5x5; the pool as it is."""
    maps = [_conv_relu(x, w, b, 1, w.shape[-1] // 2) for w, b in zip(filters, biases, strict=True)]
    return torch.cat([*maps, F.max_pool2d(x, 3, 1, 1)], dim=1)


@_function
def inception_bn(
    x: Tensor,
    filters: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: float,
) -> Tensor:
    """`inception` with the batch's statistics in place of biases; the running ones are updated."""

    def layer(i: int, source: Tensor) -> Tensor:
        z = F.conv2d(source, filters[i], None, 1, filters[i].shape[-1] // 2)
        return _norm_relu(z, i, gammas, betas, running, eps)

    running.advance()
    y = _branches(x, layer)
    running.mark()
    return y


@_function
def conv2d_bn_relu(
    x: Tensor,
    filters: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: float,
    stride: int,
    padding: int,
) -> Tensor:
    """The same of one filter."""
    running.advance()
    z = F.conv2d(x, filters[0], None, stride, padding)
    y = _norm_relu(z, 0, gammas, betas, running, eps)
    running.mark()
    return y


@_function
def max_pool2d(x: Tensor, filters: Sequence[Tensor], window: Window) -> Tensor:
    """No filters."""
    return F.max_pool2d(x, window.kernel, window.stride, window.padding, ceil_mode=window.ceil_mode)


@_function
def global_avg_pool2d(
    x: Tensor, filters: Sequence[Tensor], kept: Tensor | None, scale: float
) -> Tensor:
    """No filters; [N, C, 1, 1] as torch's dropout leaves it. Means of 16 bits are accumulated in
    fp32."""
    y = x.mean((2, 3), keepdim=True)
    return y if kept is None else y * kept[:, :, None, None] * scale


@_function
def avg_pool2d_conv1x1_relu(
    x: Tensor, filters: Sequence[Tensor], bias: Tensor, window: AvgWindow
) -> Tensor:
    """One filter; [N, C_out * H_out * W_out]."""
    if window.grid:
        pooled = F.adaptive_avg_pool2d(x, window.grid)
    else:
        pooled = F.avg_pool2d(x, window.kernel, window.stride, ceil_mode=window.ceil_mode)
    return torch.flatten(_conv_relu(pooled, filters[0], bias, 1, 0), 1)


def _branches(x: Tensor, layer: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Four branches of convolutions, `layer(i, input)`, side by side."""
    return torch.cat(
        [
            layer(0, x),
            layer(2, layer(1, x)),
            layer(4, layer(3, x)),
            layer(5, F.max_pool2d(x, 3, 1, 1)),
        ],
        dim=1,
    )


def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, _as(bias, x.dtype), stride, padding).relu_()


def _norm_relu(
    z: Tensor,
    layer: int,
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running: Running,
    eps: float,
) -> Tensor:
    # PyTorch mixes fp32 parameters with 16-bit maps, and nothing else
    dtype = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    gamma, beta = (_as(of[layer], dtype) if of else None for of in (gammas, betas))
    if not z.numel():  # there is nothing to take the statistics of
        return (z if gamma is None or beta is None else z * _wide(gamma, z) + _wide(beta, z)).relu()
    mean, var = running.scratch(layer, dtype)
    momentum = running.weight_of_new(layer)
    # not F.batch_norm, which checks first: the caller has
    cudnn = torch.backends.cudnn.enabled
    y = torch.batch_norm(z, gamma, beta, mean, var, True, momentum, eps, cudnn)
    running.take(layer, mean, var)
    return y.relu_()


def _wide(vector: Tensor, z: Tensor) -> Tensor:
    return _as(vector, z.dtype)[:, None, None]


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    # a call of `to` costs some microseconds, also where there is nothing to do
    return t if t.dtype == dtype else t.to(dtype)

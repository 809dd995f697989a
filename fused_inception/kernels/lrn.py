"""Local response normalisation across channels, forward and backward.

    y[c] = x[c] * s[c] ** -beta        s[c] = k + alpha / size * sum of x[c'] ** 2 over the window

The window of channel c reaches from c - size // 2 to c + (size - 1) // 2. A window moves along the
channels, so each vector reads its neighbours too, from the cache, and keeps all sums in registers.
A product with a banded matrix would do the same on tensor cores, but one infinite channel would
spoil the others of its tile, and squares don't fit 16-bit operands.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.geometry import ALIGN
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.vectors import (
    join_lanes,
    lanes_of,
    load_lanes,
    offsets,
    program_vectors,
    store_tile,
)
from fused_inception.tuning.configs import VectorConfig


@triton.jit
def powers(s, BETA: tl.constexpr):
    """(s ** -BETA, 1 / s)."""
    if BETA == 0.75:
        r = tl.rsqrt(s)
        return r * tl.sqrt(r), r * r
    elif BETA == 0.0:  # also where s is 0, infinite or NaN
        return tl.zeros_like(s) + 1.0, 1.0 / s
    elif BETA == 0.5:
        r = tl.rsqrt(s)
        return r, r * r
    elif BETA == 1.0:  # as well below 0
        return 1.0 / s, 1.0 / s
    elif BETA % 1 == 0:  # these, too
        power = tl.exp2(tl.log2(tl.abs(s)) * -BETA)
        return tl.where((s < 0) & (BETA % 2 == 1), -power, power), 1.0 / s
    else:
        return tl.exp2(tl.log2(s) * -BETA), 1.0 / s


@triton.jit
def window_sum(lanes, first: tl.constexpr, SIZE: tl.constexpr):
    """Sum of SIZE lanes."""
    total = lanes[first]
    for i in tl.static_range(1, SIZE):
        total += lanes[first + i]
    return total


@triton.jit
def squares(lanes, FIRST: tl.constexpr, END: tl.constexpr):
    """Squares of the lanes in [FIRST, END)."""
    result = ()
    for i in tl.static_range(FIRST, END):
        result = result + (lanes[i] * lanes[i],)
    return result


@triton.jit
def normalise(
    x,  # lanes with HALO groups of neighbours on both sides
    alpha_mean,  # alpha / SIZE
    k,
    SIZE: tl.constexpr,
    BETA: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """x * s ** -BETA, [BLOCK_V, LANES]."""
    FIRST: tl.constexpr = HALO * LANES
    q = squares(x, FIRST - SIZE // 2, FIRST + LANES + (SIZE - 1) // 2)
    y = ()
    for i in tl.static_range(LANES):
        power, _ = powers(k + alpha_mean * window_sum(q, i, SIZE), BETA)
        y = y + (x[FIRST + i] * power,)
    return join_lanes(y, BLOCK_V, LANES)


@triton.jit
def normalise_grad(
    x,  # lanes with HALO_X groups of neighbours on both sides
    dy,  # lanes with HALO_DY groups
    group,
    alpha_mean,
    k,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BETA: tl.constexpr,
    HALO_X: tl.constexpr,
    HALO_DY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradient of x, [BLOCK_V, LANES].

    dx[c] = dy[c] s[c]^-b - 2 b alpha / size x[c] sum of dy[i] x[i] s[i]^(-b - 1), over the channels
    i whose windows contain c.
    """
    LOW: tl.constexpr = SIZE // 2
    HIGH: tl.constexpr = (SIZE - 1) // 2
    # the windows that contain the vector's channels begin HIGH before it, and see LOW further
    q = squares(x, HALO_X * LANES - HIGH - LOW, (HALO_X + 1) * LANES + LOW + HIGH)
    scaled = ()
    t = ()
    for i in tl.static_range(-HIGH, LANES + LOW):
        s = k + alpha_mean * window_sum(q, i + HIGH, SIZE)
        power, inverse = powers(s, BETA)
        own = dy[HALO_DY * LANES + i] * power
        term = own * x[HALO_X * LANES + i] * inverse
        if i < 0 or i >= LANES or C % LANES != 0:
            # a channel that is none has no window; its s may be 0
            channel = group * LANES + i
            term = tl.where((channel >= 0) & (channel < C), term, 0.0)
        scaled = scaled + (own,)
        t = t + (term,)
    dx = ()
    for i in tl.static_range(LANES):
        if BETA == 0.0:
            dx = dx + (scaled[HIGH + i],)
        else:
            total = window_sum(t, i, SIZE)
            dx = dx + (scaled[HIGH + i] - 2.0 * BETA * alpha_mean * x[HALO_X * LANES + i] * total,)
    return join_lanes(dx, BLOCK_V, LANES)


@triton.jit(do_not_specialize=["n_pixels", "x_stride8"])
def _lrn_fwd_kernel(
    # tensors
    x_ptr,  # [P, 8 x_stride8]
    y_ptr,  # [P, C]
    # sizes
    n_pixels,
    # strides
    x_stride8,
    # problem
    alpha_mean,  # alpha / SIZE
    k,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BETA: tl.constexpr,
    HALO: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """y = x * s ** -BETA; one program per BLOCK_V vectors."""
    pixel, group = program_vectors(GROUPS, BLOCK_V)
    inside = pixel < n_pixels
    rows = x_ptr + offsets(pixel, group, x_stride8 * 8, LANES)
    x = load_lanes(rows, inside, group, GROUPS, HALO, BLOCK_V, LANES)
    y_tile = normalise(x, alpha_mean, k, SIZE, BETA, HALO, BLOCK_V, LANES)
    store_tile(y_ptr, y_tile, pixel, group, inside, C, BLOCK_V, LANES)


@triton.jit(do_not_specialize=["n_pixels", "x_stride8", "dy_stride8"])
def _lrn_bwd_kernel(
    # tensors
    x_ptr,  # [P, 8 x_stride8]
    dy_ptr,  # [P, 8 dy_stride8]
    dx_ptr,  # [P, C]
    # sizes
    n_pixels,
    # strides
    x_stride8,
    dy_stride8,
    # problem
    alpha_mean,  # alpha / SIZE
    k,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BETA: tl.constexpr,
    HALO_X: tl.constexpr,
    HALO_DY: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradient of x, which says `normalise_grad`; one program per BLOCK_V vectors."""
    pixel, group = program_vectors(GROUPS, BLOCK_V)
    inside = pixel < n_pixels
    x_rows = x_ptr + offsets(pixel, group, x_stride8 * 8, LANES)
    dy_rows = dy_ptr + offsets(pixel, group, dy_stride8 * 8, LANES)
    x = load_lanes(x_rows, inside, group, GROUPS, HALO_X, BLOCK_V, LANES)
    dy = load_lanes(dy_rows, inside, group, GROUPS, HALO_DY, BLOCK_V, LANES)
    dx_tile = normalise_grad(
        x, dy, group, alpha_mean, k, C, SIZE, BETA, HALO_X, HALO_DY, BLOCK_V, LANES
    )
    store_tile(dx_ptr, dx_tile, pixel, group, inside, C, BLOCK_V, LANES)


@dataclass(frozen=True)
class Norm:
    """The constants of the formula."""

    size: int
    alpha: float
    beta: float
    k: float

    @property
    def alpha_mean(self) -> float:
        """The factor of the sum of squares."""
        return self.alpha / self.size

    def constants(self, lanes: int, *, backward: bool) -> dict[str, int | float]:
        """The formula's part of a kernel's constants.

        A window sees `size // 2` channels to one side; backward it sees the windows of those too.
        """
        reach = cdiv(self.size // 2, lanes)
        halos = dict(HALO_X=cdiv(self.size - 1, lanes), HALO_DY=reach)
        return dict(SIZE=self.size, BETA=self.beta, **(halos if backward else dict(HALO=reach)))


def launch_lrn_fwd(x: torch.Tensor, y: torch.Tensor, norm: Norm, config: VectorConfig) -> None:
    """Fill `y`, [N, C, H, W] exactly channels last, from `x` as `layout.for_kernels` gives it."""
    n, c, height, width = y.shape
    n_pixels, lanes = n * height * width, lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    run(
        _lrn_fwd_kernel,
        (cdiv(n_pixels * groups, config.block_v),),
        (x, y, n_pixels, x.stride(3) // ALIGN, norm.alpha_mean, norm.k),
        dict(
            C=c,
            GROUPS=groups,
            **norm.constants(lanes, backward=False),
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )


def launch_lrn_bwd(
    x: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor, norm: Norm, config: VectorConfig
) -> None:
    """Fill `dx`, [N, C, H, W] exactly channels last; `x`, `dy` as `layout.for_kernels` gives
    them."""
    n, c, height, width = dx.shape
    n_pixels, lanes = n * height * width, lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    run(
        _lrn_bwd_kernel,
        (cdiv(n_pixels * groups, config.block_v),),
        (
            *(x, dy, dx, n_pixels, x.stride(3) // ALIGN, dy.stride(3) // ALIGN),
            *(norm.alpha_mean, norm.k),
        ),
        dict(
            C=c,
            GROUPS=groups,
            **norm.constants(lanes, backward=True),
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )

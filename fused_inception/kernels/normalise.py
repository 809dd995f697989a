"""BatchNorm in training: one pass over raw results that normalises, applies ReLU, and stores each
branch in its slice of the concatenation."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.geometry import even_share
from fused_inception.kernels.batch_norm import (
    NormParameters,
    coefficients,
    store_norm,
    update_running,
)
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import branch_constants
from fused_inception.kernels.moments import Moments, merge_moments
from fused_inception.kernels.tiles import batch_norm, channel_of, load_norms, relu
from fused_inception.tuning.configs import NormConfig


@triton.jit(do_not_specialize=["n_pixels", "chunk", "rows3", "rows5", "momentum", "eps"])
def _normalise_kernel(
    # tensors
    z_ptr,  # [P, SLOTS] raw results
    norm_ptr,  # [4, NORM_STRIDE] fp32; with FINISH those of the middle branches are written here
    y_ptr,  # [P, C_OUT]
    # with FINISH, of the second and the third branch
    moments3_ptr,  # [rows3, 3, slots] fp32
    moments5_ptr,
    gamma3_ptr,  # [C] each, or None
    gamma5_ptr,
    beta3_ptr,
    beta5_ptr,
    mean3_ptr,  # [C] each, running, or None
    mean5_ptr,
    var3_ptr,
    var5_ptr,
    batches3_ptr,  # [] int64 each, or None
    batches5_ptr,
    # sizes
    n_pixels,
    chunk,  # pixels of one program, a multiple of BLOCK_P
    rows3,
    rows5,
    momentum,
    eps,
    # problem
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    SLOTS: tl.constexpr,
    GAP: tl.constexpr,  # channels in norm between the first branch and the next
    NORM_STRIDE: tl.constexpr,
    FINISH: tl.constexpr,
    TILE_3: tl.constexpr,
    TILE_5: tl.constexpr,
    SKIP: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[p, channel] = relu(batch norm(z[p, slot])); one program per (chunk of pixels, block of
    slots).

    With FINISH every program merges the moments of its channels of the second and third branch
    first, which saves a launch; those of the first chunk store what comes of it.
    """
    C_OUT: tl.constexpr = N1 + N3 + N5 + NP
    first = tl.program_id(1) * BLOCK_C
    slot = first + tl.arange(0, BLOCK_C)
    channel, is_channel = channel_of(slot, N1, N3, N5, NP, SLOT_3, SLOT_5, SLOT_P, SLOTS)
    in_norm = slot + tl.where(slot >= SLOT_3, GAP, 0)
    if FINISH:
        of3 = (slot >= SLOT_3) & (slot < SLOT_5)
        of5 = (slot >= SLOT_5) & (slot < SLOT_P)
        # a block with no channel of a branch has nothing to merge
        some3 = tl.where((first < SLOT_5) & (first + BLOCK_C > SLOT_3), rows3, 0)
        some5 = tl.where((first < SLOT_P) & (first + BLOCK_C > SLOT_5), rows5, 0)
        mean3, dev3 = merge_moments(
            moments3_ptr, some3, n_pixels, slot - SLOT_3, of3,
            TILE_3, SLOT_5 - SLOT_3, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        mean5, dev5 = merge_moments(
            moments5_ptr, some5, n_pixels, slot - SLOT_5, of5,
            TILE_5, SLOT_P - SLOT_5, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        real3, real5 = of3 & is_channel, of5 & is_channel
        inverse3, scale3, beta3 = coefficients(
            dev3, n_pixels, gamma3_ptr, beta3_ptr, eps, slot - SLOT_3, real3
        )
        inverse5, scale5, beta5 = coefficients(
            dev5, n_pixels, gamma5_ptr, beta5_ptr, eps, slot - SLOT_5, real5
        )
        if tl.program_id(0) == 0:
            store_norm(norm_ptr, mean3, inverse3, scale3, beta3, in_norm, of3, NORM_STRIDE)
            store_norm(norm_ptr, mean5, inverse5, scale5, beta5, in_norm, of5, NORM_STRIDE)
            update_running(
                mean3, dev3, n_pixels, mean3_ptr, var3_ptr, batches3_ptr,
                momentum, slot - SLOT_3, real3, SKIP,
            )  # fmt: skip
            update_running(
                mean5, dev5, n_pixels, mean5_ptr, var5_ptr, batches5_ptr,
                momentum, slot - SLOT_5, real5, SKIP,
            )  # fmt: skip
        ready = is_channel & ((of3 | of5) == 0)
        mean, _, scale, beta = load_norms(norm_ptr, in_norm, ready, NORM_STRIDE)
        mean = tl.where(of3, mean3, tl.where(of5, mean5, mean))
        scale = tl.where(of3, scale3, tl.where(of5, scale5, scale))
        beta = tl.where(of3, beta3, tl.where(of5, beta5, beta))
    else:
        mean, _, scale, beta = load_norms(norm_ptr, in_norm, is_channel, NORM_STRIDE)
    local_p = tl.arange(0, BLOCK_P)
    z_offs = (local_p * SLOTS)[:, None] + slot[None, :]
    y_offs = (local_p * C_OUT)[:, None] + channel[None, :]
    for start in tl.range(0, chunk, BLOCK_P):
        p0 = (tl.program_id(0) * chunk + start).to(tl.int64)
        mask = (p0 + local_p < n_pixels)[:, None] & is_channel[None, :]
        z_tile = tl.load(z_ptr + p0 * SLOTS + z_offs, mask=mask, other=0.0)
        y_tile = relu(batch_norm(z_tile, mean, scale, beta))
        tl.store(y_ptr + p0 * C_OUT + y_offs, y_tile, mask=mask)


@dataclass(frozen=True)
class Finish:
    """Two BatchNorms that the pass over their results finishes."""

    moments: tuple[Moments, Moments]
    layers: tuple[NormParameters, NormParameters]
    momentum: float
    eps: float
    skip: bool


def launch_normalise(
    widths: tuple[int, ...],
    z: torch.Tensor,
    norm: torch.Tensor,
    gap: int,
    y: torch.Tensor,
    config: NormConfig,
    finish: Finish | None = None,
) -> None:
    """Fill `y`, [N, sum of widths, H, W] exactly channels last, with relu(batch norm(z)).

    z: [N, slots, H, W] dense channels last, up to four branches side by side, each at a multiple of
    8 channels; norm: [4, channels], the branches behind the first one `gap` columns further. With
    `finish` the columns of the second and third branch are filled from their moments on the way.
    """
    n, _, height, width = z.shape
    n_pixels = n * height * width
    vectors: list[torch.Tensor | None] = [None] * 12
    sizes: tuple[float, ...] = (0, 0, 0.0, 0.0)
    if finish is not None:
        moments, layers = finish.moments, finish.layers
        vectors = [
            *(m.partial for m in moments),
            *(layer.gamma for layer in layers),
            *(layer.beta for layer in layers),
            *(layer.running_mean for layer in layers),
            *(layer.running_var for layer in layers),
            *(layer.batches for layer in layers),
        ]
        sizes = (*(m.partial.shape[0] for m in moments), finish.momentum, finish.eps)
    chunk = even_share(n_pixels, config.pixels, config.block_p)
    run(
        _normalise_kernel,
        (cdiv(n_pixels, chunk), cdiv(z.shape[1], config.block_c)),
        (z, norm, y, *vectors, n_pixels, chunk, *sizes),
        dict(
            **branch_constants(widths),
            GAP=gap,
            NORM_STRIDE=norm.stride(0),
            FINISH=finish is not None,
            TILE_3=1 if finish is None else finish.moments[0].tile,
            TILE_5=1 if finish is None else finish.moments[1].tile,
            SKIP=finish is not None and finish.skip,
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )

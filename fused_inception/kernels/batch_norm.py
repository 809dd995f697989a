"""BatchNorm of raw convolution results in training: statistics, then one pass that normalises.

Coefficients of all channels lie in one buffer [4, channels in the order of `layout.PackedLayout`'s
biases]: mean, inverse deviation, scale (gamma times inverse deviation), beta.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.moments import Moments, merge_moments
from fused_inception.tuning.configs import StatisticsConfig


@triton.jit
def coefficients(deviations, n_pixels, gamma_ptr, beta_ptr, eps, offs_c, mask_c):
    """(inverse deviation, scale, beta); scale and beta 0 outside of the mask."""
    inverse = 1.0 / tl.sqrt_rn(deviations / n_pixels.to(tl.float32) + eps)
    if gamma_ptr is None:
        scale = tl.where(mask_c, inverse, 0.0)
        beta = tl.zeros_like(inverse)
    else:
        scale = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32) * inverse
        beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    return inverse, scale, beta


@triton.jit
def store_norm(norm_ptr, mean, inverse, scale, beta, offs_c, mask_c, NORM_STRIDE: tl.constexpr):
    """The four rows of coefficients."""
    tl.store(norm_ptr + offs_c, mean, mask=mask_c)
    tl.store(norm_ptr + NORM_STRIDE + offs_c, inverse, mask=mask_c)
    tl.store(norm_ptr + 2 * NORM_STRIDE + offs_c, scale, mask=mask_c)
    tl.store(norm_ptr + 3 * NORM_STRIDE + offs_c, beta, mask=mask_c)


@triton.jit
def update_running(
    mean,
    deviations,
    n_pixels,
    running_mean_ptr,  # [C] or None
    running_var_ptr,
    batches_ptr,  # [] int64, of a cumulative average, or None
    momentum,
    offs_c,
    mask_c,
    SKIP: tl.constexpr,
):
    """running = (1 - momentum) running + momentum batch; the running variance is unbiased."""
    if running_mean_ptr is not None:
        if batches_ptr is not None:
            momentum = 1.0 / tl.load(batches_ptr).to(tl.float32)
        old_mean = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        old_var = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        var = deviations / (n_pixels.to(tl.float32) - 1.0)
        new_mean = (1.0 - momentum) * old_mean + momentum * mean
        new_var = (1.0 - momentum) * old_var + momentum * var
        if SKIP:
            # infinity minus itself and NaN are not 0
            finite = (mean - mean == 0.0) & (var - var == 0.0)
            new_mean = tl.where(finite, new_mean, old_mean)
            new_var = tl.where(finite, new_var, old_var)
        dtype: tl.constexpr = running_mean_ptr.dtype.element_ty
        tl.store(running_mean_ptr + offs_c, new_mean.to(dtype), mask=mask_c)
        tl.store(running_var_ptr + offs_c, new_var.to(dtype), mask=mask_c)


@triton.jit
def _finish_moments(
    # tensors
    moments_ptr,  # [rows, 3, MOMENTS_STRIDE] first channel of this BatchNorm
    norm_ptr,  # [4, NORM_STRIDE] likewise
    gamma_ptr,  # [C] or None
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    # sizes
    pid,
    rows,
    n_pixels,
    momentum,
    eps,
    # problem
    C: tl.constexpr,
    TILE: tl.constexpr,
    MOMENTS_STRIDE: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    SKIP: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Coefficients of BLOCK_C channels, and their running statistics."""
    offs_c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_slot = offs_c < (C + 7) // 8 * 8
    mask_c = offs_c < C
    mean, deviations = merge_moments(
        moments_ptr, rows, n_pixels, offs_c, mask_slot, TILE, MOMENTS_STRIDE, BLOCK_R, BLOCK_C
    )
    inverse, scale, beta = coefficients(
        deviations, n_pixels, gamma_ptr, beta_ptr, eps, offs_c, mask_c
    )
    store_norm(norm_ptr, mean, inverse, scale, beta, offs_c, mask_slot, NORM_STRIDE)
    update_running(
        mean, deviations, n_pixels, running_mean_ptr, running_var_ptr, batches_ptr,
        momentum, offs_c, mask_c, SKIP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_a", "rows_b", "n_pixels", "momentum", "eps"])
def _batch_statistics_kernel(
    # tensors
    moments_a_ptr,  # [rows_a, 3, STRIDE_A] of up to three BatchNorms side by side
    moments_b_ptr,  # [rows_b, 3, STRIDE_B] of one more
    norm_ptr,  # [4, NORM_STRIDE] fp32, first channel of the first one
    gamma0_ptr,  # [C] each, or None
    gamma1_ptr,
    gamma2_ptr,
    gamma3_ptr,
    beta0_ptr,
    beta1_ptr,
    beta2_ptr,
    beta3_ptr,
    mean0_ptr,  # [C] each, running, or None
    mean1_ptr,
    mean2_ptr,
    mean3_ptr,
    var0_ptr,
    var1_ptr,
    var2_ptr,
    var3_ptr,
    batches0_ptr,  # [] int64 each, or None
    batches1_ptr,
    batches2_ptr,
    batches3_ptr,
    # sizes
    rows_a,
    rows_b,
    n_pixels,
    momentum,
    eps,
    # problem
    C0: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    AT_B: tl.constexpr,  # channel of the last one in norm
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
    STRIDE_A: tl.constexpr,
    STRIDE_B: tl.constexpr,
    NORM_STRIDE: tl.constexpr,
    SKIP: tl.constexpr,
    # tile
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program ranges: the channels of up to four BatchNorms; one that is not there has C = 0."""
    pid = tl.program_id(0)
    AT_1: tl.constexpr = (C0 + 7) // 8 * 8
    AT_2: tl.constexpr = AT_1 + (C1 + 7) // 8 * 8
    END_0: tl.constexpr = (C0 + BLOCK_C - 1) // BLOCK_C
    END_1: tl.constexpr = END_0 + (C1 + BLOCK_C - 1) // BLOCK_C
    END_2: tl.constexpr = END_1 + (C2 + BLOCK_C - 1) // BLOCK_C
    if pid < END_0:
        _finish_moments(
            moments_a_ptr, norm_ptr, gamma0_ptr, beta0_ptr, mean0_ptr, var0_ptr, batches0_ptr,
            pid, rows_a, n_pixels, momentum, eps,
            C0, TILE_A, STRIDE_A, NORM_STRIDE, SKIP, BLOCK_R, BLOCK_C,
        )  # fmt: skip
    elif pid < END_1:
        if C1 > 0:
            _finish_moments(
                moments_a_ptr + AT_1, norm_ptr + AT_1,
                gamma1_ptr, beta1_ptr, mean1_ptr, var1_ptr, batches1_ptr,
                pid - END_0, rows_a, n_pixels, momentum, eps,
                C1, TILE_A, STRIDE_A, NORM_STRIDE, SKIP, BLOCK_R, BLOCK_C,
            )  # fmt: skip
    elif pid < END_2:
        if C2 > 0:
            _finish_moments(
                moments_a_ptr + AT_2, norm_ptr + AT_2,
                gamma2_ptr, beta2_ptr, mean2_ptr, var2_ptr, batches2_ptr,
                pid - END_1, rows_a, n_pixels, momentum, eps,
                C2, TILE_A, STRIDE_A, NORM_STRIDE, SKIP, BLOCK_R, BLOCK_C,
            )  # fmt: skip
    else:
        if C3 > 0:
            _finish_moments(
                moments_b_ptr, norm_ptr + AT_B,
                gamma3_ptr, beta3_ptr, mean3_ptr, var3_ptr, batches3_ptr,
                pid - END_2, rows_b, n_pixels, momentum, eps,
                C3, TILE_B, STRIDE_B, NORM_STRIDE, SKIP, BLOCK_R, BLOCK_C,
            )  # fmt: skip


@dataclass(frozen=True)
class NormParameters:
    """What one BatchNorm holds, and what it is told; tensors [C] or None."""

    channels: int
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    batches: torch.Tensor | None  # of a cumulative average


def launch_batch_statistics(
    norm: torch.Tensor,
    first: tuple[Moments, list[NormParameters]],
    last: tuple[Moments, NormParameters, int] | None,
    n_pixels: int,
    config: StatisticsConfig,
    *,
    momentum: float,
    eps: float,
    skip: bool,
) -> None:
    """Fill the columns of `norm` [4, channels] of up to four BatchNorms, and update their running
    statistics.

    first: up to three that lie side by side in `norm`, from its first column on, and in their
    moments; last: one more and its column. With `skip` channels of which the batch's statistics are
    not finite keep their running ones.
    """
    moments, layers = first
    absent = NormParameters(0, None, None, None, None, None)
    layers = [*layers, absent, absent][:3]
    moments_b, layer_b, at_b = last or (moments, absent, 0)
    layers.append(layer_b)
    run(
        _batch_statistics_kernel,
        (sum(cdiv(layer.channels, config.block_c) for layer in layers),),
        (
            moments.partial,
            moments_b.partial,
            norm,
            *(layer.gamma for layer in layers),
            *(layer.beta for layer in layers),
            *(layer.running_mean for layer in layers),
            *(layer.running_var for layer in layers),
            *(layer.batches for layer in layers),
            moments.partial.shape[0],
            moments_b.partial.shape[0],
            n_pixels,
            momentum,
            eps,
        ),
        dict(
            **{f"C{i}": layer.channels for i, layer in enumerate(layers)},
            AT_B=at_b,
            TILE_A=moments.tile,
            TILE_B=moments_b.tile,
            STRIDE_A=moments.partial.shape[2],
            STRIDE_B=moments_b.partial.shape[2],
            NORM_STRIDE=norm.stride(0),
            SKIP=skip,
            BLOCK_R=config.block_r,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )

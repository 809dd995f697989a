"""Global average pooling, with dropout behind it or without, forward and backward."""

import torch
import triton
import triton.language as tl

from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import load_bits
from fused_inception.tuning.configs import GlobalPoolConfig


@triton.jit
def _gain(kept_ptr, offs, mask, scale):
    """`scale` where a feature is kept, else 0: a factor, so that NaN stays NaN as in torch."""
    return tl.where(tl.load(kept_ptr + offs, mask=mask, other=0) != 0, scale, 0.0)


@triton.jit(do_not_specialize=["height", "width", "scale"])
def _global_pool_fwd_kernel(
    # tensors
    x_ptr,  # [N, C, H, W] any strides
    kept_ptr,  # [N, C] bytes, 0 where dropped, with DROPOUT
    y_ptr,  # [N, C]
    # sizes
    height,
    width,
    scale,  # of what is kept
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C: tl.constexpr,
    DROPOUT: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y[n, c] = mean of x[n, c] over all pixels, times kept[n, c] * scale with DROPOUT.

    One program per (image, block of channels).
    """
    image = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    x_image_ptr = x_ptr + image.to(tl.int64) * x_image_stride
    x_channel = offs_c.to(tl.int64) * x_channel_stride
    n_pixels = height * width
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in tl.range(0, n_pixels, BLOCK_P):
        offs_p = p0 + tl.arange(0, BLOCK_P)
        pixel = (offs_p // width).to(tl.int64) * x_row_stride
        pixel += (offs_p % width).to(tl.int64) * x_column_stride
        mask = (offs_p < n_pixels)[:, None] & mask_c[None, :]
        x_tile = tl.load(x_image_ptr + pixel[:, None] + x_channel[None, :], mask=mask, other=0.0)
        total += x_tile.to(tl.float32)
    # x is not empty (the launcher sees to it), so the number of pixels is no zero
    mean = tl.sum(total, axis=0) / n_pixels.to(tl.float32)
    y_offs = image.to(tl.int64) * C + offs_c
    if DROPOUT:
        mean *= _gain(kept_ptr, y_offs, mask_c, scale)
    tl.store(y_ptr + y_offs, mean.to(y_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["n_pixels", "scale"])
def _global_pool_bwd_kernel(
    # tensors
    dy_ptr,  # [N, C] any strides
    kept_ptr,  # [N, C] bytes, with DROPOUT
    mask_ptr,  # [N, P, C / 8] uint8, bits of the ReLU whose output x is, or None
    dx_ptr,  # [N, P, C]
    partial_ptr,  # [N, C] fp32, with a mask
    # sizes
    n_pixels,
    scale,
    # strides, in elements
    dy_image_stride,
    dy_channel_stride,
    # problem
    C: tl.constexpr,
    DROPOUT: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx[n, p, c] = dy[n, c] / (H * W), times kept[n, c] * scale with DROPOUT.

    With a mask 0 where the bit is not set, and partial[n, c] = the sum over the pixels. One program
    per (image, block of channels).
    """
    image = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dy_offs = image * dy_image_stride + offs_c.to(tl.int64) * dy_channel_stride
    dy_row = tl.load(dy_ptr + dy_offs, mask=mask_c, other=0.0).to(tl.float32)
    if DROPOUT:
        dy_row *= _gain(kept_ptr, image * C + offs_c, mask_c, scale)
    dx_row = (dy_row / n_pixels.to(tl.float32)).to(dx_ptr.dtype.element_ty)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p0 in tl.range(0, n_pixels, BLOCK_P):
        local_p = tl.arange(0, BLOCK_P)
        offs_p = p0 + local_p
        mask = (offs_p < n_pixels)[:, None] & mask_c[None, :]
        dx_tile = tl.broadcast_to(dx_row[None, :], (BLOCK_P, BLOCK_C))
        if mask_ptr is not None:
            mask_image_ptr = mask_ptr + image * n_pixels * (C // 8)
            is_open = load_bits(mask_image_ptr, offs_p, offs_c, mask, C)
            # select, never multiply: a closed gate stops NaN and infinity too
            dx_tile = tl.where(is_open, dx_tile, 0.0)
            sums += dx_tile.to(tl.float32)
        dx_tile_ptr = dx_ptr + (image * n_pixels + p0) * C
        tl.store(dx_tile_ptr + (local_p * C)[:, None] + offs_c[None, :], dx_tile, mask=mask)
    if mask_ptr is not None:
        tl.store(partial_ptr + image * C + offs_c, tl.sum(sums, axis=0), mask=mask_c)


def launch_global_pool_fwd(
    x: torch.Tensor,
    kept: torch.Tensor | None,
    scale: float,
    y: torch.Tensor,
    config: GlobalPoolConfig,
) -> None:
    """Fill `y`, [N, C, 1, 1] dense, from `x`, [N, C, H, W] of any strides; H and W are not 0.

    kept: dense booleans [N, C], of dropout behind it, which scales by `scale` what it keeps.
    """
    n, c, height, width = x.shape
    run(
        _global_pool_fwd_kernel,
        (n, cdiv(c, config.block_c)),
        (x, _bytes(kept, y), y, height, width, scale, *x.stride()),
        dict(C=c, DROPOUT=kept is not None, BLOCK_P=config.block_p, BLOCK_C=config.block_c),
        num_warps=config.num_warps,
    )


def launch_global_pool_bwd(
    dy: torch.Tensor,
    kept: torch.Tensor | None,
    scale: float,
    dx: torch.Tensor,
    config: GlobalPoolConfig,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fill `dx`, [N, C, H, W] exactly channels last, from `dy`, [N, C, 1, 1] of any strides.

    With `mask`, the bits [P, C / 8] of the ReLU whose output x is, the gradient behind that ReLU;
    C is a multiple of 8 then.

    Returns its column sums over each image, [N, C]; without a mask there are none.
    """
    n, c, height, width = dx.shape
    rows = 0 if mask is None else n
    partial = torch.empty((rows, c), dtype=torch.float32, device=dx.device)
    run(
        _global_pool_bwd_kernel,
        (n, cdiv(c, config.block_c)),
        (
            dy,
            _bytes(kept, dx),
            mask,
            dx,
            partial,
            height * width,
            scale,
            dy.stride(0),
            dy.stride(1),
        ),
        dict(C=c, DROPOUT=kept is not None, BLOCK_P=config.block_p, BLOCK_C=config.block_c),
        num_warps=config.num_warps,
    )
    return partial


def _bytes(kept: torch.Tensor | None, unread: torch.Tensor) -> torch.Tensor:
    """Booleans as the bytes that they are; without any, a tensor that nobody reads."""
    return unread if kept is None else kept.view(torch.uint8)

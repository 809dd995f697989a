"""Launch M: one pass over the gradient of the output that applies the ReLU mask and sums the bias
gradients."""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import even_share
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.layout import branch_constants
from fused_inception.kernels.tiles import channel_of
from fused_inception.tuning.configs import MaskConfig


@triton.jit(
    do_not_specialize=[
        "n_pixels", "height", "width", "chunk",
        "dy_image_stride", "dy_channel_stride", "dy_row_stride", "dy_column_stride",
    ]
)  # fmt: skip
def _relu_mask_kernel(
    # tensors
    dy_ptr,  # [N, C_DY, H, W] any strides
    mask_ptr,  # [P, SLOTS / 8] uint8
    dz_ptr,  # [P, SLOTS]
    partial_ptr,  # [chunks, SLOTS] fp32
    # sizes
    n_pixels,
    height,
    width,
    chunk,  # pixels of one program, a multiple of BLOCK_P
    # strides, in elements
    dy_image_stride,
    dy_channel_stride,
    dy_row_stride,
    dy_column_stride,
    # problem
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    NP: tl.constexpr,
    SLOT_3: tl.constexpr,
    SLOT_5: tl.constexpr,
    SLOT_P: tl.constexpr,
    SLOTS: tl.constexpr,
    C_DY: tl.constexpr,
    DENSE: tl.constexpr,  # dy is exactly channels last
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz[p, slot] = dy[p, channel] where the output was not <= 0, else 0; partial[chunk, slot] =
    sum of dz over it.

    One program per (chunk of pixels, block of slots). Tiles are [pixels, bytes, bits]: eight
    neighbouring channels share one byte of the mask.
    """
    pid_p = tl.program_id(0)
    offs_byte = tl.program_id(1) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
    bit = tl.arange(0, 8)
    slot = offs_byte[:, None] * 8 + bit[None, :]
    channel, is_channel = channel_of(slot, N1, N3, N5, NP, SLOT_3, SLOT_5, SLOT_P, SLOTS)
    sums = tl.zeros((BLOCK_P, BLOCK_C // 8, 8), tl.float32)
    for start in tl.range(0, chunk, BLOCK_P):
        p0 = pid_p * chunk + start
        local_p = tl.arange(0, BLOCK_P)
        offs_p = p0 + local_p
        mask_p = offs_p < n_pixels
        p0 = p0.to(tl.int64)
        mask_byte = mask_p[:, None] & (offs_byte < SLOTS // 8)[None, :]
        byte_offs = (local_p * (SLOTS // 8))[:, None] + offs_byte[None, :]
        byte = tl.load(mask_ptr + p0 * (SLOTS // 8) + byte_offs, mask=mask_byte, other=0)
        is_open = ((byte.to(tl.int32)[:, :, None] >> bit[None, None, :]) & 1) != 0
        mask_dy = mask_p[:, None, None] & is_channel[None, :, :]
        if DENSE:
            dy_offs = (local_p * C_DY)[:, None, None] + channel[None, :, :]
            dy_tile = tl.load(dy_ptr + p0 * C_DY + dy_offs, mask=mask_dy, other=0.0)
        else:
            image = (offs_p // (height * width)).to(tl.int64)
            row = ((offs_p // width) % height).to(tl.int64)
            column = (offs_p % width).to(tl.int64)
            pixel = image * dy_image_stride + row * dy_row_stride + column * dy_column_stride
            dy_offs = pixel[:, None, None] + (channel.to(tl.int64) * dy_channel_stride)[None, :, :]
            dy_tile = tl.load(dy_ptr + dy_offs, mask=mask_dy, other=0.0)
        # select, never multiply: a closed gate stops NaN and infinity too
        dz_tile = tl.where(is_open, dy_tile.to(tl.float32), 0.0)
        dz_offs = (local_p * SLOTS)[:, None, None] + slot[None, :, :]
        mask_dz = mask_p[:, None, None] & (slot < SLOTS)[None, :, :]
        tl.store(dz_ptr + p0 * SLOTS + dz_offs, dz_tile.to(dz_ptr.dtype.element_ty), mask=mask_dz)
        sums += dz_tile
    tl.store(partial_ptr + pid_p * SLOTS + slot, tl.sum(sums, axis=0), mask=slot < SLOTS)


def launch_relu_mask(
    widths: tuple[int, ...],
    dy: torch.Tensor,
    mask: torch.Tensor,
    config: MaskConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask `dy`, [N, sum of widths, H, W], by the ReLU bits of up to four branches side by side;
    of a wider `dy` its first channels.

    Returns dz, [N, slots, H, W] channels last in the dtype of `dy`, each branch at a multiple of 8
    channels, and its column partials [chunks, slots].
    """
    branches = branch_constants(widths)
    slots = branches["SLOTS"]
    n, c_dy, height, width = dy.shape
    n_pixels = n * height * width
    chunk = even_share(n_pixels, config.pixels, config.block_p)
    chunks = cdiv(n_pixels, chunk)
    dz = torch.empty_strided(
        (n, slots, height, width),
        (height * width * slots, 1, width * slots, slots),
        dtype=dy.dtype,
        device=dy.device,
    )
    partial = torch.empty((chunks, slots), dtype=torch.float32, device=dy.device)
    dense = dy.stride() == (height * width * c_dy, 1, width * c_dy, c_dy)
    run(
        _relu_mask_kernel,
        (chunks, cdiv(slots, config.block_c)),
        (dy, mask, dz, partial, n_pixels, height, width, chunk, *dy.stride()),
        dict(
            **branches,
            C_DY=c_dy,
            DENSE=dense,
            BLOCK_P=config.block_p,
            BLOCK_C=config.block_c,
        ),
        num_warps=config.num_warps,
    )
    return dz, partial

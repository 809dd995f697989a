"""The naive module forward: the layout of its filters, its three convolutions in one launch.

The pool branch is `max_pool.launch_max_pool_fwd` into its slice of the concatenation.
"""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import NaiveDims, align_up
from fused_inception.kernels.conv import conv_tile
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import Packing, row_packing
from fused_inception.tuning.configs import NaiveConfig


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "x_stride8"])
def _naive_conv_kernel(
    # tensors
    x_ptr,  # [P, x_stride]
    w_ptr,  # packed filters: [S1, S_IN], then [S3, 9, S_IN], then [S5, 25, S_IN]
    b_ptr,  # packed biases, fp32, in the same order
    y_ptr,  # [P, Y_STRIDE]
    mask_ptr,  # [P, (S1 + S3 + S5) / 8]
    # sizes
    n_pixels,
    height,
    width,
    # strides
    x_stride8,
    # problem
    S_IN: tl.constexpr,
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    S1: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    P1: tl.constexpr,
    CO1: tl.constexpr,
    CI1: tl.constexpr,
    P3: tl.constexpr,
    CO3: tl.constexpr,
    CI3: tl.constexpr,
    P5: tl.constexpr,
    CO5: tl.constexpr,
    CI5: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program ranges: the tiles of the 5x5 branch, then (shorter) of the 3x3, then of the 1x1."""
    pid = tl.program_id(0)
    x_stride = x_stride8 * 8
    MASK_STRIDE: tl.constexpr = (S1 + S3 + S5) // 8
    FILTER_3: tl.constexpr = S1 * S_IN
    FILTER_5: tl.constexpr = FILTER_3 + S3 * 9 * S_IN
    TILES_1: tl.constexpr = (N1 + CO1 - 1) // CO1
    TILES_3: tl.constexpr = (N3 + CO3 - 1) // CO3
    TILES_5: tl.constexpr = (N5 + CO5 - 1) // CO5
    end5 = tl.cdiv(n_pixels, P5) * TILES_5
    end3 = end5 + tl.cdiv(n_pixels, P3) * TILES_3
    if pid < end5:
        conv_tile(
            x_ptr, w_ptr + FILTER_5, b_ptr + (S1 + S3), y_ptr + (N1 + N3),
            mask_ptr + (S1 + S3) // 8,
            pid // TILES_5, pid % TILES_5 * CO5, n_pixels, height, width, x_stride,
            5, S_IN, N5, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            P5, CO5, CI5, NUM_STAGES,
        )  # fmt: skip
    elif pid < end3:
        conv_tile(
            x_ptr, w_ptr + FILTER_3, b_ptr + S1, y_ptr + N1, mask_ptr + S1 // 8,
            (pid - end5) // TILES_3, (pid - end5) % TILES_3 * CO3, n_pixels, height, width,
            x_stride,
            3, S_IN, N3, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            P3, CO3, CI3, NUM_STAGES,
        )  # fmt: skip
    else:
        conv_tile(
            x_ptr, w_ptr, b_ptr, y_ptr, mask_ptr,
            (pid - end3) // TILES_1, (pid - end3) % TILES_1 * CO1, n_pixels, height, width,
            x_stride,
            1, S_IN, N1, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            P1, CO1, CI1, NUM_STAGES,
        )  # fmt: skip


def naive_constants(dims: NaiveDims) -> dict[str, int]:
    """Widths that all kernels of the naive module know."""
    return dict(
        S_IN=align_up(dims.in_channels),
        S1=align_up(dims.ch1x1),
        S3=align_up(dims.ch3x3),
        S5=align_up(dims.ch5x5),
    )


def naive_packing(dims: NaiveDims) -> Packing:
    """The layout of the three filters and biases that all kernels of the naive module read."""
    return row_packing(*((c_out, c_in, k * k) for c_out, c_in, k, _ in dims.filter_shapes))


def launch_naive_conv(
    dims: NaiveDims,
    x: torch.Tensor,
    packed_w: torch.Tensor,
    packed_b: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor,
    config: NaiveConfig,
    *,
    save: bool,
    precision: str,
) -> None:
    """Fill the 1x1, 3x3 and 5x5 slices of `y`, [N, C_OUT, H, W] exactly channels last; with `save`
    `mask`, [P, slot_channels / 8].

    x: [N, slots of C_IN, H, W] channels last, pixel stride a multiple of 8.
    """
    n, _, height, width = x.shape
    n_pixels = n * height * width
    tiles = config.conv1, config.conv3, config.conv5
    programs = sum(
        cdiv(n_pixels, tile.block_m) * cdiv(c_out, tile.block_n)
        for tile, c_out in zip(tiles, dims.conv_widths, strict=True)
    )
    run(
        _naive_conv_kernel,
        (programs,),
        (x, packed_w, packed_b, y, mask, n_pixels, height, width, x.stride(3) // 8),
        dict(
            **naive_constants(dims),
            N1=dims.ch1x1,
            N3=dims.ch3x3,
            N5=dims.ch5x5,
            Y_STRIDE=dims.out_channels,
            SAVE=save,
            PRECISION=precision,
            P1=config.conv1.block_m,
            CO1=config.conv1.block_n,
            CI1=config.conv1.block_k,
            P3=config.conv3.block_m,
            CO3=config.conv3.block_n,
            CI3=config.conv3.block_k,
            P5=config.conv5.block_m,
            CO5=config.conv5.block_n,
            CI5=config.conv5.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )

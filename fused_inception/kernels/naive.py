"""The naive module forward: its filters packed, its three convolutions in one launch.

The pool branch is `max_pool.launch_max_pool_fwd` into its slice of the concatenation.
"""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import NaiveDims, align_up
from fused_inception.kernels.conv import conv_tile
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter, pack_bias, pack_rows
from fused_inception.tuning.configs import NaiveConfig


@triton.jit
def _naive_pack_kernel(
    # tensors
    w1_ptr,  # three filters as torch stores them
    w3_ptr,
    w5_ptr,
    b1_ptr,  # three biases
    b3_ptr,
    b5_ptr,
    # packed filters, channels and rows padded to slots: [S1, S_IN], then [S3, 9, S_IN], then
    # [S5, 25, S_IN]; for the data gradients [S_IN, taps backwards, S1], ... at the same places
    w_ptr,
    b_ptr,  # packed biases, fp32
    # problem
    C_IN: tl.constexpr,
    N1: tl.constexpr,
    N3: tl.constexpr,
    N5: tl.constexpr,
    S_IN: tl.constexpr,  # widths rounded up to slots
    S1: tl.constexpr,
    S3: tl.constexpr,
    S5: tl.constexpr,
    LAST3: tl.constexpr,  # w3 and w5 lie in memory as [C_OUT, K, K, C_IN]
    LAST5: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Copy, transpose and cast all filters; one program per BLOCK elements. For a forward the last
    program packs the biases; FOR_DGRAD needs none."""
    pid = tl.program_id(0)
    # packed elements up to each segment, and programs up to each segment
    W1: tl.constexpr = S1 * S_IN
    W3: tl.constexpr = W1 + S3 * 9 * S_IN
    T1: tl.constexpr = (S1 * S_IN + BLOCK - 1) // BLOCK
    T3: tl.constexpr = T1 + (S3 * 9 * S_IN + BLOCK - 1) // BLOCK
    T5: tl.constexpr = T3 + (S5 * 25 * S_IN + BLOCK - 1) // BLOCK
    D: tl.constexpr = FOR_DGRAD
    if pid < T1:
        pack_rows(w1_ptr, w_ptr, pid, N1, C_IN, 1, S_IN, S1, S1, False, D, BLOCK)
    elif pid < T3:
        pack_rows(w3_ptr, w_ptr + W1, pid - T1, N3, C_IN, 9, S_IN, S3, S3, LAST3, D, BLOCK)
    elif pid < T5:
        pack_rows(w5_ptr, w_ptr + W3, pid - T3, N5, C_IN, 25, S_IN, S5, S5, LAST5, D, BLOCK)
    elif not FOR_DGRAD:
        pack_bias(b1_ptr, b_ptr, N1, S1, BLOCK)
        pack_bias(b3_ptr, b_ptr + S1, N3, S3, BLOCK)
        pack_bias(b5_ptr, b_ptr + (S1 + S3), N5, S5, BLOCK)


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


def launch_naive_pack(
    dims: NaiveDims,
    filters: list[torch.Tensor],
    biases: list[torch.Tensor] | None,
    dtype: torch.dtype,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack three filters (cast to `dtype`) and three biases (cast to fp32).

    Without biases the filters are packed for the data gradients. Returns (filters, biases) as flat
    tensors, laid out as the kernel says.
    """
    slots = naive_constants(dims)
    segments = [
        slots[name] * taps * slots["S_IN"] for name, taps in (("S1", 1), ("S3", 9), ("S5", 25))
    ]
    device = filters[0].device
    packed_w = torch.empty(sum(segments), dtype=dtype, device=device)
    packed_b = torch.empty(dims.slot_channels if biases else 0, dtype=torch.float32, device=device)
    sources = [w if is_channels_last_filter(w) else w.contiguous() for w in filters]
    bias_args = [b.contiguous() for b in biases] if biases else [packed_b] * 3
    run(
        _naive_pack_kernel,
        (sum(cdiv(n, block) for n in segments) + (1 if biases else 0),),
        (*sources, *bias_args, packed_w, packed_b),
        dict(
            C_IN=dims.in_channels,
            N1=dims.ch1x1,
            N3=dims.ch3x3,
            N5=dims.ch5x5,
            **slots,
            LAST3=is_channels_last_filter(sources[1]),
            LAST5=is_channels_last_filter(sources[2]),
            FOR_DGRAD=not biases,
            BLOCK=block,
        ),
        num_warps=4,
    )
    return packed_w, packed_b


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

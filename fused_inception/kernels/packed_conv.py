"""conv1 of the network alone, of a packed image, which `stem_conv` tells of: packing of image and
filter, and the gradient of the filter."""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import sums_in_stages
from fused_inception.kernels.finish import launch_sum
from fused_inception.kernels.image_conv import within_reach
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import ELEMENTS
from fused_inception.kernels.stem_conv import (
    DEPTH,
    finish_image_filter,
    pack_image,
    pack_image_filter,
    packed_wgrad_tile,
    windows_until_last,
)
from fused_inception.tuning.configs import FinishConfig, PackedWgradConfig


@triton.jit(
    do_not_specialize=[
        "image_end", "n_packed", "packed_rows", "packed_columns", "height", "width",
        "x_image_stride", "x_channel_stride", "x_row_stride", "x_column_stride",
    ]
)  # fmt: skip
def _image_pack_kernel(
    # tensors
    x_ptr,  # [N, C_IN, H, W] any strides, any floating dtype
    packed_ptr,  # [N, packed_rows, packed_columns, 16]
    w_ptr,  # [C_OUT, C_IN, 7, 7] likewise
    packed_w_ptr,  # [C_OUT, 256]
    # sizes
    image_end,  # first program behind the image
    n_packed,
    packed_rows,
    packed_columns,
    height,
    width,
    # strides, in elements
    x_image_stride,
    x_channel_stride,
    x_row_stride,
    x_column_stride,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Program ranges: the image, the filter."""
    pid = tl.program_id(0)
    if pid < image_end:
        pack_image(
            x_ptr, packed_ptr, pid, n_packed, packed_rows, packed_columns,
            height, width, x_image_stride, x_channel_stride, x_row_stride, x_column_stride,
            C_IN, BLOCK,
        )  # fmt: skip
    else:
        pack_image_filter(w_ptr, packed_w_ptr, pid - image_end, C_OUT, C_IN, BLOCK)


@triton.jit(do_not_specialize=["chunk", "n_windows", "height", "width"])
def _packed_wgrad_kernel(
    # tensors
    x_ptr,  # [N, H + 3, W + 3, 16] packed image
    dz_ptr,  # [P, SLOTS]
    out_ptr,  # [splits, 256, SLOTS] fp32
    # sizes
    chunk,
    n_windows,
    height,  # of the output
    width,
    # problem
    SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Partial gradients; one program per (split, tile)."""
    packed_wgrad_tile(
        x_ptr, dz_ptr, out_ptr, tl.program_id(0), chunk, n_windows, height, width,
        SLOTS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P, NUM_STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _packed_finish_kernel(
    # tensors
    partial_ptr,  # [splits, 256, SLOTS] fp32
    dw_ptr,  # [C_OUT, C_IN, 7, 7]
    # sizes
    splits,
    # problem
    C_OUT: tl.constexpr,
    SLOTS: tl.constexpr,
    C_IN: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The filter's gradient; one program per tile of it."""
    finish_image_filter(
        partial_ptr, dw_ptr, tl.program_id(0), splits, C_OUT, SLOTS, C_IN, BLOCK_M, BLOCK_N
    )


def launch_image_pack(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Fill `packed`, of `stem_conv.packed_image_shape`, with an image of any strides; return the
    filter packed, [C_OUT, DEPTH], in the same dtype."""
    x, weight = within_reach(x), weight.contiguous()
    n, rows, columns, _ = packed.shape
    _, c_in, height, width = x.shape
    packed_weight = packed.new_empty((weight.shape[0], DEPTH))
    image_end = cdiv(packed.numel(), ELEMENTS)
    run(
        _image_pack_kernel,
        (image_end + cdiv(packed_weight.numel(), ELEMENTS),),
        (x, packed, weight, packed_weight, image_end, n * rows * columns, rows, columns,
         height, width, *x.stride()),
        dict(C_IN=c_in, C_OUT=weight.shape[0], BLOCK=ELEMENTS),
        num_warps=4,
    )  # fmt: skip
    return packed_weight


def launch_packed_wgrad(
    packed: torch.Tensor,
    dz: torch.Tensor,
    dw: torch.Tensor,
    config: PackedWgradConfig,
    finish: FinishConfig,
    *,
    precision: str,
) -> None:
    """Fill `dw`, [C_OUT, C_IN, 7, 7] contiguous, from `dz`, [N, slots of C_OUT, H, W] dense.

    Two launches; where tiles are many one between them adds up the splits.
    """
    n, slots, height, width = dz.shape
    job, n_pixels = config.wgrad, n * height * width
    n_windows = windows_until_last(n_pixels, height, width)
    chunk, splits = job.chunks(n_windows)
    partial = torch.empty((splits, DEPTH, slots), dtype=torch.float32, device=dz.device)
    run(
        _packed_wgrad_kernel,
        (splits * cdiv(DEPTH, job.tile.block_m) * cdiv(slots, job.tile.block_n),),
        (packed, dz, partial, chunk, n_windows, height, width),
        dict(
            SLOTS=slots,
            PRECISION=precision,
            BLOCK_M=job.tile.block_m,
            BLOCK_N=job.tile.block_n,
            BLOCK_P=job.tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    if sums_in_stages(n_pixels):
        partial = launch_sum(partial, finish)
    c_out, c_in, _, _ = dw.shape
    run(
        _packed_finish_kernel,
        (cdiv(c_in * 49, finish.block_m) * cdiv(c_out, finish.block_n),),
        (partial, dw, partial.shape[0]),
        dict(C_OUT=c_out, SLOTS=slots, C_IN=c_in, BLOCK_M=finish.block_m, BLOCK_N=finish.block_n),
        num_warps=finish.num_warps,
    )

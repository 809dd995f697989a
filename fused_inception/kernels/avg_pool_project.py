"""Average pool, 1x1 convolution, bias and ReLU of an auxiliary classifier."""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import AvgWindow
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import relu
from fused_inception.tuning.configs import AvgPoolProjectConfig


@triton.jit
def window_span(i, size, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """(first, end) of window `i` along a side of `size` pixels; adaptive with a KERNEL of 0."""
    if KERNEL == 0:
        return i * size // OUT, ((i + 1) * size + (OUT - 1)) // OUT
    else:
        return i * STRIDE, tl.minimum(i * STRIDE + KERNEL, size)


@triton.jit
def window_box(
    window,
    height,
    width,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """(first row, end row, first column, end column) of each window of a map."""
    row, end_row = window_span(window // OUT_WIDTH, height, OUT_HEIGHT, KERNEL, STRIDE)
    column, end_column = window_span(window % OUT_WIDTH, width, OUT_WIDTH, KERNEL, STRIDE)
    return row, end_row, column, end_column


@triton.jit(
    do_not_specialize=[
        "n_windows", "height", "width", "taps", "tap_columns", "c_in", "x_stride8"
    ]
)  # fmt: skip
def _avg_pool_project_fwd_kernel(
    # tensors
    x_ptr,  # [N, H, W, 8 x_stride8]
    w_ptr,  # [S_OUT, S_IN]
    b_ptr,  # [S_OUT] fp32
    y_ptr,  # [N, C_OUT, WINDOWS]
    pooled_ptr,  # [P, S_IN], with SAVE
    # sizes
    n_windows,  # P, of all images
    height,
    width,
    taps,  # positions of the largest window
    tap_columns,
    c_in,  # S_IN
    # strides
    x_stride8,
    # problem
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    S_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    TAPS: tl.constexpr,
):
    """pooled[p] = mean of x over window p, y[n, o, p] = relu(sum_i w[o, i] pooled[p, i] + b[o]).

    One program per (tile of windows, tile of output channels). Filters are the left operand: their
    128 rows fill the tensor cores, windows are few.
    """
    TILES_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    WINDOWS: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    pid_co = tl.program_id(0) % TILES_CO
    offs_p = tl.program_id(0) // TILES_CO * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_co = pid_co * BLOCK_CO + tl.arange(0, BLOCK_CO)
    offs_ci = tl.arange(0, BLOCK_CI)
    mask_p = offs_p < n_windows
    mask_co = offs_co < C_OUT
    image = (offs_p // WINDOWS).to(tl.int64)
    row, end_row, column, end_column = window_box(
        offs_p % WINDOWS, height, width, OUT_HEIGHT, OUT_WIDTH, KERNEL, STRIDE
    )
    count = ((end_row - row) * (end_column - column)).to(tl.float32)
    x_stride = x_stride8 * 8
    corner = (image * height + row) * width + column
    x_rows = x_ptr + (corner * x_stride)[:, None] + offs_ci[None, :]
    w_offs = offs_co[:, None] * S_IN + offs_ci[None, :]
    pooled_offs = (offs_p.to(tl.int64) * S_IN)[:, None] + offs_ci[None, :]

    acc = tl.zeros((BLOCK_CO, BLOCK_P), tl.float32)
    # one stage: more of them would pipeline every tap
    for ci0 in tl.range(0, c_in, BLOCK_CI, num_stages=1):
        mask_ci = offs_ci < S_IN - ci0
        total = tl.zeros((BLOCK_P, BLOCK_CI), tl.float32)
        for tap0 in tl.range(0, taps, TAPS, num_stages=1):
            for t in tl.static_range(TAPS):
                r = (tap0 + t) // tap_columns
                s = (tap0 + t) - r * tap_columns
                inside = mask_p & (row + r < end_row) & (column + s < end_column)
                shift = (r * width + s) * x_stride + ci0
                x_tile = tl.load(x_rows + shift, mask=inside[:, None] & mask_ci[None, :], other=0.0)
                total += x_tile.to(tl.float32)
        pooled_tile = (total / count[:, None]).to(x_ptr.dtype.element_ty)
        if SAVE:
            if pid_co == 0:
                mask = mask_p[:, None] & mask_ci[None, :]
                tl.store(pooled_ptr + ci0 + pooled_offs, pooled_tile, mask=mask)
        w_mask = mask_co[:, None] & mask_ci[None, :]
        w_tile = tl.load(w_ptr + ci0 + w_offs, mask=w_mask, other=0.0)
        acc = tl.dot(w_tile, tl.trans(pooled_tile), acc, input_precision=PRECISION)

    bias = tl.load(b_ptr + offs_co, mask=mask_co, other=0.0)
    y_tile = relu(acc + bias[:, None]).to(y_ptr.dtype.element_ty)
    y_offs = (image * (C_OUT * WINDOWS) + offs_p % WINDOWS)[None, :] + (offs_co * WINDOWS)[:, None]
    tl.store(y_ptr + y_offs, y_tile, mask=mask_p[None, :] & mask_co[:, None])


def launch_avg_pool_project_fwd(
    x: torch.Tensor,
    packed_w: torch.Tensor,
    packed_b: torch.Tensor,
    y: torch.Tensor,
    pooled: torch.Tensor,
    window: AvgWindow,
    config: AvgPoolProjectConfig,
    *,
    save: bool,
    precision: str,
) -> None:
    """Fill `y`, [N, C_OUT, OH, OW] contiguous, with `save` also `pooled`, [P, slots of C_IN].

    x: [N, slots of C_IN, H, W] as `layout.for_kernels` gives it.
    """
    _, s_in, height, width = x.shape
    n, c_out, out_height, out_width = y.shape
    n_windows = n * out_height * out_width
    rows, columns = window.extent(height), window.extent(width)
    tile = config.forward
    run(
        _avg_pool_project_fwd_kernel,
        (cdiv(n_windows, tile.block_n) * cdiv(c_out, tile.block_m),),
        (
            x,
            packed_w,
            packed_b,
            y,
            pooled,
            n_windows,
            height,
            width,
            rows * columns,
            columns,
            s_in,
            x.stride(3) // 8,
        ),
        dict(
            OUT_HEIGHT=out_height,
            OUT_WIDTH=out_width,
            **window_constants(window),
            S_IN=s_in,
            C_OUT=c_out,
            SAVE=save,
            PRECISION=precision,
            BLOCK_CO=tile.block_m,
            BLOCK_P=tile.block_n,
            BLOCK_CI=tile.block_k,
            TAPS=config.taps,
        ),
        num_warps=config.forward_warps,
    )


def window_constants(window: AvgWindow) -> dict[str, int]:
    """The window's part of a kernel's constants."""
    return dict(KERNEL=window.kernel, STRIDE=window.stride)

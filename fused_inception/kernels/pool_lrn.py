"""A max pool and then local response normalisation, as one kernel a direction.

Each pixel gets its gradient from up to four windows where windows of 3 move by 2. Backward
therefore marches down the map: a thread owns a column of cells, and takes the gradient of a norm
once for the two cells above each other that its window reaches into.
"""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import ALIGN, Window
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.lrn import Norm, normalise, normalise_grad
from fused_inception.kernels.max_pool import (
    clear_gaps,
    pool_tile,
    window_constants,
    window_position,
)
from fused_inception.kernels.tiles import is_open
from fused_inception.kernels.vectors import (
    has_group,
    join_lanes,
    lanes_of,
    load_lanes,
    load_tile,
    offsets,
    program_vectors,
    split_lanes,
    store_tile,
)
from fused_inception.tuning.configs import MarchConfig, VectorConfig


@triton.jit(
    do_not_specialize=["n_pixels", "height", "width", "out_height", "out_width", "x_stride8"]
)
def _max_pool_lrn_fwd_kernel(
    # tensors
    x_ptr,  # [N, H, W, 8 x_stride8]
    y_ptr,  # [P, C]
    pooled_ptr,  # [P, GROUPS * LANES]
    index_ptr,  # [P, GROUPS * LANES] uint8, winning tap of each window
    # sizes
    n_pixels,  # of y
    height,
    width,
    out_height,
    out_width,
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
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    SAVE: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """y = pooled * s ** -BETA, pooled = max over the taps of x, index = the tap; one program per
    BLOCK_V vectors of y."""
    SLOTS: tl.constexpr = GROUPS * LANES
    pixel, group = program_vectors(GROUPS, BLOCK_V)
    inside = pixel < n_pixels
    image, row, column = window_position(pixel, out_height, out_width, STRIDE, PAD)
    first = image * height * width + row * width + column
    rows = x_ptr + offsets(first, group, x_stride8 * 8, LANES)
    pooled = ()
    for shift in tl.static_range(-HALO, HALO + 1):
        is_vector = inside & has_group(group, shift, GROUPS)
        best, winner = pool_tile(
            rows + shift * LANES, is_vector, row, column, height, width,
            x_stride8 * 8, K, BLOCK_V, LANES,
        )  # fmt: skip
        if SAVE and shift == 0:
            store_tile(pooled_ptr, best, pixel, group, inside, SLOTS, BLOCK_V, LANES)
            store_tile(index_ptr, winner, pixel, group, inside, SLOTS, BLOCK_V, LANES)
        # beyond the channels the norm sees zeros
        best = tl.where(is_vector[:, None], best.to(tl.float32), 0.0)
        pooled = pooled + split_lanes(best, BLOCK_V, LANES)
    y_tile = normalise(pooled, alpha_mean, k, SIZE, BETA, HALO, BLOCK_V, LANES)
    store_tile(y_ptr, y_tile, pixel, group, inside, C, BLOCK_V, LANES)


@triton.jit(
    do_not_specialize=[
        "n_columns",
        "rows",
        "height",
        "width",
        "out_height",
        "out_width",
        "dy_stride8",
    ]
)
def _max_pool_lrn_bwd_kernel(
    # tensors
    pooled_ptr,  # [N, OH, OW, GROUPS * LANES]
    dy_ptr,  # [N, OH, OW, 8 dy_stride8]
    index_ptr,  # [N, OH, OW, GROUPS * LANES] uint8
    dx_ptr,  # [N, H, W, C]
    # sizes
    n_columns,  # images * strips * columns of cells
    rows,  # cells of a column
    height,
    width,
    out_height,
    out_width,
    # strides
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
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    GATED: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx[pixel] = sum, over the windows that the pixel won, of the gradient of the normalisation;
    one program per BLOCK_V vectors of columns of `rows` cells. With GATED, masked by the ReLU that
    was pooled: where a window's maximum is closed, so is the pixel that it is.

    A step takes the gradient of one row of windows and keeps it for OPEN rows of cells. Pixels of
    a cell beyond its first K x K are in no window and left as they are.
    """
    OPEN: tl.constexpr = (K - 1) // STRIDE + 1
    SLOTS: tl.constexpr = GROUPS * LANES
    FIRST: tl.constexpr = PAD // STRIDE
    column, group = program_vectors(GROUPS, BLOCK_V)
    inside = column < n_columns
    cell_rows = (height - 1 + PAD) // STRIDE - FIRST + 1
    cell_columns = (width - 1 + PAD) // STRIDE - FIRST + 1
    strips = (cell_rows + rows - 1) // rows
    j = column % cell_columns + FIRST
    i0 = column // cell_columns % strips * rows + FIRST
    image = column // cell_columns // strips

    # gradient and winning tap of the windows (i - a, j - b), row by row
    dz = ()
    winner = ()
    for _ in tl.static_range(OPEN * OPEN):
        dz = dz + (tl.zeros((BLOCK_V, LANES), tl.float32),)
        winner = winner + (tl.full((BLOCK_V, LANES), 255, tl.int32),)
    for step in tl.range(0, rows + OPEN - 1):
        i = i0 + step - (OPEN - 1)
        new_dz = ()
        new_winner = ()
        for b in tl.static_range(OPEN):
            is_window = inside & (i >= 0) & (i < out_height) & (j - b >= 0) & (j - b < out_width)
            window = (image * out_height + i) * out_width + j - b
            pooled_rows = pooled_ptr + offsets(window, group, SLOTS, LANES)
            dy_rows = dy_ptr + offsets(window, group, dy_stride8 * 8, LANES)
            index_rows = index_ptr + offsets(window, group, SLOTS, LANES)
            x = load_lanes(pooled_rows, is_window, group, GROUPS, HALO_X, BLOCK_V, LANES)
            dy = load_lanes(dy_rows, is_window, group, GROUPS, HALO_DY, BLOCK_V, LANES)
            tile = normalise_grad(
                x, dy, group, alpha_mean, k, C, SIZE, BETA, HALO_X, HALO_DY, BLOCK_V, LANES
            )
            if GATED:
                own = join_lanes(x[HALO_X * LANES : (HALO_X + 1) * LANES], BLOCK_V, LANES)
                tile = tl.where(is_open(own), tile, 0.0)
            new_dz = new_dz + (tile,)
            tap = load_tile(index_rows, is_window, 255, LANES)
            new_winner = new_winner + (tap.to(tl.int32),)
        dz = new_dz + dz[: OPEN * (OPEN - 1)]
        winner = new_winner + winner[: OPEN * (OPEN - 1)]
        for u in tl.static_range(STRIDE if STRIDE < K else K):
            for v in tl.static_range(STRIDE if STRIDE < K else K):
                dx_tile = tl.zeros((BLOCK_V, LANES), tl.float32)
                for a in tl.static_range((K - 1 - u) // STRIDE + 1):
                    for b in tl.static_range((K - 1 - v) // STRIDE + 1):
                        won = winner[a * OPEN + b] == (u + STRIDE * a) * K + v + STRIDE * b
                        dx_tile += tl.where(won, dz[a * OPEN + b], 0.0)
                row, w = i * STRIDE + u - PAD, j * STRIDE + v - PAD
                is_pixel = inside & (step >= OPEN - 1) & (row >= 0) & (row < height)
                is_pixel = is_pixel & (w >= 0) & (w < width)
                pixel = (image * height + row) * width + w
                store_tile(dx_ptr, dx_tile, pixel, group, is_pixel, C, BLOCK_V, LANES)


def launch_max_pool_lrn_fwd(
    x: torch.Tensor,
    y: torch.Tensor,
    pooled: torch.Tensor,
    index: torch.Tensor,
    norm: Norm,
    window: Window,
    config: VectorConfig,
    *,
    save: bool,
) -> None:
    """Fill `y`, [N, C, OH, OW] exactly channels last, and with `save` `pooled` and `index`, from
    `x` as `layout.for_kernels` gives it."""
    _, _, height, width = x.shape
    n, c, out_height, out_width = y.shape
    lanes = lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    n_pixels = n * out_height * out_width
    run(
        _max_pool_lrn_fwd_kernel,
        (cdiv(n_pixels * groups, config.block_v),),
        (
            *(x, y, pooled, index, n_pixels, height, width, out_height, out_width),
            *(x.stride(3) // ALIGN, norm.alpha_mean, norm.k),
        ),
        dict(
            C=c,
            GROUPS=groups,
            **norm.constants(lanes, backward=False),
            **window_constants(window),
            SAVE=save,
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )


def launch_max_pool_lrn_bwd(
    pooled: torch.Tensor,
    dy: torch.Tensor,
    index: torch.Tensor,
    dx: torch.Tensor,
    norm: Norm,
    window: Window,
    config: MarchConfig,
    *,
    gated: bool,
) -> None:
    """Fill `dx`, [N, C, H, W] exactly channels last; `dy` as `layout.for_kernels` gives it,
    `pooled` and `index` as forward made them. With `gated`, the pooled map is the output of a ReLU
    and dx the gradient before it."""
    n, c, height, width = dx.shape
    _, _, out_height, out_width = dy.shape
    lanes = lanes_of(dx.dtype)
    groups = pooled.shape[1] // lanes
    cells = window.cells(height)
    rows = min(config.rows, cells)
    columns = n * cdiv(cells, rows) * window.cells(width)
    clear_gaps(dx, window)
    run(
        _max_pool_lrn_bwd_kernel,
        (cdiv(columns * groups, config.block_v),),
        (
            *(pooled, dy, index, dx, columns, rows, height, width, out_height, out_width),
            *(dy.stride(3) // ALIGN, norm.alpha_mean, norm.k),
        ),
        dict(
            C=c,
            GROUPS=groups,
            **norm.constants(lanes, backward=True),
            **window_constants(window),
            GATED=gated,
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )

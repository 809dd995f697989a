"""Local response normalisation and then a max pool, as one kernel a direction.

A power for every tap of every window would be 2.25 powers an element where windows of 3 move by 2,
and bind the kernel to arithmetic. Forward therefore marches down the map: a thread owns a column of
windows, and a row that two of them share is normalised once. Neighbouring columns do share pixels
that are normalised twice; sharing those would take an exchange between threads.
"""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import ALIGN, Window
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.lrn import Norm, normalise, normalise_grad
from fused_inception.kernels.max_pool import (
    cell_position,
    clear_gaps,
    first_tap,
    gather_tiles,
    window_constants,
)
from fused_inception.kernels.tiles import is_open
from fused_inception.kernels.vectors import (
    join_lanes,
    lanes_of,
    load_lanes,
    offsets,
    program_vectors,
    split_lanes,
    store_tile,
)
from fused_inception.tuning.configs import MarchConfig, VectorConfig


@triton.jit
def beats(v, best):
    """Where `v`, met after `best`, is the new maximum."""
    return (v > best) | (v != v)


@triton.jit(
    do_not_specialize=[
        "n_columns",
        "rows",
        "height",
        "width",
        "out_height",
        "out_width",
        "x_stride8",
    ]
)
def _lrn_max_pool_fwd_kernel(
    # tensors
    x_ptr,  # [N, H, W, 8 x_stride8]
    y_ptr,  # [N, OH, OW, C]
    index_ptr,  # [N, OH, OW, GROUPS * LANES] uint8, winning tap of each window
    # sizes
    n_columns,  # images * strips * out_width
    rows,  # windows of a column
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
    """y = max over the taps of x * s ** -BETA, index = the tap; one program per BLOCK_V vectors of
    columns of `rows` windows.

    OPEN windows of a column see the same row of the map: it is normalised, and its maximum over K
    columns taken, once, and then offered to all of them.
    """
    OPEN: tl.constexpr = (K - 1) // STRIDE + 1
    column, group = program_vectors(GROUPS, BLOCK_V)
    inside = column < n_columns
    strips = (out_height + rows - 1) // rows
    j = column % out_width
    i0 = column // out_width % strips * rows
    image = column // out_width // strips
    w0 = j * STRIDE - PAD
    # rows beyond the last window of the strip are of no use
    end_row = tl.minimum(height, (i0 + rows - 1) * STRIDE + K - PAD)

    best = ()
    winner = ()
    for _ in tl.static_range(OPEN):
        best = best + (tl.full((BLOCK_V, LANES), float("-inf"), tl.float32),)
        winner = winner + (tl.zeros((BLOCK_V, LANES), tl.int32),)
    for step in tl.range(0, rows + OPEN - 1):
        i = i0 + step  # the window that begins in this step
        h0 = i * STRIDE - PAD
        fresh = tl.broadcast_to(first_tap(h0, w0, K)[:, None], (BLOCK_V, LANES))
        winner = (fresh,) + winner[1:]
        for u in tl.static_range(STRIDE if STRIDE < K else K):
            h = h0 + u
            is_row = inside & (h >= 0) & (h < end_row)
            row_best = tl.full((BLOCK_V, LANES), float("-inf"), tl.float32)
            row_winner = tl.zeros((BLOCK_V, LANES), tl.int32)
            x_rows = x_ptr + offsets(
                image * height * width + h * width + w0, group, x_stride8 * 8, LANES
            )
            for s in tl.static_range(K):
                is_pixel = is_row & (w0 + s >= 0) & (w0 + s < width)
                x = load_lanes(
                    x_rows + s * x_stride8 * 8, is_pixel, group, GROUPS, HALO, BLOCK_V, LANES
                )
                v = normalise(x, alpha_mean, k, SIZE, BETA, HALO, BLOCK_V, LANES)
                take = beats(v, row_best) & is_pixel[:, None]
                row_best = tl.where(take, v, row_best)
                row_winner = tl.where(take, s, row_winner)
            new_best = ()
            new_winner = ()
            for a in tl.static_range(OPEN):
                # row u of the window that begins here is row u + STRIDE * a of one further up
                tap = row_winner + (u + STRIDE * a) * K
                take = beats(row_best, best[a]) & (u + STRIDE * a < K)
                new_best = new_best + (tl.where(take, row_best, best[a]),)
                new_winner = new_winner + (tl.where(take, tap, winner[a]),)
            best = new_best
            winner = new_winner
        # the window that began OPEN - 1 steps ago is complete
        i -= OPEN - 1
        is_window = inside & (step >= OPEN - 1) & (i < out_height)
        pixel = (image * out_height + i) * out_width + j
        store_tile(y_ptr, best[OPEN - 1], pixel, group, is_window, C, BLOCK_V, LANES)
        if SAVE:
            store_tile(
                index_ptr, winner[OPEN - 1], pixel, group, is_window, GROUPS * LANES, BLOCK_V, LANES
            )
        best = (tl.full((BLOCK_V, LANES), float("-inf"), tl.float32),) + best[:-1]
        winner = (winner[0],) + winner[:-1]


@triton.jit(
    do_not_specialize=[
        "n_cells",
        "height",
        "width",
        "out_height",
        "out_width",
        "x_stride8",
        "dy_stride8",
    ]
)
def _lrn_max_pool_bwd_kernel(
    # tensors
    x_ptr,  # [N, H, W, 8 x_stride8]
    dy_ptr,  # [N, OH, OW, 8 dy_stride8]
    index_ptr,  # [N, OH, OW, GROUPS * LANES] uint8
    dx_ptr,  # [N, H, W, C]
    # sizes
    n_cells,
    height,
    width,
    out_height,
    out_width,
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
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    GATED: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradient of the normalisation at the gradient that each pixel gathers from its windows;
    one program per BLOCK_V vectors of cells. With GATED, masked by the ReLU that x is the output
    of.

    Pixels of a cell beyond its first K x K are in no window and left as they are.
    """
    cell, group = program_vectors(GROUPS, BLOCK_V)
    inside = cell < n_cells
    image, i, j = cell_position(cell, height, width, STRIDE, PAD)
    window = (image * out_height + i) * out_width + j
    dy_rows = dy_ptr + offsets(window, group, dy_stride8 * 8, LANES)
    index_rows = index_ptr + offsets(window, group, GROUPS * LANES, LANES)
    for u in tl.range(0, STRIDE if STRIDE < K else K):
        for v in tl.range(0, STRIDE if STRIDE < K else K):
            row, column = i * STRIDE + u - PAD, j * STRIDE + v - PAD
            is_pixel = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            tiles = gather_tiles(
                dy_rows, index_rows, is_pixel, group, i, j, u, v, out_height, out_width,
                dy_stride8 * 8, GROUPS, HALO_DY, K, STRIDE, BLOCK_V, LANES,
            )  # fmt: skip
            dz = ()
            for n in tl.static_range(2 * HALO_DY + 1):
                dz = dz + split_lanes(tiles[n], BLOCK_V, LANES)
            pixel = (image * height + row) * width + column
            x_rows = x_ptr + offsets(pixel, group, x_stride8 * 8, LANES)
            x = load_lanes(x_rows, is_pixel, group, GROUPS, HALO_X, BLOCK_V, LANES)
            dx_tile = normalise_grad(
                x, dz, group, alpha_mean, k, C, SIZE, BETA, HALO_X, HALO_DY, BLOCK_V, LANES
            )
            if GATED:
                own = join_lanes(x[HALO_X * LANES : (HALO_X + 1) * LANES], BLOCK_V, LANES)
                dx_tile = tl.where(is_open(own), dx_tile, 0.0)
            store_tile(dx_ptr, dx_tile, pixel, group, is_pixel, C, BLOCK_V, LANES)


def launch_lrn_max_pool_fwd(
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    norm: Norm,
    window: Window,
    config: MarchConfig,
    *,
    save: bool,
) -> None:
    """Fill `y`, [N, C, OH, OW] exactly channels last, and with `save` `index`, from `x` as
    `layout.for_kernels` gives it."""
    n, _, height, width = x.shape
    _, c, out_height, out_width = y.shape
    lanes = lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    rows = min(config.rows, out_height)
    columns = n * cdiv(out_height, rows) * out_width
    run(
        _lrn_max_pool_fwd_kernel,
        (cdiv(columns * groups, config.block_v),),
        (
            *(x, y, index, columns, rows, height, width, out_height, out_width),
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


def launch_lrn_max_pool_bwd(
    x: torch.Tensor,
    dy: torch.Tensor,
    index: torch.Tensor,
    dx: torch.Tensor,
    norm: Norm,
    window: Window,
    config: VectorConfig,
    *,
    gated: bool,
) -> None:
    """Fill `dx`, [N, C, H, W] exactly channels last; `x`, `dy` as `layout.for_kernels` gives
    them. With `gated`, x is the output of a ReLU and dx the gradient before it."""
    n, c, height, width = dx.shape
    _, _, out_height, out_width = dy.shape
    lanes = lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    cells = n * window.cells(height) * window.cells(width)
    clear_gaps(dx, window)
    run(
        _lrn_max_pool_bwd_kernel,
        (cdiv(cells * groups, config.block_v),),
        (
            *(x, dy, index, dx, cells, height, width, out_height, out_width),
            *(x.stride(3) // ALIGN, dy.stride(3) // ALIGN, norm.alpha_mean, norm.k),
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

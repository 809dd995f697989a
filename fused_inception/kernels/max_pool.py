"""Max pooling, forward with a 1-byte index of the winning tap, backward by gather.

torch's rule: the first maximum in row-major order wins, the last NaN wins, padding takes no part.
"""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import ALIGN, Window, even_share
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.vectors import (
    has_group,
    lanes_of,
    load_tile,
    offsets,
    program_vectors,
    store_tile,
)
from fused_inception.tuning.configs import MaskConfig, VectorConfig


@triton.jit
def window_position(pixel, out_height, out_width, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """(image, row, column) of tap (0, 0) of the window of each output pixel."""
    column = pixel % out_width
    row = pixel // out_width % out_height
    return pixel // out_width // out_height, row * STRIDE - PAD, column * STRIDE - PAD


@triton.jit
def first_tap(row, column, K: tl.constexpr):
    """The first tap inside the map: it wins a window of -inf alone."""
    return tl.maximum(-row, 0) * K + tl.maximum(-column, 0)


@triton.jit
def pool_tile(
    rows,  # [BLOCK_V] pointers to tap (0, 0)
    inside,
    row,
    column,
    height,
    width,
    x_stride,
    K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """(maximum, winning tap) of each window, [BLOCK_V, LANES] each; -inf where not `inside`.

    Maximum first, winner by comparison with it: both work on pairs of 16-bit numbers, where the
    choice tap by tap needs single numbers and more predicates than a thread has.
    """
    taps = ()
    for tap in tl.static_range(K * K):
        is_row = (row + tap // K >= 0) & (row + tap // K < height)
        is_column = (column + tap % K >= 0) & (column + tap % K < width)
        shift = (tap // K * width + tap % K) * x_stride
        v = load_tile(rows + shift, inside & is_row & is_column, float("-inf"), LANES)
        taps = taps + (v,)
    best = taps[0]
    for tap in tl.static_range(1, K * K):
        best = tl.maximum(best, taps[tap], propagate_nan=tl.PropagateNan.ALL).to(best.dtype)
    # the first that equals it; in a window of -inf alone taps outside do too
    first = tl.broadcast_to(first_tap(row, column, K)[:, None], (BLOCK_V, LANES))
    winner = first
    for n in tl.static_range(1, K * K + 1):
        winner = tl.where(taps[K * K - n] == best, K * K - n, winner)
    winner = tl.where(best == float("-inf"), first, winner)
    # a NaN is the maximum and equals nothing; of several the last is taken
    for tap in tl.static_range(K * K):
        winner = tl.where(taps[tap] != taps[tap], tap, winner)
    return best, winner


@triton.jit
def cell_position(cell, height, width, STRIDE: tl.constexpr, PAD: tl.constexpr):
    """(image, row, column) of each cell, counted through all images.

    Cell (i, j) is the STRIDE x STRIDE pixels at which windows (i - a, j - b) have the taps
    (u + STRIDE a, v + STRIDE b): pixel (u, v) of all cells sees the same taps of its windows.
    """
    FIRST: tl.constexpr = PAD // STRIDE
    rows = (height - 1 + PAD) // STRIDE - FIRST + 1
    columns = (width - 1 + PAD) // STRIDE - FIRST + 1
    row = cell // columns % rows + FIRST
    return cell // columns // rows, row, cell % columns + FIRST


@triton.jit
def gather_tiles(
    dy_rows,  # [BLOCK_V] pointers to the gradient of window (i, j) of each cell
    index_rows,  # [BLOCK_V] pointers to its index
    inside,
    group,
    i,
    j,
    u,
    v,
    out_height,
    out_width,
    dy_stride,
    GROUPS: tl.constexpr,
    HALO: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """Sums of the gradients of the windows that pixel (u, v) of each cell won, fp32.

    2 * HALO + 1 tiles [BLOCK_V, LANES]: those of HALO groups on both sides of the vectors too.
    """
    OPEN: tl.constexpr = (K - 1) // STRIDE + 1
    totals = ()
    for _ in tl.static_range(2 * HALO + 1):
        totals = totals + (tl.zeros((BLOCK_V, LANES), tl.float32),)
    for a in tl.static_range(OPEN):
        for b in tl.static_range(OPEN):
            r = u + STRIDE * a
            s = v + STRIDE * b
            if (r < K) & (s < K):
                is_row = (i - a >= 0) & (i - a < out_height)
                is_column = (j - b >= 0) & (j - b < out_width)
                is_window = inside & is_row & is_column
                back = a * out_width + b
                sums = ()
                for shift in tl.static_range(-HALO, HALO + 1):
                    mask = is_window & has_group(group, shift, GROUPS)
                    index_shift = shift * LANES - back * (GROUPS * LANES)
                    winner = load_tile(index_rows + index_shift, mask, 255, LANES)
                    dy_tile = load_tile(
                        dy_rows + (shift * LANES - back * dy_stride), mask, 0.0, LANES
                    )
                    won = winner.to(tl.int32) == r * K + s
                    total = totals[HALO + shift] + tl.where(won, dy_tile.to(tl.float32), 0.0)
                    sums = sums + (total,)
                totals = sums
    return totals


@triton.jit(
    do_not_specialize=["n_pixels", "height", "width", "out_height", "out_width", "x_stride8"]
)
def _max_pool_fwd_kernel(
    # tensors
    x_ptr,  # [N, H, W, 8 x_stride8]
    y_ptr,  # [P, Y_STRIDE] first channel of the slice
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
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """y[p, c] = max over the K * K taps of x, index[p, c] = the tap that has it; one program per
    BLOCK_V vectors of y."""
    pixel, group = program_vectors(GROUPS, BLOCK_V)
    inside = pixel < n_pixels
    image, row, column = window_position(pixel, out_height, out_width, STRIDE, PAD)
    rows = x_ptr + offsets(
        image * height * width + row * width + column, group, x_stride8 * 8, LANES
    )
    best, winner = pool_tile(
        rows, inside, row, column, height, width, x_stride8 * 8, K, BLOCK_V, LANES
    )
    store_tile(y_ptr, best, pixel, group, inside, C, BLOCK_V, LANES, Y_STRIDE)
    if SAVE:
        store_tile(index_ptr, winner, pixel, group, inside, GROUPS * LANES, BLOCK_V, LANES)


@triton.jit(
    do_not_specialize=["n_cells", "height", "width", "out_height", "out_width", "dy_stride8"]
)
def _max_pool_bwd_kernel(
    # tensors
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
    dy_stride8,
    # problem
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    # tile
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx[pixel] = sum of dy over the windows that the pixel won; one program per BLOCK_V vectors of
    cells.

    Pixels of a cell beyond its first K x K are in no window and left as they are.
    """
    cell, group = program_vectors(GROUPS, BLOCK_V)
    inside = cell < n_cells
    image, i, j = cell_position(cell, height, width, STRIDE, PAD)
    window = (image * out_height + i) * out_width + j
    dy_rows = dy_ptr + offsets(window, group, dy_stride8 * 8, LANES)
    index_rows = index_ptr + offsets(window, group, GROUPS * LANES, LANES)
    for u in tl.static_range(STRIDE if STRIDE < K else K):
        for v in tl.static_range(STRIDE if STRIDE < K else K):
            (dx_tile,) = gather_tiles(
                dy_rows, index_rows, inside, group, i, j, u, v, out_height, out_width,
                dy_stride8 * 8, GROUPS, 0, K, STRIDE, BLOCK_V, LANES,
            )  # fmt: skip
            row, column = i * STRIDE + u - PAD, j * STRIDE + v - PAD
            is_pixel = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = (image * height + row) * width + column
            store_tile(dx_ptr, dx_tile, pixel, group, is_pixel, C, BLOCK_V, LANES)


@triton.jit(
    do_not_specialize=[
        "n_cells", "chunk", "height", "width", "out_height", "out_width", "dy_stride8"
    ]
)  # fmt: skip
def _masked_max_pool_bwd_kernel(
    # tensors
    dy_ptr,  # [N, OH, OW, 8 dy_stride8]
    index_ptr,  # [N, OH, OW, C] uint8
    mask_ptr,  # [N, H, W, C / 8] uint8
    dx_ptr,  # [N, H, W, C]
    partial_ptr,  # [chunks, C] fp32
    # sizes
    n_cells,
    chunk,  # cells of one program, a multiple of BLOCK_CELLS
    height,
    width,
    out_height,
    out_width,
    # strides
    dy_stride8,
    # problem
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    # tile
    BLOCK_CELLS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx of `_max_pool_bwd_kernel` where the bit of the mask is set, else 0, and its sums over the
    chunk: x is the output of a ReLU.

    One program per (chunk of cells, BLOCK_G vectors of channels): sums are of channels.
    """
    BLOCK_V: tl.constexpr = BLOCK_CELLS * BLOCK_G
    GROUPS: tl.constexpr = C // LANES
    vector = tl.arange(0, BLOCK_V)
    lane = tl.arange(0, LANES)
    group = tl.program_id(1) * BLOCK_G + vector % BLOCK_G
    # the bits of a vector are in one byte
    byte = group * LANES // 8
    bit = (group * LANES % 8)[:, None] + lane[None, :]
    sums = tl.zeros((BLOCK_V, LANES), tl.float32)
    first = tl.program_id(0) * chunk
    for start in tl.range(first, tl.minimum(first + chunk, n_cells), BLOCK_CELLS):
        cell = start + vector // BLOCK_G
        inside = (cell < n_cells) & (group < GROUPS)
        image, i, j = cell_position(cell, height, width, STRIDE, PAD)
        window = (image * out_height + i) * out_width + j
        dy_rows = dy_ptr + offsets(window, group, dy_stride8 * 8, LANES)
        index_rows = index_ptr + offsets(window, group, C, LANES)
        for u in tl.static_range(STRIDE if STRIDE < K else K):
            for v in tl.static_range(STRIDE if STRIDE < K else K):
                (dx_tile,) = gather_tiles(
                    dy_rows, index_rows, inside, group, i, j, u, v, out_height, out_width,
                    dy_stride8 * 8, GROUPS, 0, K, STRIDE, BLOCK_V, LANES,
                )  # fmt: skip
                row, column = i * STRIDE + u - PAD, j * STRIDE + v - PAD
                is_pixel = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
                pixel = (image * height + row) * width + column
                byte_offs = pixel.to(tl.int64) * (C // 8) + byte
                bits = tl.load(mask_ptr + byte_offs, mask=is_pixel, other=0).to(tl.int32)
                is_open = ((bits[:, None] >> bit) & 1) != 0
                # select, never multiply: a closed gate stops NaN and infinity too
                dx_tile = tl.where(is_open, dx_tile.to(dx_ptr.dtype.element_ty), 0.0)
                store_tile(dx_ptr, dx_tile, pixel, group, is_pixel, C, BLOCK_V, LANES)
                sums += dx_tile.to(tl.float32)
    total = tl.sum(tl.reshape(sums, (BLOCK_CELLS, BLOCK_G, LANES)), axis=0)
    channel = (tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G))[:, None] * LANES + lane[None, :]
    tl.store(partial_ptr + tl.program_id(0) * C + channel, total, mask=channel < C)


def window_constants(window: Window) -> dict[str, int]:
    """The window's part of a kernel's constants."""
    return dict(K=window.kernel, STRIDE=window.stride, PAD=window.padding)


def clear_gaps(dx: torch.Tensor, window: Window) -> None:
    """Zero what a kernel that walks the windows leaves: pixels between windows that lie apart."""
    if window.stride > window.kernel:
        dx.zero_()


def launch_max_pool_fwd(
    x: torch.Tensor,
    y: torch.Tensor,
    index: torch.Tensor,
    window: Window,
    config: VectorConfig,
    *,
    save: bool,
) -> None:
    """Fill `y`, [N, C, OH, OW] exactly channels last or a channel slice of that, and with `save`
    `index`, from `x` as `layout.for_kernels` gives it."""
    _, _, height, width = x.shape
    n, c, out_height, out_width = y.shape
    lanes = lanes_of(x.dtype)
    groups = x.shape[1] // lanes
    n_pixels = n * out_height * out_width
    run(
        _max_pool_fwd_kernel,
        (cdiv(n_pixels * groups, config.block_v),),
        (x, y, index, n_pixels, height, width, out_height, out_width, x.stride(3) // ALIGN),
        dict(
            C=c,
            GROUPS=groups,
            **window_constants(window),
            Y_STRIDE=y.stride(3),
            SAVE=save,
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )


def launch_max_pool_bwd(
    dy: torch.Tensor,
    index: torch.Tensor,
    dx: torch.Tensor,
    window: Window,
    config: VectorConfig,
) -> None:
    """Fill `dx`, [N, C, H, W] exactly channels last; `dy` as `layout.for_kernels` gives it."""
    n, c, height, width = dx.shape
    _, _, out_height, out_width = dy.shape
    lanes = lanes_of(dy.dtype)
    groups = dy.shape[1] // lanes
    cells = n * window.cells(height) * window.cells(width)
    clear_gaps(dx, window)
    run(
        _max_pool_bwd_kernel,
        (cdiv(cells * groups, config.block_v),),
        (dy, index, dx, cells, height, width, out_height, out_width, dy.stride(3) // ALIGN),
        dict(
            C=c,
            GROUPS=groups,
            **window_constants(window),
            BLOCK_V=config.block_v,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )


def launch_masked_max_pool_bwd(
    dy: torch.Tensor,
    index: torch.Tensor,
    mask: torch.Tensor,
    dx: torch.Tensor,
    window: Window,
    config: MaskConfig,
) -> torch.Tensor:
    """Fill `dx` as `launch_max_pool_bwd` does, but behind the ReLU whose bits are in `mask`,
    [P, C / 8]; C is a multiple of 8.

    Returns its column sums over chunks of pixels, [chunks, C].
    """
    n, c, height, width = dx.shape
    _, _, out_height, out_width = dy.shape
    lanes = lanes_of(dy.dtype)
    cells = n * window.cells(height) * window.cells(width)
    chunk = even_share(cells, config.pixels, config.block_p)
    chunks = cdiv(cells, chunk)
    partial = torch.empty((chunks, c), dtype=torch.float32, device=dx.device)
    clear_gaps(dx, window)
    run(
        _masked_max_pool_bwd_kernel,
        (chunks, cdiv(c, config.block_c)),
        (
            dy,
            index,
            mask,
            dx,
            partial,
            cells,
            chunk,
            height,
            width,
            out_height,
            out_width,
            dy.stride(3) // ALIGN,
        ),
        dict(
            C=c,
            **window_constants(window),
            BLOCK_CELLS=config.block_p,
            BLOCK_G=config.block_c // lanes,
            LANES=lanes,
        ),
        num_warps=config.num_warps,
    )
    return partial

"""Gradients of an auxiliary classifier's pool and convolution: of filter, bias and input, in one
launch."""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import AvgWindow
from fused_inception.kernels.avg_pool_project import window_box, window_constants
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.tiles import is_open
from fused_inception.tuning.configs import AvgPoolProjectConfig


@triton.jit
def windows_of(at, size, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """(first, end) of the windows that pixel `at` of a side lies in; none between windows apart."""
    if KERNEL == 0:
        return at * OUT // size, ((at + 1) * OUT + size - 1) // size
    else:
        first = (tl.maximum(at - (KERNEL - 1), 0) + (STRIDE - 1)) // STRIDE
        return first, tl.minimum(at // STRIDE + 1, OUT)


@triton.jit
def load_dz(
    dy_ptr,  # [N, C_OUT, WINDOWS]
    y_ptr,  # [N, C_OUT, WINDOWS]
    offs_p,  # windows counted through all images
    mask_p,
    offs_co,
    C_OUT: tl.constexpr,
    WINDOWS: tl.constexpr,
):
    """[output channels, windows]: dy where the output was not <= 0, else 0."""
    image = (offs_p // WINDOWS).to(tl.int64) * (C_OUT * WINDOWS)
    offs = (image + offs_p % WINDOWS)[None, :] + (offs_co * WINDOWS)[:, None]
    mask = mask_p[None, :] & (offs_co < C_OUT)[:, None]
    dy_tile = tl.load(dy_ptr + offs, mask=mask, other=0.0)
    y_tile = tl.load(y_ptr + offs, mask=mask, other=0.0)
    # select, never multiply: a closed gate stops NaN and infinity too
    return tl.where(is_open(y_tile), dy_tile, 0.0)


@triton.jit
def _filter_tile(
    # tensors
    pooled_ptr,  # [P, S_IN]
    dy_ptr,  # [N, C_OUT, WINDOWS]
    y_ptr,
    out_ptr,  # [splits, S_IN, S_OUT] fp32
    # sizes
    pid,
    chunk,  # windows of one split, a multiple of BLOCK_P
    n_images,
    # problem
    S_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    S_OUT: tl.constexpr,
    WINDOWS: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[split, i, o] = sum over the split's windows of pooled[p, i] * dz[p, o]."""
    TILES_N: tl.constexpr = (S_OUT + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (S_IN + BLOCK_M - 1) // BLOCK_M * TILES_N
    split = pid // TILES
    offs_ci = pid % TILES // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_co = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_ci = offs_ci < S_IN
    last = tl.minimum((split + 1) * chunk, n_images * WINDOWS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(split * chunk, last, BLOCK_P, num_stages=1):
        offs_p = start + tl.arange(0, BLOCK_P)
        # by image: the compiler sees that neighbouring windows share it, and keeps loads wide
        mask_p = offs_p // WINDOWS < n_images
        pooled_offs = (offs_p.to(tl.int64) * S_IN)[:, None] + offs_ci[None, :]
        pooled_mask = mask_p[:, None] & mask_ci[None, :]
        pooled_tile = tl.load(pooled_ptr + pooled_offs, mask=pooled_mask, other=0.0)
        dz_tile = load_dz(dy_ptr, y_ptr, offs_p, mask_p, offs_co, C_OUT, WINDOWS)
        acc = tl.dot(tl.trans(pooled_tile), tl.trans(dz_tile), acc, input_precision=PRECISION)
    out_offs = (offs_ci * S_OUT)[:, None] + offs_co[None, :]
    out_mask = mask_ci[:, None] & (offs_co < S_OUT)[None, :]
    tl.store(out_ptr + split.to(tl.int64) * (S_IN * S_OUT) + out_offs, acc, mask=out_mask)


@triton.jit
def _bias_tile(
    # tensors
    dy_ptr,  # [N, C_OUT, WINDOWS]
    y_ptr,
    out_ptr,  # [splits, S_OUT] fp32
    # sizes
    pid,
    chunk,
    n_images,
    # problem
    C_OUT: tl.constexpr,
    S_OUT: tl.constexpr,
    WINDOWS: tl.constexpr,
    # tile
    BLOCK_CO: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """out[split, o] = sum of dz[p, o] over the split's windows."""
    TILES_CO: tl.constexpr = (S_OUT + BLOCK_CO - 1) // BLOCK_CO
    split = pid // TILES_CO
    offs_co = pid % TILES_CO * BLOCK_CO + tl.arange(0, BLOCK_CO)
    last = tl.minimum((split + 1) * chunk, n_images * WINDOWS)
    sums = tl.zeros((BLOCK_CO, BLOCK_P), tl.float32)
    for start in tl.range(split * chunk, last, BLOCK_P, num_stages=1):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p // WINDOWS < n_images
        dz_tile = load_dz(dy_ptr, y_ptr, offs_p, mask_p, offs_co, C_OUT, WINDOWS)
        sums += dz_tile.to(tl.float32)
    tl.store(out_ptr + split * S_OUT + offs_co, tl.sum(sums, axis=1), mask=offs_co < S_OUT)


@triton.jit
def _input_tile(
    # tensors
    w_ptr,  # [S_IN, S_OUT]
    dy_ptr,  # [N, C_OUT, WINDOWS]
    y_ptr,
    dx_ptr,  # [N, H, W, C_IN]
    # sizes
    image,
    pid_pixel,
    pid_ci,
    height,
    width,
    n_windows,  # of one image
    c_out,  # C_OUT
    # problem
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OVERLAP_ROWS: tl.constexpr,  # most windows that a pixel lies in
    OVERLAP_COLUMNS: tl.constexpr,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    S_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_PIXEL: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """dx[p, i] = sum over the windows around p of (sum over o of dz[window, o] w[o, i]) / pixels.

    The gradients of BLOCK_W windows are one product, from which pixels then gather their own.
    """
    WINDOWS: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    local_pixel = tl.arange(0, BLOCK_PIXEL)
    pixel = pid_pixel * BLOCK_PIXEL + local_pixel
    offs_ci = pid_ci * BLOCK_CI + tl.arange(0, BLOCK_CI)
    offs_co = tl.arange(0, BLOCK_CO)
    mask_ci = offs_ci < C_IN
    row, end_row = windows_of(pixel // width, height, OUT_HEIGHT, KERNEL, STRIDE)
    column, end_column = windows_of(pixel % width, width, OUT_WIDTH, KERNEL, STRIDE)
    w_offs = (offs_ci * S_OUT)[:, None] + offs_co[None, :]

    dx_tile = tl.zeros((BLOCK_PIXEL, BLOCK_CI), tl.float32)
    for window0 in tl.range(0, n_windows, BLOCK_W, num_stages=1):
        window = window0 + tl.arange(0, BLOCK_W)
        mask_w = window < WINDOWS
        top, bottom, left, right = window_box(
            window, height, width, OUT_HEIGHT, OUT_WIDTH, KERNEL, STRIDE
        )
        count = tl.where(mask_w, (bottom - top) * (right - left), 1).to(tl.float32)
        acc = tl.zeros((BLOCK_CI, BLOCK_W), tl.float32)
        for co0 in tl.range(0, c_out, BLOCK_CO, num_stages=1):
            w_mask = mask_ci[:, None] & (offs_co < S_OUT - co0)[None, :]
            w_tile = tl.load(w_ptr + co0 + w_offs, mask=w_mask, other=0.0)
            dz_tile = load_dz(
                dy_ptr, y_ptr, image * WINDOWS + window, mask_w, co0 + offs_co, C_OUT, WINDOWS
            )
            acc = tl.dot(w_tile, dz_tile, acc, input_precision=PRECISION)
        share = tl.trans(acc / count[None, :])
        for a in tl.static_range(OVERLAP_ROWS):
            for b in tl.static_range(OVERLAP_COLUMNS):
                at = (row + a) * OUT_WIDTH + column + b - window0
                inside = (row + a < end_row) & (column + b < end_column)
                inside = inside & (at >= 0) & (at < BLOCK_W)
                index = tl.broadcast_to(tl.where(inside, at, 0)[:, None], (BLOCK_PIXEL, BLOCK_CI))
                dx_tile += tl.where(inside[:, None], tl.gather(share, index, 0), 0.0)
    pixels_before = image.to(tl.int64) * (height * width) + pid_pixel * BLOCK_PIXEL
    mask = (pixel < height * width)[:, None] & mask_ci[None, :]
    dx_offs = (local_pixel * C_IN)[:, None] + offs_ci[None, :]
    tl.store(
        dx_ptr + pixels_before * C_IN + dx_offs, dx_tile.to(dx_ptr.dtype.element_ty), mask=mask
    )


@triton.jit(
    do_not_specialize=[
        "chunk16", "n_images", "n_windows", "height", "width", "c_out",
        "filter_programs", "bias_programs",
    ]
)  # fmt: skip
def _avg_pool_project_bwd_kernel(
    # tensors
    pooled_ptr,  # [P, S_IN]
    w_ptr,  # [S_IN, S_OUT]
    dy_ptr,  # [N, C_OUT, WINDOWS]
    y_ptr,  # [N, C_OUT, WINDOWS]
    filter_ptr,  # [splits, S_IN, S_OUT] fp32
    bias_ptr,  # [splits, S_OUT] fp32
    dx_ptr,  # [N, H, W, C_IN]
    # sizes
    chunk16,  # windows of one split in units of 16
    n_images,
    n_windows,  # of one image
    height,
    width,
    c_out,  # C_OUT
    filter_programs,
    bias_programs,
    # problem
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    OVERLAP_ROWS: tl.constexpr,
    OVERLAP_COLUMNS: tl.constexpr,
    C_IN: tl.constexpr,
    S_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    S_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_PIXEL: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Program ranges: partial gradients of the filter, of the bias (none where their number is 0),
    tiles of dx."""
    pid = tl.program_id(0)
    WINDOWS: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    TILES_CI: tl.constexpr = (C_IN + BLOCK_CI - 1) // BLOCK_CI
    if pid < filter_programs:
        _filter_tile(
            pooled_ptr, dy_ptr, y_ptr, filter_ptr, pid, chunk16 * 16, n_images,
            S_IN, C_OUT, S_OUT, WINDOWS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    elif pid < filter_programs + bias_programs:
        _bias_tile(
            dy_ptr, y_ptr, bias_ptr, pid - filter_programs, chunk16 * 16, n_images,
            C_OUT, S_OUT, WINDOWS, BLOCK_N, BLOCK_P,
        )  # fmt: skip
    else:
        tile = pid - filter_programs - bias_programs
        tiles_pixel = tl.cdiv(height * width, BLOCK_PIXEL)
        _input_tile(
            w_ptr, dy_ptr, y_ptr, dx_ptr,
            tile // TILES_CI // tiles_pixel, tile // TILES_CI % tiles_pixel, tile % TILES_CI,
            height, width, n_windows, c_out,
            OUT_HEIGHT, OUT_WIDTH, KERNEL, STRIDE, OVERLAP_ROWS, OVERLAP_COLUMNS,
            C_IN, C_OUT, S_OUT, PRECISION, BLOCK_PIXEL, BLOCK_CI, BLOCK_CO, BLOCK_W,
        )  # fmt: skip


def launch_avg_pool_project_bwd(
    dy: torch.Tensor,
    y: torch.Tensor,
    pooled: torch.Tensor,
    packed_w: torch.Tensor,
    dx: torch.Tensor,
    shape: tuple[int, ...],
    window: AvgWindow,
    config: AvgPoolProjectConfig,
    *,
    need_x: bool,
    need_w: bool,
    need_b: bool,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill `dx`, of `shape` [N, C_IN, H, W], exactly channels last, from `dy` and `y`, contiguous.

    packed_w: [slots of C_IN, 1, slots of C_OUT]; without `need_x` its shape alone is used, and dx
    is not. Returns the partial gradients of the filter, [splits, slots of C_IN, slots of C_OUT],
    and of the bias, [splits, slots of C_OUT], fp32; no split of what is not asked for.
    """
    n, c_in, height, width = shape
    _, c_out, out_height, out_width = y.shape
    s_in, _, s_out = packed_w.shape
    tile = config.wgrad.tile
    chunk, splits = config.wgrad.chunks(n * out_height * out_width)
    partial_w = dy.new_empty((splits if need_w else 0, s_in, s_out), dtype=torch.float32)
    partial_b = dy.new_empty((splits if need_b else 0, s_out), dtype=torch.float32)
    tiles_n = cdiv(s_out, tile.block_n)
    filter_programs = partial_w.shape[0] * cdiv(s_in, tile.block_m) * tiles_n
    bias_programs = partial_b.shape[0] * tiles_n
    tiles_pixel = cdiv(height * width, config.block_pixel)
    input_programs = n * tiles_pixel * cdiv(c_in, config.dgrad.block_m) if need_x else 0
    run(
        _avg_pool_project_bwd_kernel,
        (filter_programs + bias_programs + input_programs,),
        (
            pooled,
            packed_w,
            dy,
            y,
            partial_w,
            partial_b,
            dx,
            chunk // 16,
            n,
            out_height * out_width,
            height,
            width,
            c_out,
            filter_programs,
            bias_programs,
        ),
        dict(
            OUT_HEIGHT=out_height,
            OUT_WIDTH=out_width,
            **window_constants(window),
            OVERLAP_ROWS=window.overlap(height),
            OVERLAP_COLUMNS=window.overlap(width),
            C_IN=c_in,
            S_IN=s_in,
            C_OUT=c_out,
            S_OUT=s_out,
            PRECISION=precision,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_P=tile.block_k,
            BLOCK_PIXEL=config.block_pixel,
            BLOCK_CI=config.dgrad.block_m,
            BLOCK_CO=config.dgrad.block_k,
            BLOCK_W=config.dgrad.block_n,
        ),
        num_warps=config.num_warps,
    )
    return partial_w, partial_b

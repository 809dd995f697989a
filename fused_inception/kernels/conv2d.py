"""One convolution with bias and ReLU: 1x1, 3x3 or 5x5, stride 1, "same" padding; the tiles of a
module's launches."""

import torch
import triton
import triton.language as tl

from fused_inception.geometry import align_up
from fused_inception.kernels.conv import conv_tile
from fused_inception.kernels.dgrad import dgrad_tile
from fused_inception.kernels.finish import finish_bias, finish_filter
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter, pack_bias, pack_rows
from fused_inception.kernels.wgrad import wgrad_tile
from fused_inception.tuning.configs import ConvConfig, FinishConfig, split_width


@triton.jit
def _pack_filter_kernel(
    # tensors
    w_ptr,  # [C_OUT, C_IN, K, K], or in memory [C_OUT, K, K, C_IN] with CHANNELS_LAST
    b_ptr,  # [C_OUT]
    packed_w_ptr,  # [S_OUT, TAPS, S_IN]; with FOR_DGRAD [S_IN, TAPS backwards, S_OUT]
    packed_b_ptr,  # [S_OUT] fp32
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    S_IN: tl.constexpr,
    S_OUT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Copy, transpose and cast one filter; for a forward the last program packs its bias."""
    pid = tl.program_id(0)
    TILES: tl.constexpr = (S_OUT * TAPS * S_IN + BLOCK - 1) // BLOCK
    if pid < TILES:
        pack_rows(
            w_ptr, packed_w_ptr, pid,
            C_OUT, C_IN, TAPS, S_IN, S_OUT, S_OUT, CHANNELS_LAST, FOR_DGRAD, BLOCK,
        )  # fmt: skip
    elif not FOR_DGRAD:
        pack_bias(b_ptr, packed_b_ptr, C_OUT, S_OUT, BLOCK)


@triton.jit(do_not_specialize=["n_pixels", "height", "width", "x_stride8"])
def _conv2d_fwd_kernel(
    # tensors
    x_ptr,  # [P, x_stride]
    w_ptr,  # [S_OUT, K * K, S_IN]
    b_ptr,  # [S_OUT] fp32
    y_ptr,  # [P, Y_STRIDE]
    mask_ptr,  # [P, S_OUT / 8]
    moments_ptr,  # [tiles of pixels, 3, C_OUT] fp32 ahead of a BatchNorm, else None
    # sizes
    n_pixels,
    height,
    width,
    # strides
    x_stride8,
    # problem
    K: tl.constexpr,
    S_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    Y_STRIDE: tl.constexpr,
    MASK_STRIDE: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    TILES: tl.constexpr,
    TAIL: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """y = relu(conv(x, w) + b); with moments conv(x, w) alone, and its moments. Programs: TILES
    wide tiles of columns per tile of pixels, then one tail of width TAIL for each."""
    pid = tl.program_id(0)
    wide_end = tl.num_programs(0) // (TILES + (TAIL > 0)) * TILES
    if pid < wide_end:
        conv_tile(
            x_ptr, w_ptr, b_ptr, y_ptr, mask_ptr,
            pid // TILES, pid % TILES * BLOCK_CO, n_pixels, height, width, x_stride8 * 8,
            K, S_IN, C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            BLOCK_P, BLOCK_CO, BLOCK_CI, NUM_STAGES, moments_ptr,
        )  # fmt: skip
    elif TAIL > 0:
        conv_tile(
            x_ptr, w_ptr, b_ptr, y_ptr, mask_ptr,
            pid - wide_end, TILES * BLOCK_CO, n_pixels, height, width, x_stride8 * 8,
            K, S_IN, C_OUT, Y_STRIDE, MASK_STRIDE, SAVE, PRECISION,
            BLOCK_P, TAIL, BLOCK_CI, NUM_STAGES, moments_ptr,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_pixels", "height", "width"])
def _conv2d_dgrad_kernel(
    # tensors
    dz_ptr,  # [P, S_OUT]
    w_ptr,  # [S_IN, K * K, S_OUT] taps backwards
    x_ptr,  # [P, DX_STRIDE] output of the ReLU before, with GATED
    dx_ptr,  # [P, DX_STRIDE]
    partial_ptr,  # [tiles of pixels, DX_STRIDE] fp32 column sums, with GATED
    # sizes
    n_pixels,
    height,
    width,
    # problem
    K: tl.constexpr,
    S_IN: tl.constexpr,
    S_OUT: tl.constexpr,
    DX_STRIDE: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx = gradient of the convolution, masked by the ReLU before it with GATED; one program per
    tile."""
    TILES_CI: tl.constexpr = (DX_STRIDE + BLOCK_CI - 1) // BLOCK_CI
    pid = tl.program_id(0)
    dgrad_tile(
        dz_ptr, w_ptr, x_ptr, dx_ptr, partial_ptr,
        pid // TILES_CI, pid % TILES_CI * BLOCK_CI, n_pixels, height, width,
        K, S_IN, S_OUT, S_OUT, DX_STRIDE, GATED, DX_STRIDE, PRECISION,
        BLOCK_P, BLOCK_CI, BLOCK_CO, NUM_STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["chunk", "n_pixels", "height", "width", "x_stride8"])
def _conv2d_wgrad_kernel(
    # tensors
    x_ptr,  # [P, x_stride]
    dz_ptr,  # [P, S_OUT]
    out_ptr,  # [splits, K * K * S_IN, S_OUT] fp32
    # sizes
    chunk,
    n_pixels,
    height,
    width,
    # strides
    x_stride8,
    # problem
    K: tl.constexpr,
    S_IN: tl.constexpr,
    S_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Partial gradients of the filter; one program per (split, tile)."""
    wgrad_tile(
        x_ptr, x_ptr, dz_ptr, out_ptr,
        tl.program_id(0), chunk, n_pixels, height, width, x_stride8 * 8, S_OUT,
        K, S_IN, S_OUT, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P, NUM_STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "rows", "filter_programs"])
def _conv2d_finish_kernel(
    # tensors
    filter_ptr,  # [splits, TAPS * S_IN, S_OUT] fp32
    bias_ptr,  # [rows, BIAS_STRIDE] fp32, first column of the bias
    dw_ptr,  # [C_OUT, C_IN, K, K], or in memory [C_OUT, K, K, C_IN] with CHANNELS_LAST
    db_ptr,  # [C_OUT]
    # sizes
    splits,
    rows,
    filter_programs,
    # problem
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    TAPS: tl.constexpr,
    S_IN: tl.constexpr,
    S_OUT: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of the partial gradients, in fixed order: filter, then bias."""
    pid = tl.program_id(0)
    if pid < filter_programs:
        finish_filter(
            filter_ptr, dw_ptr, pid, splits,
            C_OUT, C_IN, TAPS, S_IN, S_OUT, CHANNELS_LAST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        finish_bias(
            bias_ptr, db_ptr, pid - filter_programs, rows, C_OUT, BIAS_STRIDE, BLOCK_M, BLOCK_N
        )


def launch_pack_filter(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, block: int = 2048
) -> tuple[torch.Tensor, torch.Tensor]:
    """One filter as [slots of C_OUT, K * K, slots of C_IN] in `dtype`, its bias in fp32.

    Without a bias it is packed for the data gradient: [slots of C_IN, K * K backwards, slots of
    C_OUT]. A bias of no elements is none, for a forward.
    """
    c_out, c_in, k, _ = weight.shape
    s_out, s_in = align_up(c_out), align_up(c_in)
    source = weight if is_channels_last_filter(weight) else weight.contiguous()
    shape = (s_in, k * k, s_out) if bias is None else (s_out, k * k, s_in)
    packed_w = torch.empty(shape, dtype=dtype, device=weight.device)
    packed_b = torch.empty(0 if bias is None else s_out, dtype=torch.float32, device=weight.device)
    run(
        _pack_filter_kernel,
        (cdiv(packed_w.numel(), block) + (bias is not None and bias.numel() > 0),),
        (source, packed_b if bias is None else bias.contiguous(), packed_w, packed_b),
        dict(
            C_IN=c_in,
            C_OUT=c_out,
            TAPS=k * k,
            S_IN=s_in,
            S_OUT=s_out,
            CHANNELS_LAST=is_channels_last_filter(source),
            FOR_DGRAD=bias is None,
            BLOCK=block,
        ),
        num_warps=4,
    )
    return packed_w, packed_b


def launch_conv2d_fwd(
    x: torch.Tensor,
    packed_w: torch.Tensor,
    packed_b: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    config: ConvConfig,
    *,
    kernel: int,
    save: bool,
    precision: str,
    moments: torch.Tensor | None = None,
) -> None:
    """Fill `y`, [N, C_OUT, H, W] exactly channels last; with `save` its ReLU bits in `mask`.

    With `moments`, ahead of a BatchNorm, neither bias nor ReLU is applied, `y` has the slots of
    C_OUT, and `moments` is filled: [tiles of pixels, 3, slots of C_OUT] fp32, mean and sum of
    squared deviations of each tile.

    x: [N, slots of C_IN, H, W] channels last, pixel stride a multiple of 8.
    """
    n, c_out, height, width = y.shape
    n_pixels = n * height * width
    tile = config.forward
    tiles, tail = split_width(c_out, tile.block_n, config.tail_n)
    run(
        _conv2d_fwd_kernel,
        (cdiv(n_pixels, tile.block_m) * (tiles + (tail > 0)),),
        (x, packed_w, packed_b, y, mask, moments, n_pixels, height, width, x.stride(3) // 8),
        dict(
            K=kernel,
            S_IN=packed_w.shape[2],
            C_OUT=c_out,
            Y_STRIDE=c_out,
            MASK_STRIDE=packed_w.shape[0] // 8,
            SAVE=save,
            PRECISION=precision,
            BLOCK_P=tile.block_m,
            BLOCK_CO=tile.block_n,
            BLOCK_CI=tile.block_k,
            TILES=tiles,
            TAIL=tail,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )


def launch_conv2d_dgrad(
    dz: torch.Tensor,
    packed_w: torch.Tensor,
    dx: torch.Tensor,
    gate: torch.Tensor | None,
    config: ConvConfig,
    *,
    kernel: int,
    precision: str,
) -> torch.Tensor:
    """Fill `dx`, [N, C_IN, H, W] exactly channels last, from `dz`, [N, slots of C_OUT, H, W] dense.

    With `gate`, the rounded output of the ReLU before, laid out as dx, the gradient is masked by it
    and the column sums of dx over each tile of pixels are returned, [tiles, C_IN] fp32; else no
    rows.
    """
    n, c_in, height, width = dx.shape
    n_pixels = n * height * width
    tile = config.dgrad
    tiles = cdiv(n_pixels, tile.block_m)
    partial = torch.empty(
        (0 if gate is None else tiles, c_in), dtype=torch.float32, device=dx.device
    )
    run(
        _conv2d_dgrad_kernel,
        (tiles * cdiv(c_in, tile.block_n),),
        (dz, packed_w, dx if gate is None else gate, dx, partial, n_pixels, height, width),
        dict(
            K=kernel,
            S_IN=packed_w.shape[0],
            S_OUT=packed_w.shape[2],
            DX_STRIDE=c_in,
            GATED=gate is not None,
            PRECISION=precision,
            BLOCK_P=tile.block_m,
            BLOCK_CI=tile.block_n,
            BLOCK_CO=tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    return partial


def launch_conv2d_wgrad(
    x: torch.Tensor,
    dz: torch.Tensor,
    config: ConvConfig,
    *,
    kernel: int,
    precision: str,
) -> torch.Tensor:
    """Partial filter gradients [splits, K * K * slots of C_IN, slots of C_OUT] in fp32."""
    n, s_in, height, width = x.shape
    n_pixels = n * height * width
    job = config.wgrad
    chunk, splits = job.chunks(n_pixels)
    rows, columns = kernel * kernel * s_in, dz.shape[1]
    out = torch.empty((splits, rows, columns), dtype=torch.float32, device=x.device)
    tiles = cdiv(rows, job.tile.block_m) * cdiv(columns, job.tile.block_n)
    run(
        _conv2d_wgrad_kernel,
        (tiles * splits,),
        (x, dz, out, chunk, n_pixels, height, width, x.stride(3) // 8),
        dict(
            K=kernel,
            S_IN=s_in,
            S_OUT=columns,
            PRECISION=precision,
            BLOCK_M=job.tile.block_m,
            BLOCK_N=job.tile.block_n,
            BLOCK_P=job.tile.block_k,
            NUM_STAGES=config.num_stages,
        ),
        num_warps=config.num_warps,
    )
    return out


def launch_conv2d_finish(
    partial_filter: torch.Tensor,
    partial_bias: torch.Tensor,
    dw: torch.Tensor,
    db: torch.Tensor,
    config: FinishConfig,
    *,
    taps: int,
) -> None:
    """Fill `dw` and `db` (0 elements: not needed) from partial sums, in fixed order.

    partial_filter: [splits, taps * slots of C_IN (or more rows), slots of C_OUT]; partial_bias: a
    view [rows, C_OUT or more] whose rows may lie apart.
    """
    c_out = max(dw.shape[0], db.shape[0])
    c_in = dw.shape[1] * dw.shape[2] * dw.shape[3] // taps if dw.numel() else 1
    filter_programs = (
        cdiv(c_in * taps, config.block_m) * cdiv(c_out, config.block_n) if dw.numel() else 0
    )
    run(
        _conv2d_finish_kernel,
        (filter_programs + cdiv(db.numel(), config.block_n),),
        (
            partial_filter,
            partial_bias,
            dw,
            db,
            partial_filter.shape[0],
            partial_bias.shape[0],
            filter_programs,
        ),
        dict(
            C_IN=c_in,
            C_OUT=c_out,
            TAPS=taps,
            S_IN=partial_filter.shape[1] // taps,
            S_OUT=partial_filter.shape[2],
            BIAS_STRIDE=partial_bias.stride(0),
            CHANNELS_LAST=is_channels_last_filter(dw),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
        ),
        num_warps=config.num_warps,
    )

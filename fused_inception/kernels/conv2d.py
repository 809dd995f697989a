"""One convolution with bias and ReLU: 1x1, 3x3 or 5x5, stride 1, "same" padding; the tiles of a
module's launches."""

import functools

import torch
import triton
import triton.language as tl

from fused_inception.geometry import align_up
from fused_inception.kernels.conv import conv_tile
from fused_inception.kernels.dgrad import dgrad_tile
from fused_inception.kernels.finish import BiasSum, FilterSum, Sums, Unfinished
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import launch_pack, row_packing
from fused_inception.kernels.wgrad import wgrad_tile
from fused_inception.tuning.configs import ConvConfig, split_width


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
        x_ptr, dz_ptr, out_ptr,
        tl.program_id(0), chunk, n_pixels, height, width, x_stride8 * 8, S_OUT,
        K, S_IN, S_OUT, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_P, NUM_STAGES,
    )  # fmt: skip


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


def conv2d_unfinished(
    partial_filter: torch.Tensor,
    partial_bias: torch.Tensor,
    dw: torch.Tensor,
    db: torch.Tensor,
    *,
    taps: int,
) -> Unfinished:
    """What launch F makes `dw` and `db` of; 0 elements: not needed.

    partial_filter: [splits, taps * slots of C_IN (or more rows), slots of C_OUT]; partial_bias: a
    view [rows, C_OUT or more] whose rows may lie apart.
    """
    c_out = max(dw.shape[0], db.shape[0])
    c_in = dw.shape[1] * dw.shape[2] * dw.shape[3] // taps if dw.numel() else 1
    splits, rows, row = partial_filter.shape
    sums = _sums(c_out, c_in, taps, rows // taps, row, partial_bias.stride(0))
    return Unfinished(sums, (dw,), (partial_filter,), (0,), (splits,), (db,), (partial_bias,))


@functools.lru_cache(maxsize=1024)
def _sums(c_out: int, c_in: int, taps: int, slot_in: int, row: int, bias_row: int) -> Sums:
    filters = (FilterSum(c_out, c_in, taps, slot_in, row, 0),)
    return Sums(filters, (BiasSum(c_out, bias_row, 0),))


def pack_filter(
    weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One filter as [slots of C_OUT, K * K, slots of C_IN] in `dtype`, its bias in fp32.

    Without a bias it is packed for the data gradient: [slots of C_IN, K * K backwards, slots of
    C_OUT]. A bias of no elements is none, for a forward.
    """
    c_out, c_in, k, _ = weight.shape
    biases = None if bias is None else [bias] if bias.numel() else []
    ((w, b),) = launch_pack([row_packing((c_out, c_in, k * k))], [weight], biases, dtype)
    rows, columns = (c_in, c_out) if bias is None else (c_out, c_in)
    return w.view(align_up(rows), k * k, align_up(columns)), b

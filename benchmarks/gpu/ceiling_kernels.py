"""Triton kernels that show what the device can do, not what the library does."""

import triton
import triton.language as tl


@triton.jit
def _gemm_kernel(
    # tensors
    a_ptr,  # [M, K]
    b_ptr,  # [K, N]
    c_ptr,  # [M, N]
    # sizes
    k_size,
    # problem
    N: tl.constexpr,
    K: tl.constexpr,
    # tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """c = a b; one program a tile, GROUP rows of tiles share their columns in the L2 cache.

    Sizes are multiples of the tile: nothing is masked.
    """
    pid = tl.program_id(0)
    tiles_n = N // BLOCK_N
    group = pid // (GROUP * tiles_n)
    within = pid % (GROUP * tiles_n)
    pid_m = group * GROUP + within % GROUP
    pid_n = within // GROUP
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * N + offs_n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # a run-time end: a constant one would be unrolled whole
    for _ in range(0, k_size, BLOCK_K):
        acc = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc, input_precision="tf32")
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    c_ptrs = c_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def _stream_kernel(
    # tensors
    x_ptr,  # [SIZE] int32, small enough to stay in the L2 cache
    y_ptr,  # [programs]
    # sizes
    n_blocks,
    # tile
    BLOCK: tl.constexpr,
):
    """y[program] = the largest of x: every program reads all of x, each from another block on."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    largest = tl.load(x_ptr + offs)
    for i in range(n_blocks):
        block = (i + pid) % n_blocks
        largest = tl.maximum(largest, tl.load(x_ptr + block * BLOCK + offs))
    tl.store(y_ptr + pid, tl.max(largest, axis=0))


@triton.jit
def _one_kernel(y_ptr):
    """y[0] = 1: as little as a launch can do."""
    tl.store(y_ptr, 1)


@triton.jit
def _descriptor_conv_kernel(
    # tensors
    x_desc,  # [N (H + 1) (W + 1), C_IN] zeros behind each row and each image
    w_desc,  # [C_OUT, 9 C_IN]
    b_ptr,  # [C_OUT] fp32
    y_ptr,  # [N H W, C_OUT]
    # sizes
    n_padded,
    height,
    width,
    n_steps,  # 9 C_IN / BLOCK_CI
    # problem
    C_IN: tl.constexpr,  # a multiple of BLOCK_CI
    C_OUT: tl.constexpr,
    # tile
    BLOCK_P: tl.constexpr,
    BLOCK_CO: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """y = relu(conv(x, w) + b), 3x3 of stride 1; one program a tile of padded pixels.

    What a descriptor reads outside of its tensor is zero: in front of the first image, behind the
    last, filters that are none.
    """
    TILES_CO: tl.constexpr = (C_OUT + BLOCK_CO - 1) // BLOCK_CO
    BLOCKS_CI: tl.constexpr = C_IN // BLOCK_CI
    p0 = tl.program_id(0) // TILES_CO * BLOCK_P
    co0 = tl.program_id(0) % TILES_CO * BLOCK_CO
    acc = tl.zeros((BLOCK_P, BLOCK_CO), tl.float32)
    for step in tl.range(0, n_steps, num_stages=NUM_STAGES):
        tap = step // BLOCKS_CI
        shift = (tap // 3 - 1) * (width + 1) + tap % 3 - 1
        x_tile = x_desc.load([p0 + shift, (step - tap * BLOCKS_CI) * BLOCK_CI])
        w_tile = w_desc.load([co0, step * BLOCK_CI])
        acc = tl.dot(x_tile, w_tile.T, acc)
    offs_p = p0 + tl.arange(0, BLOCK_P)
    offs_co = co0 + tl.arange(0, BLOCK_CO)
    column = offs_p % (width + 1)
    row = offs_p // (width + 1) % (height + 1)
    image = offs_p // (width + 1) // (height + 1)
    inside = (offs_p < n_padded) & (column < width) & (row < height)
    mask_co = offs_co < C_OUT
    bias = tl.load(b_ptr + offs_co, mask=mask_co, other=0.0)
    y_tile = tl.maximum(acc + bias[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)
    pixel = (image * height + row).to(tl.int64) * width + column
    y_offs = pixel[:, None] * C_OUT + offs_co[None, :]
    mask = inside[:, None] & mask_co[None, :]
    tl.store(y_ptr + y_offs, y_tile.to(y_ptr.dtype.element_ty), mask=mask)

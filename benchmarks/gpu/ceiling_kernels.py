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

"""Triton kernels and their launchers: the only place with `@triton.jit`, one family a file.

Legend, used in every file
    N               images
    H, W            height, width of a map (`height`, `width` at run time)
    P               N * H * W pixels of a map (`n_pixels`); `pid_p`, `offs_p`, `mask_p`: a tile of
                    them
    C_IN, C_OUT     channels read, channels produced; `offs_ci`, `offs_co`
    K               side of a square filter or window; `tap` = r * K + s counts its K * K positions
                    row by row
    slot            channel position in a scratch tensor where each branch starts at a multiple of 8
    *_STRIDE        elements from one pixel to the next, a compile-time constant of the problem
    *_stride8       the same at run time in units of 8 elements, so that the compiler knows its
                    alignment
    BLOCK_P, BLOCK_CO, BLOCK_CI
                    tile extents; in weight gradients BLOCK_M, BLOCK_N, BLOCK_P
    PRECISION       "tf32" or "ieee", of fp32 operands; 16-bit operands ignore it
    LANES, GROUPS, BLOCK_V
                    channels of a vector, vectors of a pixel, vectors of a program (`vectors.py`)

Names follow the thing, not the operation: lower case is a run-time number, upper case a
`tl.constexpr`. Activations are channels last, [P, C]. Products are accumulated in fp32 and rounded
once, at the store. Row bases are int64 scalars per tile, offsets inside a tile int32; kernels over
vectors have an int64 offset a vector. Scratch tensors hold zeros in the channels that pad a slot.
"""

"""Maps as lists of vectors: what the pooling and normalising kernels have in common.

A *vector* is LANES neighbouring channels of one pixel, 16 bytes of x: what a thread loads at once.
GROUPS vectors make a pixel. A program holds BLOCK_V vectors, counted along the channels and then
from pixel to pixel, so no thread is idle whatever the number of channels. Where channels meet their
neighbours, a tile [BLOCK_V, LANES] is taken apart into lanes, tensors [BLOCK_V] with one element a
thread: a shift along the channels is then the choice of another register.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def program_vectors(GROUPS: tl.constexpr, BLOCK_V: tl.constexpr):
    """(pixel, group) of the vectors of this program, [BLOCK_V] each."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_V
    local = (start % GROUPS).to(tl.int32) + tl.arange(0, BLOCK_V)
    return (start // GROUPS).to(tl.int32) + local // GROUPS, local % GROUPS


@triton.jit
def offsets(pixel, group, stride, LANES: tl.constexpr):
    """Elements from the first pixel's first channel to each vector, int64 [BLOCK_V]."""
    return pixel.to(tl.int64) * stride + group * LANES


@triton.jit
def has_group(group, shift: tl.constexpr, GROUPS: tl.constexpr):
    """Where the vector `shift` groups further is still of the same pixel."""
    return (group + shift >= 0) & (group + shift < GROUPS)


@triton.jit
def load_tile(rows, inside, other, LANES: tl.constexpr):
    """[BLOCK_V, LANES] from the pointers `rows` [BLOCK_V]; `other` where not `inside`."""
    return tl.load(rows[:, None] + tl.arange(0, LANES)[None, :], mask=inside[:, None], other=other)


@triton.jit
def store_tile(
    y_ptr,
    tile,
    pixel,
    group,
    inside,
    C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
    Y_STRIDE: tl.constexpr = None,
):
    """Store a tile into a map [P, C], dense or with pixels Y_STRIDE apart; channels from C on are
    no part of it."""
    lane = tl.arange(0, LANES)
    offs = (
        offsets(pixel, group, C if Y_STRIDE is None else Y_STRIDE, LANES)[:, None] + lane[None, :]
    )
    mask = inside[:, None]
    # groups fill slots of 8 channels: in fp32 the last one of a pixel may be all padding
    if C % 8 != 0:
        mask = mask & ((group * LANES)[:, None] + lane[None, :] < C)
    tl.store(y_ptr + offs, tile.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def split_lanes(tile, BLOCK_V: tl.constexpr, LANES: tl.constexpr):
    """The lanes of a tile, LANES tensors [BLOCK_V]."""
    even, odd = tl.split(tl.reshape(tile, (BLOCK_V, LANES // 2, 2)))
    if LANES == 4:
        l0, l2 = tl.split(even)
        l1, l3 = tl.split(odd)
        return (l0, l1, l2, l3)
    else:
        l04, l26 = tl.split(tl.reshape(even, (BLOCK_V, 2, 2)))
        l15, l37 = tl.split(tl.reshape(odd, (BLOCK_V, 2, 2)))
        l0, l4 = tl.split(l04)
        l1, l5 = tl.split(l15)
        l2, l6 = tl.split(l26)
        l3, l7 = tl.split(l37)
        return (l0, l1, l2, l3, l4, l5, l6, l7)


@triton.jit
def join_lanes(lanes, BLOCK_V: tl.constexpr, LANES: tl.constexpr):
    """The tile of LANES tensors [BLOCK_V]."""
    if LANES == 4:
        even = tl.join(lanes[0], lanes[2])
        odd = tl.join(lanes[1], lanes[3])
    else:
        even = tl.join(tl.join(lanes[0], lanes[4]), tl.join(lanes[2], lanes[6]))
        odd = tl.join(tl.join(lanes[1], lanes[5]), tl.join(lanes[3], lanes[7]))
        even = tl.reshape(even, (BLOCK_V, 4))
        odd = tl.reshape(odd, (BLOCK_V, 4))
    return tl.reshape(tl.join(even, odd), (BLOCK_V, LANES))


@triton.jit
def load_lanes(
    rows,
    inside,
    group,
    GROUPS: tl.constexpr,
    HALO: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """fp32 lanes of the vectors at `rows` and of HALO groups on both sides; 0 beyond the channels.

    Lanes that nobody reads cost nothing: the compiler narrows the load.
    """
    lanes = ()
    for shift in tl.static_range(-HALO, HALO + 1):
        mask = inside & has_group(group, shift, GROUPS)
        tile = load_tile(rows + shift * LANES, mask, 0.0, LANES)
        lanes = lanes + split_lanes(tile.to(tl.float32), BLOCK_V, LANES)
    return lanes


def lanes_of(dtype: torch.dtype) -> int:
    """Channels in 16 bytes."""
    return 16 // dtype.itemsize

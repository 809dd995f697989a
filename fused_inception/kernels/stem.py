"""The stem's convolutions together: conv1 reads images, conv2 is 1x1, conv3 3x3; packing of their
filters."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fused_inception.kernels.image_conv import ImageConv
from fused_inception.kernels.launch import cdiv, run
from fused_inception.kernels.pack import is_channels_last_filter, pack_bias, pack_rows


@dataclass(frozen=True)
class StemShape:
    """The three convolutions; `c2` and `c3` are the output channels of conv2 and conv3."""

    conv1: ImageConv
    c2: int
    c3: int

    def packed(self, flat: torch.Tensor, *, backward: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The filters of conv2 and conv3 in the result of `launch_stem_pack`, as launchers of
        single convolutions take them."""
        c1, c2, c3 = self.conv1.c_out, self.c2, self.c3
        w2, w3 = flat[: c1 * c2], flat[c1 * c2 :]
        if backward:
            return w2.view(c1, 1, c2), w3.view(c2, 9, c3)
        return w2.view(c2, 1, c1), w3.view(c3, 9, c2)


@triton.jit
def _stem_pack_kernel(
    # tensors
    w2_ptr,  # [C2, C1, 1, 1]
    w3_ptr,  # [C3, C2, 3, 3], or in memory [C3, 3, 3, C2] with LAST3
    b2_ptr,  # [C2]
    b3_ptr,  # [C3]
    w_ptr,  # [C2, C1] and [C3, 9, C2]; with FOR_DGRAD [C1, C2] and [C2, 9 backwards, C3]
    b_ptr,  # [C2 + C3] fp32
    # problem
    C1: tl.constexpr,
    C2: tl.constexpr,
    C3: tl.constexpr,
    LAST3: tl.constexpr,
    FOR_DGRAD: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Copy, transpose and cast both filters; for a forward the last program packs the biases."""
    pid = tl.program_id(0)
    D: tl.constexpr = FOR_DGRAD
    T2: tl.constexpr = (C2 * C1 + BLOCK - 1) // BLOCK
    T3: tl.constexpr = T2 + (C3 * 9 * C2 + BLOCK - 1) // BLOCK
    if pid < T2:
        pack_rows(w2_ptr, w_ptr, pid, C2, C1, 1, C1, C2, C2, False, D, BLOCK)
    elif pid < T3:
        pack_rows(w3_ptr, w_ptr + C2 * C1, pid - T2, C3, C2, 9, C2, C3, C3, LAST3, D, BLOCK)
    elif not FOR_DGRAD:
        pack_bias(b2_ptr, b_ptr, C2, C2, BLOCK)
        pack_bias(b3_ptr, b_ptr + C2, C3, C3, BLOCK)


def launch_stem_pack(
    w2: torch.Tensor,
    w3: torch.Tensor,
    biases: list[torch.Tensor] | None,
    dtype: torch.dtype,
    block: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters of conv2 and conv3, flat, in `dtype`, and both biases behind each other in fp32;
    without biases packed for the data gradients. `StemShape.packed` takes the filters apart."""
    (c2, c1), c3 = w2.shape[:2], w3.shape[0]
    source = w3 if is_channels_last_filter(w3) else w3.contiguous()
    elements = (c2 * c1, c3 * 9 * c2)
    packed_w = torch.empty(sum(elements), dtype=dtype, device=w2.device)
    packed_b = torch.empty(c2 + c3 if biases else 0, dtype=torch.float32, device=w2.device)
    run(
        _stem_pack_kernel,
        (sum(cdiv(n, block) for n in elements) + (biases is not None),),
        (
            w2.contiguous(),
            source,
            *([b.contiguous() for b in biases] if biases else [packed_b] * 2),
            packed_w,
            packed_b,
        ),
        dict(
            C1=c1,
            C2=c2,
            C3=c3,
            LAST3=is_channels_last_filter(source),
            FOR_DGRAD=not biases,
            BLOCK=block,
        ),
        num_warps=4,
    )
    return packed_w, packed_b

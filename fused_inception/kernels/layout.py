"""Where each filter and bias of a module lies in the packed buffers."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from fused_inception.geometry import InceptionDims, align_up


@dataclass(frozen=True)
class PackedLayout:
    """Element offsets of the packed filters and biases; channels and rows are padded to slots.

    Filters are [C_OUT, taps, C_IN]. The 1x1 convolutions that read x (1x1 branch, 3x3 reduce, 5x5
    reduce) follow each other as one matrix [cat_rows, C_IN]; then 3x3, 5x5, projection. Packed for
    the data gradients they are [C_IN, taps backwards, C_OUT] at the same offsets, the first matrix
    [C_IN, cat_rows]. Biases come in the same order.
    """

    dims: InceptionDims

    @cached_property
    def slots_in(self) -> int:
        """Channels of x, padded."""
        return align_up(self.dims.in_channels)

    @cached_property
    def cat_rows(self) -> int:
        """Rows of the concatenated 1x1 filters, padding included."""
        return align_up(self.dims.ch1x1) + self.dims.reduced_channels

    @cached_property
    def w3(self) -> int:
        """First element of the 3x3 filters."""
        return self.cat_rows * self.slots_in

    @cached_property
    def w5(self) -> int:
        """First element of the 5x5 filters."""
        return self.w3 + align_up(self.dims.ch3x3) * 9 * align_up(self.dims.ch3x3red)

    @cached_property
    def wp(self) -> int:
        """First element of the projection filters."""
        taps = self.dims.kernel_5x5**2
        return self.w5 + align_up(self.dims.ch5x5) * taps * align_up(self.dims.ch5x5red)

    @cached_property
    def filter_elements(self) -> int:
        """Elements of all packed filters."""
        return self.wp + align_up(self.dims.pool_proj) * self.slots_in

    @cached_property
    def r3(self) -> int:
        """First bias of the 3x3 reduce."""
        return align_up(self.dims.ch1x1)

    @cached_property
    def b3(self) -> int:
        """First bias of the 3x3 branch."""
        return self.cat_rows

    @cached_property
    def b5(self) -> int:
        """First bias of the 5x5 branch."""
        return self.b3 + align_up(self.dims.ch3x3)

    @cached_property
    def bp(self) -> int:
        """First bias of the projection."""
        return self.b5 + align_up(self.dims.ch5x5)

    @cached_property
    def bias_elements(self) -> int:
        """Elements of all packed biases."""
        return self.bp + align_up(self.dims.pool_proj)


@lru_cache(maxsize=1024)
def branch_constants(widths: tuple[int, ...]) -> dict[str, int]:
    """Widths and slots of up to four branches side by side, as kernels take them."""
    n1, n3, n5, np = (*widths, 0, 0, 0)[:4]
    slot3 = align_up(n1)
    slot5 = slot3 + align_up(n3)
    slot_p = slot5 + align_up(n5)
    return dict(
        N1=n1,
        N3=n3,
        N5=n5,
        NP=np,
        SLOT_3=slot3,
        SLOT_5=slot5,
        SLOT_P=slot_p,
        SLOTS=slot_p + align_up(np),
    )

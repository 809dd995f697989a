"""Launch configurations: what a launcher may be told about tiles, warps and stages, as plain frozen
data."""

from dataclasses import dataclass

from fused_inception.geometry import align_up

REACH = 2**30  # elements of a split at the most, where offsets have 32 bits


@dataclass(frozen=True)
class Tile:
    """Extent of one program's tile: rows (pixels), columns (channels), and the step of its
    reduction."""

    block_m: int
    block_n: int
    block_k: int


def split_width(width: int, block_n: int, tail_n: int) -> tuple[int, int]:
    """(number of wide tiles, width of the tail tile or 0) that cover `width` channels."""
    if tail_n == 0:
        return -(-width // block_n), 0
    return max(0, -(-(width - tail_n) // block_n)), tail_n


@dataclass(frozen=True)
class PointwiseConfig:
    """Launch A: the 1x1 GEMM and the pool branch."""

    gemm: Tile
    tail_n: int  # width of the last column tile, 0 for uniform tiles
    pool: Tile
    pool_in_launch: bool
    num_warps: int
    num_stages: int
    pool_warps: int


@dataclass(frozen=True)
class BranchesConfig:
    """Launch B: the 3x3 and the 5x5 branch as two ranges of one launch."""

    conv3: Tile
    tail_n: int  # width of the last column tile of conv3, 0 for uniform tiles
    conv5: Tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MaskConfig:
    """Masking of a gradient by ReLU bits, with its column sums: launch M, and the gradient of a max
    pool behind a ReLU, which counts cells for pixels. Each program walks `pixels` of them, a
    multiple of `block_p`."""

    block_p: int
    block_c: int
    pixels: int
    num_warps: int


@dataclass(frozen=True)
class StatisticsConfig:
    """BatchNorm's statistics: rows of moments and channels that a program takes at once."""

    block_r: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class NormConfig:
    """A pass over raw results ahead of or behind a BatchNorm; where it sums, a program walks
    `pixels` pixels, a multiple of `block_p`."""

    block_p: int
    block_c: int
    pixels: int
    num_warps: int


@dataclass(frozen=True)
class DgradConfig:
    """Launch L1: gradients of the reduced maps (3x3, 5x5) and of the pooled map."""

    conv3: Tile
    tail_n: int  # width of the last column tile of conv3, 0 for uniform tiles
    conv5: Tile
    pool: Tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class InputGradConfig:
    """Launch L2: the gradient of x, one GEMM over the concatenated branches behind the gather of
    the pool."""

    gemm: Tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class WgradJob:
    """One filter gradient of launch L3: its tile (rows are filter positions, columns output
    channels) and split."""

    tile: Tile
    splits: int

    def chunks(self, n_pixels: int, columns: int = 0) -> tuple[int, int]:
        """(pixels of one split, number of splits): whole steps of the reduction, no empty split.

        columns: of the gradient [n_pixels, columns], where a kernel's offsets in it begin at the
        split; splits are then short enough for 32 bits, whatever their number was to be.
        """
        step = self.tile.block_k
        splits = max(self.splits, -(-n_pixels * columns // REACH))
        chunk = max(step, align_up(-(-n_pixels // splits), step))
        return chunk, -(-n_pixels // chunk)


@dataclass(frozen=True)
class WgradConfig:
    """Launch L3: five groups of filter gradients, each split over the pixels."""

    conv3: WgradJob
    conv5: WgradJob
    branch1: WgradJob
    reduces: WgradJob
    projection: WgradJob
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NaiveConfig:
    """The naive module forward: three convolutions as ranges of one launch."""

    conv1: Tile
    conv3: Tile
    conv5: Tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class NaiveWgradConfig:
    """Its three filter gradients, likewise."""

    conv1: WgradJob
    conv3: WgradJob
    conv5: WgradJob
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class FinishConfig:
    """Launch F: sums of the partial results, in fixed order."""

    block_m: int
    block_n: int
    num_warps: int


@dataclass(frozen=True)
class GlobalPoolConfig:
    """Global average pooling: pixels and channels that a program holds at once."""

    block_p: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class AvgPoolProjectConfig:
    """Average pool and 1x1 convolution. Forward: rows are output channels, columns windows, the
    step is of input channels, of which `taps` pixels are loaded at a time. Input gradient: rows are
    input channels, columns windows, the step is of output channels; `block_pixel` pixels gather
    from them."""

    forward: Tile
    taps: int
    wgrad: WgradJob
    dgrad: Tile
    block_pixel: int
    forward_warps: int
    num_warps: int


@dataclass(frozen=True)
class ImageConvConfig:
    """A convolution of images: forward, weight gradient, gradient of the image."""

    forward: Tile
    wgrad: WgradJob
    dgrad: Tile
    num_warps: int


@dataclass(frozen=True)
class StemConvConfig:
    """The stem's first convolution, of a packed image: forward; the step divides 64."""

    forward: Tile
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PackedWgradConfig:
    """The filter gradient of that convolution alone."""

    wgrad: WgradJob
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ConvConfig:
    """One "same" convolution: forward (pixels, output, input channels), its data and its weight
    gradient."""

    forward: Tile
    tail_n: int  # width of the last column tile of forward, 0 for uniform tiles
    dgrad: Tile
    wgrad: WgradJob
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class EpilogueConfig:
    """A pass behind a library's convolution: pixels and channels of a program."""

    block_p: int
    block_c: int
    num_warps: int


@dataclass(frozen=True)
class StemWgradConfig:
    """All filter gradients of the stem in one launch, and the column sums for a bias."""

    conv1: WgradJob
    conv2: WgradJob
    conv3: WgradJob
    sums: MaskConfig
    num_warps: int
    num_stages: int

    def tiles(self) -> dict[str, int]:
        """The kernel's tile constants."""
        jobs = {"1": self.conv1.tile, "2": self.conv2.tile, "3": self.conv3.tile}
        constants = {f"M{name}": tile.block_m for name, tile in jobs.items()}
        constants |= {f"N{name}": tile.block_n for name, tile in jobs.items()}
        constants |= {f"P{name}": tile.block_k for name, tile in jobs.items()}
        return constants | {"BLOCK_P": self.sums.block_p, "BLOCK_C": self.sums.block_c}


@dataclass(frozen=True)
class VectorConfig:
    """A kernel over vectors of channels, one or more a thread."""

    block_v: int
    num_warps: int


@dataclass(frozen=True)
class MarchConfig:
    """The same, where a thread goes down `rows` rows of windows or of cells."""

    rows: int
    block_v: int
    num_warps: int

"""Numbers only: output sizes, paddings, the widths of an Inception module, its slices."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

ALIGN = 8  # channels: 16 bytes in 16-bit types, the widest vector load
# as many input channels at the most are read as an image, one element at a time
IMAGE_CHANNELS = 4
IMAGE_POSITIONS = 256  # weights of one of its filters: channels x rows x columns
# of partial sums: so many are a small part of a step; so many a GPU's L2 cache holds
FEW_BYTES, CACHE_BYTES = 16 * 2**20, 48 * 2**20
# above so many the partial sums of a map's tiles are summed in stages: 256 tiles of 256, 512 of 128
MANY_PIXELS = 2**16
# of max pools: kernels unroll its taps, registers and compilers are good for so many
LARGEST_WINDOW = 3
# windows of an average pool over one pixel, and channels of a local response norm: kernels unroll
# these too, and would take minutes to compile
MOST_OVERLAPS = 16
LARGEST_NORM = 32
AUX_CHANNELS = 128  # filters of the 1x1 convolution in an auxiliary head
# GoogLeNets: the paper's, torchvision's, and torchvision's with filters of 5x5
VARIANTS = ("paper", "torchvision", "torchvision5x5")


class TooSmallError(ValueError):
    """A window does not fit the map that it is to look at: the images are too small."""


def align_up(n: int, multiple: int = ALIGN) -> int:
    """The smallest multiple of `multiple` that is not below `n`."""
    return -(-n // multiple) * multiple


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def even_share(n_pixels: int, planned: int, block: int) -> int:
    """Pixels of each program, in whole blocks, where a configuration plans so many for the next
    power of two above: as many programs as planned, none of them with less to do."""
    programs = -(-power_of_two(n_pixels) // planned)
    return align_up(max(1, -(-n_pixels // programs)), block)


def finished_together(sizes: Sequence[int]) -> list[int]:
    """Behind which modules of a trunk launch F comes, from the bytes of their partial sums in the
    order of backward: behind as many as are few together, else every second where a cache holds
    two, else each. Which two does not go by sizes, so that most batches launch the same kernels."""
    ends, count, waiting = [], 0, 0
    for i, size in enumerate(sizes):
        if count and waiting + size > CACHE_BYTES:
            ends.append(i - 1)
            count = waiting = 0
        count, waiting = count + 1, waiting + size
        if i == len(sizes) - 1 or (waiting > FEW_BYTES and count % 2 == 0):
            ends.append(i)
            count = waiting = 0
    return ends


def sums_in_stages(n_pixels: int) -> bool:
    """Whether tiles of a map are so many that their partial sums are first summed in groups."""
    return n_pixels > MANY_PIXELS


@dataclass(frozen=True)
class InceptionDims:
    """Widths of one Inception module with dimension reduction (figure 2b of the paper).

    Two numberings of channels exist. *Offsets* are exact and describe the output: branch after
    branch with no gap. *Slots* are private to scratch tensors (reduced maps, masked gradients,
    masks): each branch starts at a multiple of 8 channels, so that every access there can be 16
    bytes wide; for GoogLeNet's widths both agree.
    """

    in_channels: int
    ch1x1: int
    ch3x3red: int
    ch3x3: int
    ch5x5red: int
    ch5x5: int
    pool_proj: int
    kernel_5x5: int = 5

    @property
    def widths(self) -> tuple[int, int, int, int, int, int, int]:
        """The seven widths in the order in which `Inception` takes them."""
        return (
            self.in_channels,
            self.ch1x1,
            self.ch3x3red,
            self.ch3x3,
            self.ch5x5red,
            self.ch5x5,
            self.pool_proj,
        )

    @property
    def out_channels(self) -> int:
        """Channels of the concatenation."""
        return self.ch1x1 + self.ch3x3 + self.ch5x5 + self.pool_proj

    @property
    def branch_widths(self) -> tuple[int, int, int, int]:
        """Widths of the four branches in the order of the concatenation."""
        return self.ch1x1, self.ch3x3, self.ch5x5, self.pool_proj

    @property
    def offsets(self) -> tuple[int, ...]:
        """First output channel of the 1x1, 3x3, 5x5 and pool branch."""
        return _starts(self.branch_widths)

    @property
    def slots(self) -> tuple[int, ...]:
        """First channel of each branch in a scratch tensor (masked gradient, mask bits)."""
        return _starts(tuple(align_up(n) for n in self.branch_widths))

    @property
    def slot_channels(self) -> int:
        """Channels of such a scratch tensor."""
        return sum(align_up(n) for n in self.branch_widths)

    @property
    def reduced_channels(self) -> int:
        """Channels of the scratch tensor that holds both reductions."""
        return align_up(self.ch3x3red) + align_up(self.ch5x5red)

    @property
    def filter_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of the six filters: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection."""
        c, k = self.in_channels, self.kernel_5x5
        return (
            (self.ch1x1, c, 1, 1),
            (self.ch3x3red, c, 1, 1),
            (self.ch3x3, self.ch3x3red, 3, 3),
            (self.ch5x5red, c, 1, 1),
            (self.ch5x5, self.ch5x5red, k, k),
            (self.pool_proj, c, 1, 1),
        )

    @property
    def weights(self) -> int:
        """Elements of the six filters together."""
        return sum(prod(shape) for shape in self.filter_shapes)


@dataclass(frozen=True)
class NaiveDims:
    """Widths of one naive Inception module (figure 2a); offsets and slots as in `InceptionDims`."""

    in_channels: int
    ch1x1: int
    ch3x3: int
    ch5x5: int

    @property
    def conv_widths(self) -> tuple[int, int, int]:
        """Widths of the three convolutions, which have filters, biases and ReLU."""
        return self.ch1x1, self.ch3x3, self.ch5x5

    @property
    def branch_widths(self) -> tuple[int, int, int, int]:
        """Widths of the four branches in the order of the concatenation; the pool keeps all."""
        return *self.conv_widths, self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the concatenation."""
        return sum(self.branch_widths)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First output channel of the 1x1, 3x3, 5x5 and pool branch."""
        return _starts(self.branch_widths)

    @property
    def slots(self) -> tuple[int, ...]:
        """First channel of each convolution in a scratch tensor (masked gradient, mask bits)."""
        return _starts(tuple(align_up(n) for n in self.conv_widths))

    @property
    def slot_channels(self) -> int:
        """Channels of such a scratch tensor."""
        return sum(align_up(n) for n in self.conv_widths)

    @property
    def filter_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of the three filters: 1x1, 3x3, 5x5."""
        c = self.in_channels
        return (self.ch1x1, c, 1, 1), (self.ch3x3, c, 3, 3), (self.ch5x5, c, 5, 5)


@dataclass(frozen=True)
class GoogLeNetSizes:
    """Sides of the maps of GoogLeNet; each field is named after the layer that makes it.

    The convolutions behind the first one and the Inception modules keep the side: 3a and 3b work at
    `maxpool2`, 4a to 4e and the auxiliary heads at `maxpool3`, 5a and 5b at `maxpool4`.
    """

    conv1: int
    maxpool1: int
    maxpool2: int
    maxpool3: int
    maxpool4: int

    def module(self, name: str) -> int:
        """Side of the map that the Inception module `name` ("3a" to "5b") reads and writes."""
        return {"3": self.maxpool2, "4": self.maxpool3, "5": self.maxpool4}[name[0]]


def check_googlenet(variant: str, image_size: int, aux_logits: bool) -> None:
    """What every GoogLeNet asks of its first arguments.

    Raises:
        ValueError: unknown variant; heads of the paper's network and images too small for them.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    if variant == "paper" and aux_logits and image_size < (least := smallest_image(variant, True)):
        raise ValueError(
            f"image_size must be at least {least} with the paper's heads, "
            f"got {image_size}; aux_logits=False does without them"
        )


def googlenet_sizes(image_size: int, pool4_kernel: int = 3) -> GoogLeNetSizes:
    """Sides of the maps for images of side `image_size`; torchvision has a `pool4_kernel` of 2.

    Raises:
        TooSmallError: the image is smaller than `smallest_image`.
    """
    conv1 = conv_out(image_size, kernel=7, stride=2, padding=3)
    maxpool1 = pool_out(conv1, kernel=3, stride=2, ceil_mode=True)
    maxpool2 = pool_out(maxpool1, kernel=3, stride=2, ceil_mode=True)
    maxpool3 = pool_out(maxpool2, kernel=3, stride=2, ceil_mode=True)
    maxpool4 = pool_out(maxpool3, kernel=pool4_kernel, stride=2, ceil_mode=True)
    return GoogLeNetSizes(conv1, maxpool1, maxpool2, maxpool3, maxpool4)


@functools.cache
def smallest_image(variant: str, heads: bool) -> int:
    """Side of the smallest images that a GoogLeNet takes; with `heads`, in training with auxiliary
    classifiers, too, of which torchvision's take any map."""
    paper, side = variant == "paper", 0
    while True:
        side += 1
        with contextlib.suppress(TooSmallError):
            sizes = googlenet_sizes(side, pool4_kernel=3 if paper else 2)
            if paper and heads:
                aux_features(sizes.maxpool3)
            return side


def aux_features(map_size: int) -> int:
    """Inputs of the first linear layer of the paper's auxiliary head.

    `map_size` is the side of the incoming map. A 5x5 average pool of stride 3 (ceil rule) and
    128 1x1 filters follow: 14 -> 4 -> 128 * 4 * 4 = 2048.

    Raises:
        ValueError: `map_size` is below 3.
    """
    return AUX_CHANNELS * pool_out(map_size, kernel=5, stride=3, ceil_mode=True) ** 2


def conv_out(size: int, kernel: int, stride: int = 1, padding: int = 0) -> int:
    """Output side of a convolution: floor((size + 2 padding - kernel) / stride) + 1.

    Raises:
        ValueError: the window is larger than the padded input.
    """
    return _at_least_one((size + 2 * padding - kernel) // stride + 1, size, kernel, padding)


def pool_out(size: int, kernel: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> int:
    """Output side of a pooling window, by the rule that Caffe and PyTorch share.

    floor or, with `ceil_mode`, ceil of (size + 2 padding - kernel) / stride, plus 1; a last window
    that would start beyond the input and its left padding is dropped.

    Raises:
        ValueError: no window is left.
    """
    span = size + 2 * padding - kernel
    windows = (-(-span // stride) if ceil_mode else span // stride) + 1
    if ceil_mode and (windows - 1) * stride >= size + padding:
        windows -= 1
    return _at_least_one(windows, size, kernel, padding)


def why_no_conv_kernel(c_in: int, kernel: int, stride: int, padding: int) -> str | None:
    """Why no kernel of ours computes such a convolution; None where one does."""
    if c_in <= IMAGE_CHANNELS and c_in * kernel * kernel <= IMAGE_POSITIONS:
        return None
    if kernel in (1, 3, 5) and stride == 1 and padding == kernel // 2:
        return None
    return (
        f"kernel {kernel}, stride {stride}, padding {padding} of {c_in} channels: kernels exist "
        'for 1x1, 3x3 and 5x5 of stride 1 with "same" padding, and for images of up to '
        f"{IMAGE_CHANNELS} channels with at most {IMAGE_POSITIONS} weights a filter"
    )


def why_no_pool_kernel(kernel: int) -> str | None:
    """Why no kernel of ours pools windows of this side; None where one does."""
    if kernel <= LARGEST_WINDOW:
        return None
    return f"kernel_size {kernel}: kernels exist up to {LARGEST_WINDOW}"


def why_no_norm_kernel(size: int) -> str | None:
    """Why no kernel of ours normalises over so many channels; None where one does."""
    if size <= LARGEST_NORM:
        return None
    return f"size {size}: kernels exist up to {LARGEST_NORM}"


@dataclass(frozen=True)
class Window:
    """Square pooling windows."""

    kernel: int
    stride: int
    padding: int = 0
    ceil_mode: bool = False

    def out(self, size: int) -> int:
        """Number of windows along a side, `pool_out`."""
        return pool_out(size, self.kernel, self.stride, self.padding, self.ceil_mode)

    def of_map(self, height: int, width: int) -> tuple[int, int]:
        """Number of windows along height and width; errors say both."""
        try:
            return self.out(height), self.out(width)
        except TooSmallError as error:
            raise TooSmallError(
                f"{error}: the map to pool is {height}x{width}, larger images give a larger one"
            ) from None

    def cells(self, size: int) -> int:
        """Number of cells, `stride` pixels from where a window begins, that cover a side."""
        return (size - 1 + self.padding) // self.stride - self.padding // self.stride + 1


# the pools and local response norms (size, alpha, beta, k) of the paper's stem
STEM_POOL = Window(kernel=3, stride=2, ceil_mode=True)
STEM_NORM = (5, 1e-4, 0.75, 1.0)
# its first convolution: kernel, stride, padding; as many channels at the most fit a packed pixel
STEM_CONV = (7, 2, 3)
STEM_CHANNELS = 3
NO_STEM_CONV = "is no 7x7 convolution of stride 2 and padding 3 of images of up to 3 channels"


@dataclass(frozen=True)
class AvgWindow:
    """Square windows of an average pool without padding, cut at the border.

    `kernel` and `stride` are those of torch's `avg_pool2d`; with a `grid` they are 0, and the
    windows are torch's adaptive ones, `grid` along each side.
    """

    kernel: int
    stride: int
    ceil_mode: bool
    grid: int = 0

    def out(self, size: int) -> int:
        """Number of windows along a side."""
        return self.grid or pool_out(size, self.kernel, self.stride, 0, self.ceil_mode)

    def extent(self, size: int) -> int:
        """Pixels of the longest window along a side."""
        if not self.grid:
            return min(self.kernel, size)
        return max(
            -(-(i + 1) * size // self.grid) - i * size // self.grid for i in range(self.grid)
        )

    def overlap(self, size: int) -> int:
        """The most windows along a side that one pixel lies in."""
        if not self.grid:
            return min(-(-self.kernel // self.stride), self.out(size))
        return max(-(-(p + 1) * self.grid // size) - p * self.grid // size for p in range(size))

    def why_no_kernel(self, height: int, width: int) -> str | None:
        """Why no kernel of ours pools such a map; None where one does."""
        # at most so many, which needs no look at every pixel, and no number of a symbolic side
        most = [-(-self.grid // side) + 1 for side in (height, width)]
        if self.grid and most[0] * most[1] <= MOST_OVERLAPS:
            return None
        overlaps = self.overlap(height) * self.overlap(width)
        if overlaps <= MOST_OVERLAPS:
            return None
        return f"{overlaps} windows over one pixel: kernels exist up to {MOST_OVERLAPS}"


def googlenet_dims(kernel_5x5: int = 5) -> dict[str, InceptionDims]:
    """The nine modules of the paper's table 1 by name; `kernel_5x5=3` is torchvision's network."""
    table = {
        # in, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection
        "3a": (192, 64, 96, 128, 16, 32, 32),
        "3b": (256, 128, 128, 192, 32, 96, 64),
        "4a": (480, 192, 96, 208, 16, 48, 64),
        "4b": (512, 160, 112, 224, 24, 64, 64),
        "4c": (512, 128, 128, 256, 24, 64, 64),
        "4d": (512, 112, 144, 288, 32, 64, 64),
        "4e": (528, 256, 160, 320, 32, 128, 128),
        "5a": (832, 256, 160, 320, 32, 128, 128),
        "5b": (832, 384, 192, 384, 48, 128, 128),
    }
    return {name: InceptionDims(*widths, kernel_5x5=kernel_5x5) for name, widths in table.items()}


def _at_least_one(windows: int, size: int, kernel: int, padding: int) -> int:
    if windows < 1:
        raise TooSmallError(
            f"a window of {kernel} does not fit a side of {size} with padding {padding}"
        )
    return windows


def _starts(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(widths[:i]) for i in range(len(widths)))


GOOGLENET = googlenet_dims()

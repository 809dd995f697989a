"""What a GPU can do: every figure with its origin, so that a measurement can correct it."""

from dataclasses import dataclass, fields

# share of the tensor cores' peak by columns of the tile: below 64 the reads of the left operand
# take longer than the products
COLUMN_SHARE = {16: 0.25, 32: 0.5, 64: 0.92, 128: 0.98, 256: 1.0}
TILE_ROWS = (64, 128, 256)
TILE_ELEMENTS = 128 * 256  # more accumulators than these do not fit the registers


@dataclass(frozen=True)
class Figure:
    """One number, in SI units, and where it comes from."""

    value: float
    measured: bool
    source: str


@dataclass(frozen=True)
class Device:
    """A GPU as the cost model sees it; rates are those of the whole GPU, per second.

    A *share* is the part of the roofline that kernels of a kind usually reach.
    """

    name: str
    processors: Figure  # streaming multiprocessors
    tensor_flops: Figure  # 16-bit operands, fp32 accumulation
    tf32_flops: Figure  # fp32 operands, rounded to TF32
    memory_rate: Figure  # bytes read and written
    stream_rate: Figure  # bytes from the L2 cache to all processors
    cache_bytes: Figure  # of the L2 cache, as far as one kernel finds what another left
    launch_seconds: Figure  # a kernel inside a CUDA graph takes at least so long
    host_seconds: Figure  # CPU time of an operator of PyTorch that is launched on its own
    compiled_host_seconds: Figure  # likewise of a kernel of a compiled graph
    our_host_seconds: Figure  # CPU time of our operators for each kernel, in inference
    our_host_norm_seconds: Figure  # likewise with BatchNorm, folded
    our_host_training_seconds: Figure  # likewise in a training step, autograd's included
    tile_seconds: Figure  # prologue and epilogue of a tile, not hidden by its neighbours
    memory_share: Figure  # kernels that are bound by memory
    scatter_share: Figure  # of the same: windows, 8-byte indices, atomics
    library_share: Figure  # library convolutions and GEMMs
    library_filter_share: Figure  # filter gradients of the library
    pointwise_share: Figure  # our 1x1 convolutions
    window_share: Figure  # our 3x3 and 5x5 convolutions, forward and backward
    filter_share: Figure  # our filter gradients

    def figures(self) -> dict[str, Figure]:
        """Every figure by name."""
        names = [field.name for field in fields(self) if field.name != "name"]
        return {name: getattr(self, name) for name in names}

    def flops(self, itemsize: int) -> float:
        """Peak of tensor-core products of operands of `itemsize` bytes."""
        return (self.tensor_flops if itemsize == 2 else self.tf32_flops).value


def _measured(value: float, source: str) -> Figure:
    return Figure(value, True, source)


def _assumed(value: float, source: str) -> Figure:
    return Figure(value, False, source)


H200 = Device(
    name="NVIDIA H200",
    processors=_assumed(132, "data sheet"),
    tensor_flops=_measured(790e12, "large bf16 GEMM, measured elsewhere; data sheet: 989e12"),
    tf32_flops=_assumed(395e12, "half of the 16-bit rate, as in the data sheet"),
    memory_rate=_measured(4.3e12, "copy on the device, measured elsewhere; data sheet: 4.8e12"),
    stream_rate=_assumed(8.0e12, "between 5.5e12 and 10e12; matters most of all that is assumed"),
    cache_bytes=_assumed(30e6, "half of 60 MB: each half of the chip keeps a copy of its own"),
    launch_seconds=_assumed(1.75e-6, "usual for CUDA graphs on this generation"),
    host_seconds=_measured(
        7.5e-6,
        "benchmarks.host_path, plain modules, 6.4 to 8.5 us: a CPU, two shared cores, no driver",
    ),
    compiled_host_seconds=_assumed(5e-6, "less than eager PyTorch, which asks autograd as well"),
    our_host_seconds=_measured(24e-6, "the same, networks whose calls are replayed"),
    our_host_norm_seconds=_measured(51e-6, "the same"),
    our_host_training_seconds=_measured(22e-6, "the same, 21 to 24 us"),
    tile_seconds=_assumed(0.4e-6, "pipeline start, epilogue and store of one tile"),
    memory_share=_assumed(0.85, "streaming kernels usually reach 0.8 to 0.9 of a copy"),
    scatter_share=_assumed(0.5, "pooling with 8-byte indices, atomic additions"),
    library_share=_assumed(0.75, "cuDNN and cuBLAS on shapes of this size"),
    library_filter_share=_assumed(0.6, "cuDNN's split reductions over pixels"),
    pointwise_share=_assumed(0.75, "plain GEMM in Triton"),
    window_share=_assumed(0.6, "implicit GEMM in Triton with pointer arithmetic"),
    filter_share=_assumed(0.6, "split reductions with masked loads"),
)

"""The tensors of one module under our plan, and what it multiplies."""

from fused_inception.cost.layers import Module
from fused_inception.cost.ops import Tensor
from fused_inception.cost.plan import Plan
from fused_inception.geometry import align_up

FP32 = 4  # bytes of a partial sum
COEFFICIENTS = 4  # of a channel of BatchNorm: mean, inverse deviation, scale, beta


class ModuleTensors:
    """The tensors of one module: activations, scratch, packed filters, what is saved."""

    def __init__(self, plan: Plan, module: Module, x: Tensor) -> None:
        dims, pixels, name = module.dims, module.pixels, module.name
        self._plan, self._pixels = plan, pixels
        self.x = x
        self.y = plan.tensor(f"{name} output", pixels, dims.out_channels)
        self.r = plan.tensor(f"{name} reduced", pixels, dims.reduced_channels)
        s_in = align_up(dims.in_channels)
        self.index = plan.tensor(f"{name} index", pixels, s_in, 1)
        self.mask = plan.tensor(f"{name} mask", pixels, dims.slot_channels // 8, 1)
        self.raw = plan.tensor(f"{name} raw", pixels, dims.slot_channels)
        slots = dims.slot_channels + dims.reduced_channels
        self.moments = plan.parameter(f"{name} coefficients", COEFFICIENTS * slots, FP32)
        self.dz = plan.tensor(f"d {name} masked", pixels, dims.slot_channels)
        self.dr = plan.tensor(f"d {name} reduced", pixels, dims.reduced_channels)
        self.dp = plan.tensor(f"d {name} pooled", pixels, s_in)
        s1, s3, s5, sp = (align_up(width) for width in dims.branch_widths)
        s3r, s5r = align_up(dims.ch3x3red), align_up(dims.ch5x5red)
        taps = dims.kernel_5x5**2
        self.filters = plan.parameter(f"{name} filters", dims.weights)
        self.packed_cat = plan.parameter(f"{name} packed 1x1", (s1 + s3r + s5r) * s_in)
        windows = s3 * 9 * s3r + s5 * taps * s5r
        self.packed_windows = plan.parameter(f"{name} packed 3x3, 5x5", windows)
        self.packed_projection = plan.parameter(f"{name} packed projection", sp * s_in)
        total = self.packed_cat.bytes + self.packed_windows.bytes + self.packed_projection.bytes
        self.packed = Tensor(f"{name} packed", total)
        width = dims.ch1x1 + dims.ch3x3red + dims.ch5x5red
        self.pointwise_gemms = [
            plan.gemm(pixels, columns, dims.in_channels, "pointwise")
            for columns in (width, dims.pool_proj)
        ]
        self.window_gemms = [
            plan.gemm(pixels, dims.ch3x3, 9 * dims.ch3x3red, "window"),
            plan.gemm(pixels, dims.ch5x5, taps * dims.ch5x5red, "window"),
        ]
        products = (
            (9 * dims.ch3x3red, dims.ch3x3),
            (dims.in_channels, dims.ch1x1),
            (dims.in_channels, dims.ch3x3red + dims.ch5x5red),
            (taps * dims.ch5x5red, dims.ch5x5),
            (dims.in_channels, dims.pool_proj),
        )
        self.filter_gemms = [
            plan.filters_gemm(rows, columns, pixels, dims.weights) for rows, columns in products
        ]
        partials = sum(gemm.splits * gemm.rows * gemm.columns for gemm in self.filter_gemms)
        self.partials = Tensor(f"{name} partials", partials * FP32)

    def y_slice(self, channels: int) -> Tensor:
        """`channels` channels of the output."""
        return self._plan.tensor(self.y.name, self._pixels, channels)

    def raw_slice(self, channels: int) -> Tensor:
        """The same of the raw results."""
        return self._plan.tensor(self.raw.name, self._pixels, channels)

    def dz_slice(self, channels: int) -> Tensor:
        """The same of the masked gradient."""
        return self._plan.tensor(self.dz.name, self._pixels, channels)

    def mask_slice(self, channels: int) -> Tensor:
        """The mask of so many channels."""
        return self._plan.tensor(self.mask.name, self._pixels, align_up(channels) // 8, 1)

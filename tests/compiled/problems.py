"""Calls of the operators' Triton scripts on tensors without data."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fused_inception.geometry import (
    AUX_CHANNELS,
    IMAGE_CHANNELS,
    STEM_NORM,
    STEM_POOL,
    AvgWindow,
    InceptionDims,
    NaiveDims,
    Window,
    align_up,
    googlenet_sizes,
)
from fused_inception.kernels.finish import launch_finish
from fused_inception.kernels.gradients import (
    FilterGradients,
    InputGradient,
    launch_gradients,
    unfinished,
)
from fused_inception.kernels.layout import PackedLayout
from fused_inception.kernels.moments import Moments, merged_moments
from fused_inception.kernels.stem import launch_image_pack
from fused_inception.kernels.stem_conv import launch_stem_conv_fwd
from fused_inception.kernels.stem_wgrad import launch_packed_wgrad
from fused_inception.kernels.wgrad import PartialFilters
from fused_inception.ops import (
    avg_pool_project_triton,
    conv2d_bn_triton,
    conv2d_triton,
    global_pool_triton,
    inception_bn_triton,
    inception_naive_triton,
    inception_triton,
    pooling_triton,
    stem_triton,
)
from fused_inception.ops.problem import problem_of
from fused_inception.ops.running import Running
from fused_inception.ops.stages import Stem as StemOptions
from fused_inception.tuning import dispatch
from fused_inception.tuning.chosen import stem_conv_config
from fused_inception.tuning.conv_heuristic import packed_wgrad_config
from fused_inception.tuning.heuristic import finish_config, input_grad_config
from fused_inception.tuning.norm_heuristic import merge_config
from fused_inception.tuning.wgrad_heuristic import wgrad_config
from tests.compiled.collect import Specialisation, collect

# what a matrix names its rows by: the type of the maps and of the products
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}


class Problem(Protocol):
    """One call of an operator."""

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """Forward and, in training, backward with all gradients; parameters in fp32."""


def specialisations(
    problem: Problem, target: str, precision: str, *, training: bool
) -> list[Specialisation]:
    """What `problem` launches."""

    def launch() -> None:
        with torch.set_grad_enabled(training):
            problem.launch(DTYPES[precision], training=training)

    return collect(launch, target, tf32=precision != "ieee")


@dataclass(frozen=True)
class Module:
    """An Inception module of either form; of that with reductions also what it launches behind the
    ReLU of another one: for each of `behind`, whether others add to the gradient in front of it."""

    dims: InceptionDims | NaiveDims
    batch: int
    side: int
    behind: tuple[bool, ...] = ()

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The module's script."""
        filters, biases = _parameters(self.dims.filter_shapes)
        x = _map(self.batch, align_up(self.dims.in_channels), self.side, dtype)
        x = x[:, : self.dims.in_channels]
        naive = isinstance(self.dims, NaiveDims)
        script = inception_naive_triton if naive else inception_triton
        y, saved = script.forward(x, filters, biases, training)
        if training:
            dtypes = [b.dtype for b in biases]
            needs = [True] * (1 + 2 * len(filters))
            script.backward(_like(y), x, saved, filters, dtypes, needs)
        for added in self.behind if training else ():
            mask = _mask_of(x)
            inception_triton.backward_of_masked(
                self.dims, inception_triton.mask_gradient(self.dims, _like(y), saved[2]),
                x, saved, filters,
                *inception_triton.packed_for_gradients([self.dims], [filters], dtype),
                dtypes, needs, inception_triton.ReluBelow(mask, _like(x) if added else None),
            )  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """What modules of a trunk launch together: packing, and the end of their gradients."""

    modules: tuple[InceptionDims, ...]

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """These launches."""
        each = [_parameters(dims.filter_shapes) for dims in self.modules]
        filters, biases = zip(*each, strict=True)
        inception_triton.packed_modules(self.modules, filters, biases, dtype, save=training)
        if not training:
            return
        inception_triton.packed_for_gradients(self.modules, filters, dtype)
        groups = dict.fromkeys(("branch1", "reduces", "conv3", "conv5", "projection"), (64, 3))
        buffer = torch.empty(64, device="meta")
        parts = [
            unfinished(dims, PartialFilters(buffer, groups), *[buffer.view(2, 32)] * 3, *of)
            for dims, *of in zip(self.modules, filters, biases, strict=True)
        ]
        launch_finish(parts, finish_config())


@dataclass(frozen=True)
class Gradients:
    """Launches L2 and L3 of a module, together and apart."""

    dims: InceptionDims
    batch: int
    side: int

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """These launches, in training alone."""
        if not training:
            return
        dims = self.dims
        dz, x, r = (
            _map(self.batch, channels, self.side, dtype)
            for channels in (dims.slot_channels, align_up(dims.in_channels), dims.reduced_channels)
        )
        ops, target, pixels = problem_of(x)
        w = torch.empty(PackedLayout(dims).filter_elements, dtype=dtype, device="meta")
        dx = _like(x)[:, : dims.in_channels]
        of_input = InputGradient(x, w, dx, input_grad_config(dims, pixels, ops, target))
        groups = frozenset(("branch1", "reduces", "conv3", "conv5", "projection"))
        config = wgrad_config(dims, pixels, ops, target)
        of_filters = FilterGradients(x, r, groups, config)
        index = x.to(torch.uint8)
        for some in ((of_input, of_filters), (of_input, None), (None, of_filters)):
            launch_gradients(dims, dz, r, index, *some, precision=ops.precision)


@dataclass(frozen=True)
class Library:
    """Another problem with the library's convolutions wherever there is a choice."""

    problem: Problem

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """What is left of the script of its operator, and the epilogues."""
        with dispatch.forced(dispatch.PARTS):
            self.problem.launch(dtype, training=training)


@dataclass(frozen=True)
class NormModule:
    """An Inception module with BatchNorm, in training; in eval it launches what `Module` does."""

    dims: InceptionDims
    batch: int
    side: int

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The module's script."""
        filters, gammas, betas, running = _norm_parameters(self.dims.filter_shapes)
        x = _map(self.batch, self.dims.in_channels, self.side, dtype)
        y, saved = inception_bn_triton.forward(x, filters, gammas, betas, running, 1e-3)
        if training:
            inception_bn_triton.backward(_like(y), x, saved, filters, gammas, [True] * 19)


@dataclass(frozen=True)
class Convolution:
    """A convolution with bias and ReLU; of few channels, of an image in torch's own layout."""

    batch: int
    c_in: int
    c_out: int
    kernel: int
    stride: int
    side: int

    @property
    def filter_shape(self) -> tuple[int, int, int, int]:
        """[C_OUT, C_IN, K, K]."""
        return self.c_out, self.c_in, self.kernel, self.kernel

    @property
    def window(self) -> tuple[int, int]:
        """Stride and padding."""
        return self.stride, self.kernel // 2

    def input(self, dtype: torch.dtype) -> torch.Tensor:
        """A map, or an image."""
        x = _map(self.batch, self.c_in, self.side, dtype)
        return x.contiguous() if self.c_in <= IMAGE_CHANNELS else x

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator."""
        x = self.input(dtype)
        (weight,), (bias,) = _parameters([self.filter_shape])
        y, saved = conv2d_triton.forward(x, weight, bias, *self.window, training)
        if training:
            conv2d_triton.backward(_like(y), x, saved, weight, bias, *self.window, [True] * 3)


@dataclass(frozen=True)
class NormConvolution(Convolution):
    """A convolution with BatchNorm and ReLU, in training."""

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator."""
        x = self.input(dtype)
        filters, gammas, betas, running = _norm_parameters([self.filter_shape])
        y, saved = conv2d_bn_triton.forward(x, filters, gammas, betas, running, 1e-3, *self.window)
        if training:
            dy, needs = _like(y), [True] * 4
            conv2d_bn_triton.backward(dy, x, saved, filters, gammas, *self.window, needs)


@dataclass(frozen=True)
class PackedConvolution:
    """What conv1 of the network ahead of a BatchNorm launches and no other convolution does."""

    batch: int
    c_out: int
    side: int

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """These launches, in training alone."""
        if not training:
            return
        x = torch.empty((self.batch, 3, self.side, self.side), device="meta")
        weight = torch.empty((self.c_out, 3, 7, 7), device="meta")
        z, _, packed = conv2d_bn_triton.saved_like(x.to(dtype), [weight], 2, 3)
        ops, target, pixels = problem_of(z)
        config = stem_conv_config(self.c_out, pixels, ops, target)
        tile, n_pixels = config.forward.block_m, z.numel() // z.shape[1]
        moments = torch.empty((-(-n_pixels // tile), 3, z.shape[1]), device="meta")
        launch_stem_conv_fwd(
            packed, launch_image_pack(x, weight, packed), None, z, None, config,
            precision=ops.precision, moments=moments,
        )  # fmt: skip
        merged_moments(Moments(moments, tile), None, n_pixels, merge_config())
        launch_packed_wgrad(
            packed, z, weight, packed_wgrad_config(z.shape[1], pixels, ops, target),
            finish_config(), precision=ops.precision,
        )  # fmt: skip


@dataclass(frozen=True)
class Pooling:
    """Local response normalisation, max pooling, or both in one launch in the order named."""

    name: str  # "max_pool", "lrn", "lrn_max_pool", "max_pool_lrn"
    batch: int
    channels: int
    side: int

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator."""
        shape = (self.batch, self.channels, self.side, self.side)
        x = _map(self.batch, self.channels, self.side, dtype)
        norm = (5, 1e-4, 0.75, 1.0)
        window = Window(kernel=3, stride=2, ceil_mode=True)
        if self.name == "max_pool":
            y, saved = pooling_triton.max_pool2d(x, window, training)
            if training:
                (index,) = saved
                pooling_triton.max_pool2d_backward(_like(y), shape, index, window)
                pooling_triton.max_pool2d_backward_masked(
                    _like(y), shape, index, window, _mask_of(x)
                )
        elif self.name == "lrn":
            y, _ = pooling_triton.local_response_norm(x, norm, training)
            if training:
                pooling_triton.local_response_norm_backward(_like(y), x, norm)
        elif self.name == "lrn_max_pool":
            y, saved = pooling_triton.lrn_max_pool2d(x, norm, window, training)
            if training:
                (index,) = saved
                pooling_triton.lrn_max_pool2d_backward(_like(y), x, index, norm, window)
        elif self.name == "max_pool_lrn":
            y, saved = pooling_triton.max_pool2d_lrn(x, norm, window, training)
            if training:
                pooled, index = saved
                pooling_triton.max_pool2d_lrn_backward(_like(y), shape, pooled, index, norm, window)
        else:
            raise ValueError(f"no pooling is called {self.name!r}")


@dataclass(frozen=True)
class Stem:
    """The stem of the paper's network, of images in torch's own layout."""

    batch: int
    side: int

    @property
    def convolutions(self) -> tuple[Convolution, Convolution, Convolution]:
        """Its three, as operators of their own."""
        n, side = self.batch, googlenet_sizes(self.side).maxpool1
        return (
            Convolution(n, 3, 64, kernel=7, stride=2, side=self.side),
            Convolution(n, 64, 64, kernel=1, stride=1, side=side),
            Convolution(n, 64, 192, kernel=3, stride=1, side=side),
        )

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator; in training the image needs no gradient."""
        options = StemOptions(2, 3, STEM_POOL, STEM_NORM, STEM_NORM, STEM_POOL)
        image = (self.batch, 3, self.side, self.side)
        x = torch.empty(image, dtype=dtype, device="meta")
        filters, biases = _parameters([conv.filter_shape for conv in self.convolutions])
        y, saved = stem_triton.forward(x, filters, biases, options, training)
        if training:
            needs = [False, *[True] * 6]
            stem_triton.backward(_like(y), x, saved, filters, biases, options, needs)


@dataclass(frozen=True)
class Auxiliary:
    """Average pool, 1x1 convolution, bias and ReLU of an auxiliary classifier."""

    batch: int
    c_in: int
    side: int
    window: AvgWindow

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator."""
        x = _map(self.batch, self.c_in, self.side, dtype)
        (weight,), (bias,) = _parameters([(AUX_CHANNELS, self.c_in, 1, 1)])
        y, saved = avg_pool_project_triton.forward(x, weight, bias, self.window, training)
        if training:
            avg_pool_project_triton.backward(
                _like(y), y, *saved, weight, bias, tuple(x.shape), self.window, [True] * 3
            )


@dataclass(frozen=True)
class GlobalPool:
    """Global average pooling; in training with dropout behind it."""

    batch: int
    channels: int
    side: int

    def launch(self, dtype: torch.dtype, *, training: bool) -> None:
        """The script of the operator."""
        x = _map(self.batch, self.channels, self.side, dtype)
        kept = torch.empty((self.batch, self.channels), dtype=torch.bool, device="meta")
        drawn = (kept, 2.5) if training else (None, 1.0)
        y = global_pool_triton.forward(x, *drawn)
        if training:
            global_pool_triton.backward(_like(y), *drawn, x.shape)
            global_pool_triton.backward_masked(_like(y), *drawn, x.shape, _mask_of(x))


def _parameters(shapes: Iterable[Sequence[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Filters of these shapes and their biases."""
    filters = [torch.empty(shape, device="meta") for shape in shapes]
    return filters, [torch.empty(f.shape[0], device="meta") for f in filters]


def _norm_parameters(
    shapes: Iterable[Sequence[int]],
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], Running]:
    """Filters of these shapes, and what belongs to the BatchNorm behind each."""
    filters, gammas = _parameters(shapes)
    betas, means, variances = ([torch.empty_like(g) for g in gammas] for _ in range(3))
    return filters, gammas, betas, Running(means, variances, [], 0.1, False)


def _map(n: int, c: int, side: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty((n, c, side, side), dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def _mask_of(x: torch.Tensor) -> torch.Tensor:
    """The bits of the ReLU whose output x is."""
    n, c, height, width = x.shape
    return torch.empty((n * height * width, c // 8), dtype=torch.uint8, device="meta")


def _like(y: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=y.device)

"""Convolutions of the library (cuDNN through ATen) in the scripts of the Triton path, with our
epilogues behind them: what `tuning.dispatch` may choose in place of our kernels.

The library's raw result is rounded to the type of the maps before bias, ReLU or gate, as in
PyTorch's own layers. ATen makes dense whatever it is given; the copies that this takes are made
here, where they can be seen: of a channel slice, once.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.conv import launch_branches
from fused_inception.kernels.dgrad import launch_dgrad
from fused_inception.kernels.epilogue import launch_epilogue, launch_gate
from fused_inception.kernels.launch import cdiv
from fused_inception.kernels.layout import PackedLayout
from fused_inception.ops.layout import channels_last, empty_channels_last
from fused_inception.tuning.configs import BranchesConfig, DgradConfig
from fused_inception.tuning.conv_heuristic import epilogue_config
from fused_inception.tuning.dispatch import Plan

aten = torch.ops.aten


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """The raw convolution, [N, C_OUT, H_out, W_out] exactly channels last; weight in the dtype of
    x."""
    window = [stride] * 2, [padding] * 2, [1, 1]
    return channels_last(
        aten.convolution(channels_last(x), weight, None, *window, False, [0, 0], 1)
    )


def convolve_packed(x: Tensor, packed: Tensor, kernel: int) -> Tensor:
    """The raw "same" convolution of stride 1, [N, slots of C_OUT, H, W] exactly channels last.

    x: [N, slots of C_IN, H, W]. packed: the elements of one packed filter [slots of C_OUT, K * K,
    slots of C_IN], which is a filter in channels-last memory and not copied. A filter packed for
    the data gradient, taps backwards, and dz in the place of x give that gradient.
    """
    filters = packed.view(-1, kernel, kernel, x.shape[1]).permute(0, 3, 1, 2)
    return convolve(x, filters, 1, kernel // 2)


def gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    *,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x, exactly channels last, and of the filter, in the dtype of x; None where not
    needed. Of `dz` the first channels are read, as many as there are filters.

    The library rounds the filter's to the type of the maps, and may add up in another order in
    every run, unless torch is told to be deterministic.
    """
    if not need_x and not need_w:
        return None, None
    window = [stride] * 2, [padding] * 2, [1, 1]
    dx, dw, _ = aten.convolution_backward(
        channels_last(dz[:, : weight.shape[0]]), channels_last(x), weight.to(x.dtype), None,
        *window, False, [0, 0], 1, [need_x, need_w, False],
    )  # fmt: skip
    return channels_last(dx) if need_x else None, dw if need_w else None


def filter_gradient(dz: Tensor, x: Tensor, out: Tensor) -> None:
    """Fill `out`, the gradient of a "same" filter of stride 1, of any dtype and strides; dz and x
    may have slots of padding."""
    c_out, c_in, k, _ = out.shape
    # sizes and strides alone are read of a filter
    like = empty_channels_last(dz.shape[1], x.shape[1], k, k, dtype=x.dtype, device=x.device)
    _, dw = gradients(dz, x, like, 1, k // 2, need_x=False, need_w=True)
    assert dw is not None  # for the type checker
    out.copy_(dw[:c_out, :c_in])


@dataclass(frozen=True)
class Branch:
    """Where the 3x3 or the 5x5 branch of a module finds and leaves its tensors."""

    name: str  # of its parts in a plan
    kernel: int
    position: int  # among the six filters
    filters: slice  # its packed filter
    biases: slice  # its packed biases
    reduced: slice  # its channels of the reduced maps
    slots: slice  # of a scratch tensor of slots
    channels: slice  # of the concatenation


@functools.lru_cache(maxsize=1024)
def branches_of(dims: InceptionDims) -> tuple[Branch, Branch]:
    """The 3x3 and the 5x5 branch."""
    layout = PackedLayout(dims)
    s3r, (_, slot3, slot5, slot_p) = align_up(dims.ch3x3red), dims.slots
    _, at3, at5, at_p = dims.offsets
    return (
        Branch(
            "conv3", 3, 2, slice(layout.w3, layout.w5), slice(layout.b3, layout.b5),
            slice(0, s3r), slice(slot3, slot5), slice(at3, at5),
        ),
        Branch(
            "conv5", dims.kernel_5x5, 4, slice(layout.w5, layout.wp), slice(layout.b5, layout.bp),
            slice(s3r, dims.reduced_channels), slice(slot5, slot_p), slice(at5, at_p),
        ),
    )  # fmt: skip


def branches(
    plan: Plan,
    dims: InceptionDims,
    r: Tensor,
    packed_w: Tensor,
    packed_b: Tensor,
    y: Tensor,
    mask: Tensor,
    config: BranchesConfig,
    *,
    save: bool,
    precision: str,
    moments: tuple[Tensor, Tensor] | None = None,
) -> None:
    """`conv.launch_branches` for the branches that are ours, then the others one by one."""
    theirs = [branch for branch in branches_of(dims) if plan.library(f"{branch.name}.forward")]
    names = {branch.name for branch in theirs}
    launch_branches(
        dims, r, packed_w, packed_b, y, mask, config,
        save=save, precision=precision, moments=moments,
        conv3="conv3" not in names, conv5="conv5" not in names,
    )  # fmt: skip
    for branch in theirs:
        raw = convolve_packed(r[:, branch.reduced], packed_w[branch.filters], branch.kernel)
        if moments is None:
            bits = mask[:, branch.slots.start // 8 : branch.slots.stop // 8] if save else None
            launch_epilogue(
                raw, packed_b[branch.biases], y[:, branch.channels], bits,
                epilogue_config(raw.shape[1]),
            )  # fmt: skip
        else:
            three = branch.name == "conv3"
            # a row of moments is as many pixels whoever takes them
            rows = (config.conv3 if three else config.conv5).block_m
            launch_epilogue(
                raw, None, y[:, branch.slots], None, epilogue_config(raw.shape[1], rows),
                moments=moments[not three],
            )  # fmt: skip


class MaskedGradient:
    """dz of a module, and the dense slices of it that the library reads, each copied once; who
    computes what with it."""

    def __init__(self, plan: Plan, dims: InceptionDims, dz: Tensor) -> None:
        self.plan = plan
        self.branches = branches_of(dims)
        self.dz = dz
        self._dense: dict[str, Tensor] = {}

    def dense(self, branch: Branch) -> Tensor:
        """[N, slots of the branch, H, W] exactly channels last."""
        if branch.name not in self._dense:
            self._dense[branch.name] = channels_last(self.dz[:, branch.slots])
        return self._dense[branch.name]


def dgrad(
    dims: InceptionDims,
    gradient: MaskedGradient,
    packed_w: Tensor,
    r: Tensor,
    config: DgradConfig,
    *,
    reduce3: bool,
    reduce5: bool,
    pooled: bool,
    precision: str,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dgrad.launch_dgrad` for what is ours, then the others one by one."""
    needs = {"conv3": reduce3, "conv5": reduce5}
    theirs = [
        branch
        for branch in gradient.branches
        if needs[branch.name] and gradient.plan.library(f"{branch.name}.dgrad")
    ]
    names = {branch.name for branch in theirs}
    dr, dp, *partials = launch_dgrad(
        dims, gradient.dz, packed_w, r, config,
        reduce3=reduce3 and "conv3" not in names, reduce5=reduce5 and "conv5" not in names,
        pooled=pooled, precision=precision, norm=norm,
        dr=torch.empty_like(r) if reduce3 and reduce5 else None,
    )  # fmt: skip
    if norm is not None:
        norm = norm[:, PackedLayout(dims).r3 :]
    for branch in theirs:
        raw = convolve_packed(gradient.dense(branch), packed_w[branch.filters], branch.kernel)
        epilogue = epilogue_config(raw.shape[1])
        n, channels, height, width = r.shape
        row = (channels,) if norm is None else (2, channels)
        partial = torch.empty(
            (cdiv(n * height * width, epilogue.block_p), *row), dtype=torch.float32, device=r.device
        )
        launch_gate(
            raw, r[:, branch.reduced], dr[:, branch.reduced], partial[..., branch.reduced],
            epilogue, norm=None if norm is None else norm[:, branch.reduced],
        )  # fmt: skip
        partials[branch.name == "conv5"] = partial
    return dr, dp, partials[0], partials[1]


def filter_gradients(
    gradient: MaskedGradient, reduced: Tensor, filter_grads: list[Tensor]
) -> list[Tensor]:
    """Fill those of a module's six filter gradients that are the library's; the others, which are
    left to our launches, in a list where these have no elements.

    reduced: both reduced maps as the 3x3 and the 5x5 read them. A gradient of no elements is not
    needed.
    """
    ours = list(filter_grads)
    for branch in gradient.branches:
        out = filter_grads[branch.position]
        if out.numel() and gradient.plan.library(f"{branch.name}.wgrad"):
            filter_gradient(gradient.dense(branch), reduced[:, branch.reduced], out)
            ours[branch.position] = out.new_empty(0)
    return ours

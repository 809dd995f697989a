"""Launch configurations are arithmetic: their limits hold for every module, dtype and target."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fused_inception.geometry import GOOGLENET, InceptionDims, align_up, googlenet_sizes
from fused_inception.tuning import conv_heuristic, heuristic, wgrad_heuristic
from fused_inception.tuning.configs import (
    PointwiseConfig,
    Tile,
    WgradConfig,
    WgradJob,
    split_width,
)
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS, Target

OPERANDS = {"16-bit": Operands(2, "tf32"), "tf32": Operands(4, "tf32"), "ieee": Operands(4, "ieee")}
ODD = InceptionDims(13, 7, 11, 17, 5, 3, 19)
PROBLEMS = [
    *((dims, 1 << (n * googlenet_sizes(224).module(name) ** 2 - 1).bit_length())
      for name, dims in GOOGLENET.items() for n in (1, 8, 32, 256)),
    (ODD, 1),
    (ODD, 2**28),
]  # fmt: skip


def configurations(
    dims: InceptionDims, pixels: int, ops: Operands, target: Target
) -> Iterator[object]:
    for save in (True, False):
        yield heuristic.pointwise_config(dims, pixels, ops, target, save)
    yield heuristic.branches_config(dims, pixels, ops, target)
    yield heuristic.dgrad_config(dims, pixels, ops, target)
    yield heuristic.input_grad_config(dims, pixels, ops, target)
    yield wgrad_heuristic.wgrad_config(dims, pixels, ops, target)
    for k in (1, 3, 5):
        yield conv_heuristic.conv_config(dims.in_channels, dims.ch3x3, k, pixels, ops, target)
    yield conv_heuristic.image_conv_config(147, 64, pixels, ops, target)
    widths = (dims.ch1x1, dims.ch3x3red, dims.ch3x3)
    yield conv_heuristic.stem_conv_config(64, pixels, ops, target)
    yield conv_heuristic.stem_wgrad_config(widths, 4 * pixels, pixels, ops, target)


def tiles_of(config: object) -> list[Tile]:
    fields = vars(config).values()
    return [
        f.tile if isinstance(f, WgradJob) else f for f in fields if isinstance(f, Tile | WgradJob)
    ]


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_is_one_that_the_compiler_takes(target: str, precision: str) -> None:
    """Powers of two, a reduction of at least 16, a pipeline that fits into shared memory."""
    ops, gpu = OPERANDS[precision], TARGETS[target]
    for dims, pixels in PROBLEMS:
        for config in configurations(dims, pixels, ops, gpu):
            pipelined = tiles_of(config)
            for tile in pipelined:
                sides = (tile.block_m, tile.block_n, tile.block_k)
                assert all(side >= 16 and side & (side - 1) == 0 for side in sides), config
                assert tile.block_m * tile.block_n <= gpu.max_tile, config
            if isinstance(config, PointwiseConfig):
                # the pool's tile is not pipelined
                pipelined = [config.gemm]
            num_stages = getattr(config, "num_stages", 1)
            step = max((t.block_m + t.block_n) * t.block_k for t in pipelined) * ops.itemsize
            assert num_stages * step <= gpu.shared_bytes, config


@pytest.mark.parametrize("precision", OPERANDS)
def test_tiles_cover_the_width_of_launch_a(precision: str) -> None:
    for dims, pixels in PROBLEMS:
        for save in (True, False):
            config = heuristic.pointwise_config(
                dims, pixels, OPERANDS[precision], TARGETS["sm_90"], save
            )
            width = dims.ch1x1 + dims.reduced_channels
            wide, tail = split_width(width, config.gemm.block_n, config.tail_n)
            assert wide >= 1
            assert wide * config.gemm.block_n + tail >= width
            assert wide * config.gemm.block_n + tail - width < config.gemm.block_n


def test_a_narrow_tail_instead_of_padding() -> None:
    """3b has 288 columns: 256 and 32, or 128 twice and 32, never 384."""
    dims, pixels = GOOGLENET["3b"], 2**18
    config = heuristic.pointwise_config(dims, pixels, OPERANDS["16-bit"], TARGETS["sm_90"], True)
    wide, tail = split_width(288, config.gemm.block_n, config.tail_n)
    assert wide * config.gemm.block_n + tail == 288


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("target", TARGETS)
def test_tiles_and_a_tail_cover_the_3x3(target: str, precision: str) -> None:
    """Of launch B its outputs, of L1 its inputs; no tile lies beyond them."""
    ops, gpu = OPERANDS[precision], TARGETS[target]
    for (dims, pixels), norm in itertools.product(PROBLEMS, (False, True)):
        b = heuristic.branches_config(dims, pixels, ops, gpu, norm)
        one = heuristic.dgrad_config(dims, pixels, ops, gpu, norm)
        for config, width in ((b, dims.ch3x3), (one, align_up(dims.ch3x3red))):
            block = config.conv3.block_n
            assert config.tail_n < block
            wide, tail = split_width(width, block, config.tail_n)
            assert wide >= 1
            assert wide * block + tail >= width > wide * block - (0 if tail else block)


def test_a_tail_where_uniform_tiles_pad_most() -> None:
    """4d has 288 outputs behind 144 channels: 10 % at the most is padding, not a third."""
    dims, ops, gpu = GOOGLENET["4d"], OPERANDS["16-bit"], TARGETS["sm_90"]
    b = heuristic.branches_config(dims, 2**16, ops, gpu)
    assert (b.conv3.block_n % 128, b.tail_n) == (0, 32)
    one = heuristic.dgrad_config(dims, 2**16, ops, gpu)
    assert (one.conv3.block_n, one.tail_n) == (128, 16)


@pytest.mark.parametrize(
    ("channels", "step"), [(16, 16), (24, 32), (48, 32), (96, 32), (112, 64), (128, 64), (192, 64)]
)
def test_step_of_the_reduction(channels: int, step: int) -> None:
    """64 where that pads the channels of a tap by no more than a seventh."""
    assert heuristic._block_k(channels, OPERANDS["16-bit"]) == step


@pytest.mark.parametrize("target", TARGETS)
def test_a_wide_pool_tile_inside_a_launch_has_eight_warps(target: str) -> None:
    """5b in training at N = 1, whose 64 sums a thread spilled on sm_89; not where the pool is a
    launch of its own, nor in inference, which keeps no winners."""
    ops, gpu, dims = OPERANDS["16-bit"], TARGETS[target], GOOGLENET["5b"]
    small = heuristic.pointwise_config(dims, 2**6, ops, gpu, True)
    assert small.pool_in_launch
    assert (small.pool.block_n, small.num_warps) == (128, 8)
    assert heuristic.pointwise_config(dims, 2**6, ops, gpu, False).num_warps == 4


# (target, operands) that spill where the others do not
SPILLING = ("sm_120", "tf32")


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("target", TARGETS)
def test_two_stages_where_three_would_spill(target: str, precision: str) -> None:
    """4b's input gradient with what an auxiliary classifier adds to it."""
    ops, gpu = OPERANDS[precision], TARGETS[target]
    dims = GOOGLENET["4b"]
    k = dims.ch1x1 + dims.reduced_channels
    usual = heuristic.gathered_config(2**13, dims.in_channels, k, ops, gpu)
    config = heuristic.input_grad_config(dims, 2**13, ops, gpu)
    stages = 2 if (target, precision) == SPILLING else usual.num_stages
    assert config == replace(usual, num_stages=stages)
    assert usual.num_stages > 2 or (target, precision) != SPILLING


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("target", TARGETS)
def test_half_a_step_for_a_tail_without_a_pipeline(target: str, precision: str) -> None:
    """The stem's conv3 at N = 32, whose steps of 32 would spill; with a second stage, at N = 1,
    they would not."""
    ops, gpu = OPERANDS[precision], TARGETS[target]
    steps = [
        conv_heuristic.conv_config(64, 192, 3, pixels, ops, gpu).forward.block_k
        for pixels in (2**12, 2**17)
    ]
    usual = heuristic._block_k(64, ops)
    assert steps == [usual, 16 if (target, precision) == SPILLING else usual]


def test_large_batches_take_large_tiles() -> None:
    dims = GOOGLENET["3b"]
    for pixels, least in ((2**10, 64 * 16), (2**18, 128 * 128)):
        config = heuristic.branches_config(dims, pixels, OPERANDS["16-bit"], TARGETS["sm_90"])
        assert config.conv3.block_m * config.conv3.block_n >= least
    small = heuristic.branches_config(dims, 2**10, OPERANDS["16-bit"], TARGETS["sm_90"])
    programs = 2**10 // small.conv3.block_m * -(-dims.ch3x3 // small.conv3.block_n)
    assert programs >= 32


def test_weight_gradients_are_split_where_there_are_pixels() -> None:
    ops, gpu = OPERANDS["16-bit"], TARGETS["sm_90"]
    for (name, dims), n in itertools.product(GOOGLENET.items(), (1, 32, 256)):
        pixels = n * googlenet_sizes(224).module(name) ** 2
        config: WgradConfig = wgrad_heuristic.wgrad_config(dims, pixels, ops, gpu)
        for job in (config.conv3, config.conv5, config.branch1, config.reduces, config.projection):
            chunk, splits = job.chunks(pixels)
            assert splits * chunk >= pixels > (splits - 1) * chunk
            assert chunk % job.tile.block_k == 0
        if n == 256:
            assert config.conv3.splits >= 4


def test_no_pixels_no_splits() -> None:
    job = WgradJob(Tile(64, 64, 32), 7)
    assert job.chunks(0) == (32, 0)


def partial_bytes(batch: int) -> int:
    """Written by launch L3 of the nine modules."""
    ops, gpu, total = OPERANDS["16-bit"], TARGETS["sm_90"], 0
    for name, d in GOOGLENET.items():
        pixels = batch * googlenet_sizes(224).module(name) ** 2
        c = wgrad_heuristic.wgrad_config(d, 1 << (pixels - 1).bit_length(), ops, gpu)
        jobs = (c.branch1, c.reduces, c.reduces, c.conv3, c.conv5, c.projection)
        w1, w3r, w3, w5r, w5, wp = map(math.prod, d.filter_shapes)
        for job, elements in zip(jobs, (w1, w3r, w5r, w3, w5, wp), strict=True):
            total += 4 * job.chunks(pixels)[1] * elements
    return total


def test_partial_sums_are_a_fraction_of_the_traffic() -> None:
    """The nine modules read and write about 9 GB in a step of 256 images."""
    assert partial_bytes(256) < 0.4e9
    assert partial_bytes(32) < 0.15e9


def test_gathers_are_split_by_their_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """4d at N = 32: 128 rows of 8192 pixels take 136 us of gathers, five times the products."""
    problem = GOOGLENET["4d"], 2**13, OPERANDS["16-bit"], TARGETS["sm_90"]
    with_gathers = wgrad_heuristic.wgrad_config.__wrapped__(*problem)
    monkeypatch.setattr(wgrad_heuristic, "POOL_SECONDS", 0.0)
    without = wgrad_heuristic.wgrad_config.__wrapped__(*problem)
    assert with_gathers.projection.splits > 1.5 * without.projection.splits


@pytest.mark.parametrize("programs", [[(1, 3.0)], [(700, 1.0)], [(131, 5.0), (2, 4.0), (999, 0.3)]])
def test_makespan_is_that_of_a_queue(programs: list[tuple[int, float]]) -> None:
    gpu = TARGETS["sm_90"]
    busy = [0.0] * gpu.processors
    for count, each in programs:
        for _ in range(count):
            first = busy.index(min(busy))
            busy[first] += each
    assert wgrad_heuristic._makespan(programs, gpu) == pytest.approx(max(busy))

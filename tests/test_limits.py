"""Launches that no heuristic chooses and a table may hold: what launchers make of them."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fused_inception.geometry import Window
from fused_inception.kernels import lrn_pool, pool_lrn
from fused_inception.kernels.image_conv import ImageConv
from fused_inception.kernels.lrn import Norm
from fused_inception.kernels.stem import StemShape
from fused_inception.kernels.stem_wgrad import StemMaps, launch_packed_wgrad, launch_stem_wgrad
from fused_inception.launches import Launch, record_launches
from fused_inception.tuning.configs import MarchConfig
from fused_inception.tuning.conv_heuristic import packed_wgrad_config, stem_wgrad_config
from fused_inception.tuning.heuristic import Operands, finish_config
from tests.tables import SM_90

pytestmark = pytest.mark.usefixtures("launches_do_nothing")

OPS = Operands(2, "tf32")


def described(n: int, c: int, height: int, width: int) -> torch.Tensor:
    """A dense map without data."""
    shape, strides = (n, c, height, width), (height * width * c, 1, width * c, c)
    return torch.empty_strided(shape, strides, dtype=torch.bfloat16, device="meta")


@pytest.mark.parametrize("rows", [3, 5, 6, 2**40])
def test_columns_are_no_higher_than_the_map(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program steps through all its rows, also through those that are not there."""
    found: list[list[int]] = []

    def note(kernel: Any, grid: Any, args: Any, constants: Any, *, num_warps: int) -> None:
        found.append([arg for arg in args if isinstance(arg, int)][:2])

    for module in (lrn_pool, pool_lrn):
        monkeypatch.setattr(module, "run", note)
    window, norm = Window(2, 2), Norm(5, 1e-4, 0.75, 1.0)
    config = MarchConfig(rows, 128, 4)
    x, y = described(3, 16, 10, 8), described(3, 16, 5, 4)
    index = y.to(torch.uint8)
    lrn_pool.launch_lrn_max_pool_fwd(x, y, index, norm, window, config, save=True)
    pool_lrn.launch_max_pool_lrn_bwd(y, y, index, x, norm, window, config, gated=False)
    assert found == [[3 * (2 if rows == 3 else 1) * 4, min(rows, 5)]] * 2


def splits_of(launches: list[Launch], kernel: str) -> int:
    """Programs of a launch whose tiles are as large as a packed filter."""
    (launch,) = [launch for launch in launches if launch.kernel == kernel]
    return launch.grid[0]


@pytest.mark.parametrize("images", [8, 6000])
def test_a_split_of_the_packed_filter_gradient_is_no_longer_than_its_offsets(images: int) -> None:
    """Those inside have 32 bits; more images are more splits than the configuration's one."""
    dz = described(images, 64, 112, 112)
    least = -(-images * 115 * 115 * 64 // 2**31)
    packed, dw = described(images, 16, 115, 115), torch.empty(64, 3, 7, 7, device="meta")
    found = packed_wgrad_config(64, 2**27, OPS, SM_90)
    tile = replace(found.wgrad.tile, block_m=256, block_n=64)
    config = replace(found, wgrad=replace(found.wgrad, tile=tile, splits=1))
    with record_launches() as launches:
        launch_packed_wgrad(packed, dz, dw, config, finish_config(), precision="ieee")
    splits = splits_of(launches, "_packed_wgrad_kernel")
    assert splits == 1 if images == 8 else least <= splits <= 2 * least
    # among those of the stem
    small = described(images, 64, 56, 56)
    maps = StemMaps(packed, small, small, dz, small, described(images, 192, 56, 56))
    of_stem = stem_wgrad_config((64, 64, 192), 2**27, 2**25, OPS, SM_90)
    with record_launches() as launches:
        launch_stem_wgrad(
            StemShape(ImageConv(3, 64, 7, 2, 3), 64, 192), maps,
            replace(of_stem, conv1=config.wgrad), finish_config(),
            filters=(True, False, False), bias3=False, precision="ieee",
        )  # fmt: skip
    assert splits_of(launches, "_stem_wgrad_kernel") == splits

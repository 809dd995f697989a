"""Sizes, widths and counts against the published facts."""

import pytest

from fused_inception import geometry
from fused_inception.geometry import GOOGLENET, InceptionDims, googlenet_dims, googlenet_sizes
from tests.facts import FACTS, MODULES

ODD = InceptionDims(13, 7, 5, 11, 3, 17, 19)


def test_table_has_the_nine_modules() -> None:
    assert (
        list(GOOGLENET) == list(MODULES) == ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    )


@pytest.mark.parametrize("name", MODULES)
def test_module_widths(name: str) -> None:
    dims, fact = GOOGLENET[name], MODULES[name]
    columns = ("in_channels", "ch1x1", "ch3x3red", "ch3x3", "ch5x5red", "ch5x5", "pool_proj")
    assert dims.widths == tuple(fact[column] for column in columns)
    assert dims.out_channels == fact["out_channels"]


@pytest.mark.parametrize("kernel_5x5", [3, 5])
@pytest.mark.parametrize("name", MODULES)
def test_module_counts(name: str, kernel_5x5: int) -> None:
    dims, fact = googlenet_dims(kernel_5x5)[name], MODULES[name]
    form = f"{kernel_5x5}x{kernel_5x5}"
    assert dims.weights == fact[f"weights_{form}"]
    assert sum(shape[0] for shape in dims.filter_shapes) == fact["biases"]
    assert dims.weights * fact["side"] ** 2 == fact[f"multiply_adds_{form}"]


def test_each_module_reads_what_the_one_before_wrote() -> None:
    modules = list(GOOGLENET.values())
    assert [dims.in_channels for dims in modules[1:]] == [
        dims.out_channels for dims in modules[:-1]
    ]


def test_googlenet_needs_no_gaps_between_slots() -> None:
    for dims in GOOGLENET.values():
        assert dims.slots == dims.offsets
        assert dims.slot_channels == dims.out_channels
        assert dims.reduced_channels == dims.ch3x3red + dims.ch5x5red


def test_offsets_are_exact_and_slots_aligned() -> None:
    assert ODD.out_channels == 7 + 11 + 17 + 19
    assert ODD.offsets == (0, 7, 18, 35)
    assert ODD.slots == (0, 8, 24, 48)
    assert ODD.slot_channels == 8 + 16 + 24 + 24
    assert ODD.reduced_channels == 16


def test_filter_shapes_are_in_order() -> None:
    assert ODD.filter_shapes == (
        (7, 13, 1, 1),
        (5, 13, 1, 1),
        (11, 5, 3, 3),
        (3, 13, 1, 1),
        (17, 3, 5, 5),
        (19, 13, 1, 1),
    )


@pytest.mark.parametrize("image_size", FACTS["sizes"])
def test_sizes_of_the_maps(image_size: str) -> None:
    # both networks have the same sizes here: the last pool differs in values alone
    for pool4_kernel in (2, 3):
        sizes = googlenet_sizes(int(image_size), pool4_kernel)
        chain = [sizes.conv1, sizes.maxpool1, sizes.maxpool2, sizes.maxpool3, sizes.maxpool4]
        assert chain == FACTS["sizes"][image_size]


@pytest.mark.parametrize("name", MODULES)
def test_sizes_of_the_modules(name: str) -> None:
    assert googlenet_sizes(224).module(name) == MODULES[name]["side"]


@pytest.mark.parametrize(
    ("variant", "pool4_kernel", "smallest", "with_heads"),
    [("paper", 3, 31, 47), ("torchvision", 2, 15, 15), ("torchvision5x5", 2, 15, 15)],
)
def test_smallest_image(variant: str, pool4_kernel: int, smallest: int, with_heads: int) -> None:
    assert geometry.smallest_image(variant, heads=False) == smallest
    assert geometry.smallest_image(variant, heads=True) == with_heads
    assert googlenet_sizes(smallest, pool4_kernel).maxpool4 == 1
    with pytest.raises(geometry.TooSmallError, match="does not fit a side of 1"):
        googlenet_sizes(smallest - 1, pool4_kernel)


def test_inputs_of_the_auxiliary_head() -> None:
    assert geometry.aux_features(14) == 2048
    assert geometry.aux_features(googlenet_sizes(47).maxpool3) == 128
    with pytest.raises(ValueError, match="does not fit"):
        geometry.aux_features(googlenet_sizes(46).maxpool3)


@pytest.mark.parametrize(("n", "aligned"), [(0, 0), (1, 8), (8, 8), (9, 16), (208, 208)])
def test_align_up(n: int, aligned: int) -> None:
    assert geometry.align_up(n) == aligned


@pytest.mark.parametrize(
    ("megabytes", "ends"),
    [
        ([], []),
        ([6, 5], [1]),
        ([3, 2, 2, 2, 2], [4]),
        ([10, 9, 11, 8, 10], [1, 3, 4]),
        ([22, 9, 11, 8, 10], [1, 3, 4]),
        ([42, 36, 21, 19, 19], [0, 1, 3, 4]),
        ([60, 1, 1], [0, 2]),
    ],
    ids=str,
)
def test_modules_are_finished_together(megabytes: list[int], ends: list[int]) -> None:
    """Few bytes all at once, else two by two, whatever their sizes; alone what no cache holds."""
    assert geometry.finished_together([n * 2**20 for n in megabytes]) == ends

"""Which implementation computes a convolution: the rule, the tables, the block that forces one."""

import pytest

from fused_inception.geometry import GOOGLENET
from fused_inception.tuning import dispatch, table
from fused_inception.tuning.dispatch import CONV_PARTS, MODULE_PARTS, PARTS, Choice
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS

pytestmark = pytest.mark.usefixtures("own_tables")

BF16 = Operands(2, "tf32")
TARGET = TARGETS["sm_90"]
DIMS = GOOGLENET["4a"]
PIXELS = 8192
KEY = dispatch.module_key(DIMS, PIXELS, BF16)


def plan(**options: bool) -> dispatch.Plan:
    return dispatch.module_plan(DIMS, PIXELS, BF16, TARGET, **options)


def measured(fields: dict[str, object], key: table.Key = KEY) -> None:
    """Write a user's table of one entry."""
    entry = table.Entry(dispatch.FAMILY, key, fields, {"gpu": "a GPU"})
    table.write(table.user_path("sm_90"), "sm_90", [entry])
    table.forget()


def test_without_a_measurement_all_is_ours() -> None:
    for choices in (plan().choices, plan(norm=True).choices):
        assert set(choices) == set(MODULE_PARTS)
        assert set(choices.values()) == {Choice(False, "no measurement")}
    single = dispatch.conv_plan(64, 192, 3, 1, PIXELS, BF16, TARGET)
    assert {str(single.choices[part]) for part in CONV_PARTS} == {"triton: no measurement"}


def test_a_table_decides_for_its_problem_alone() -> None:
    measured({"conv3.forward": 1.231, "conv3.dgrad": 0.8, "conv5.wgrad": 1})
    said = {part: str(choice) for part, choice in plan().choices.items()}
    assert said == {
        "conv3.forward": "library: table sm_90, library 1.23x as fast",
        "conv3.dgrad": "triton: table sm_90, library 0.80x as fast",
        "conv3.wgrad": "triton: no measurement",
        "conv5.forward": "triton: no measurement",
        "conv5.dgrad": "triton: no measurement",
        "conv5.wgrad": "triton: table sm_90, library 1.00x as fast",
    }
    others = (
        plan(norm=True),
        dispatch.module_plan(GOOGLENET["4b"], PIXELS, BF16, TARGET),
        dispatch.module_plan(DIMS, 2 * PIXELS, BF16, TARGET),
        dispatch.module_plan(DIMS, PIXELS, Operands(4, "tf32"), TARGET),
        dispatch.module_plan(DIMS, PIXELS, BF16, TARGETS["sm_80"]),
    )
    for other in others:
        assert not any(other.library(part) for part in MODULE_PARTS)
    # of 16-bit types the precision means nothing
    ieee = dispatch.module_plan(DIMS, PIXELS, Operands(2, "ieee"), TARGET)
    assert ieee.library("conv3.forward")


def test_keys_tell_problems_apart() -> None:
    fp32 = [Operands(4, "tf32"), Operands(4, "ieee")]
    keys = [dispatch.module_key(DIMS, PIXELS, ops) for ops in (BF16, *fp32)]
    keys += [dispatch.conv_key(64, 64, 1, 1, PIXELS, ops) for ops in (BF16, *fp32)]
    keys += [
        dispatch.conv_key(64, 64, 1, 2, PIXELS, BF16),
        dispatch.conv_key(64, 64, 3, 1, 1, BF16),
    ]
    keys += [dispatch.conv_key(64, 64, 1, 1, PIXELS, BF16, norm=True)]
    keys += [dispatch.module_key(DIMS, PIXELS, BF16, norm=True)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "fields", [{"conv3.forward": "library"}, {"conv3.forward": 0}, {"conv.forward": 2.0}], ids=str
)
def test_an_entry_of_no_use_is_ignored(fields: dict[str, object]) -> None:
    measured({**fields, "conv5.forward": 2.0})
    with pytest.warns(RuntimeWarning, match="fields must be conv3.forward"):
        choices = plan().choices
    assert set(choices.values()) == {Choice(False, "no measurement")}
    assert plan().choices == choices


def test_forced() -> None:
    measured({"conv3.forward": 2.0})
    with dispatch.forced(["conv5.dgrad"]):
        taken = {part for part in MODULE_PARTS if plan().library(part)}
        assert taken == {"conv5.dgrad"}
        assert str(plan().choices["conv5.dgrad"]) == "library: forced"
        with dispatch.forced(()):
            assert str(plan().choices["conv3.forward"]) == "triton: forced"
        assert plan().library("conv5.dgrad")
    assert plan().library("conv3.forward")
    assert not plan().library("conv5.dgrad")
    unknown = pytest.raises(ValueError, match=r"parts must be among .*, got \['conv7.forward'\]")
    with unknown, dispatch.forced([*PARTS, "conv7.forward"]):
        pass

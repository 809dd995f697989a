"""The yardsticks measure: what is worse than PyTorch by more than the slack fails."""

import pytest
import torch

from tests.tolerances import assert_within, assert_within_l2

BOTH = pytest.mark.parametrize("check", [assert_within, assert_within_l2])
WANT = torch.linspace(-1, 1, 101, dtype=torch.float64)
BASELINE = (WANT + 1e-3).float()


@BOTH
def test_errors_up_to_the_slack_pass(check) -> None:
    check("y", BASELINE, WANT, BASELINE)
    check("y", (WANT - 1.9e-3).float(), WANT, BASELINE)
    check("y", (WANT + 2.9e-3).float(), WANT, BASELINE, slack=3.0)


@BOTH
def test_larger_errors_fail(check) -> None:
    with pytest.raises(AssertionError, match=r"y: .* error .*, allowed"):
        check("y", (WANT + 2.1e-3).float(), WANT, BASELINE)


@BOTH
def test_an_exact_yardstick_leaves_room_for_rounding_alone(check) -> None:
    check("y", WANT.float() * (1 + 2**-22), WANT, WANT.float())
    with pytest.raises(AssertionError, match="allowed"):
        check("y", WANT.float() * (1 + 2**-18), WANT, WANT.float())


@BOTH
def test_nan_is_reported_as_such(check) -> None:
    got = BASELINE.clone()
    got[3] = float("nan")
    with pytest.raises(AssertionError, match="y: not finite"):
        check("y", got, WANT, BASELINE)


@BOTH
def test_shapes_and_dtypes_must_agree(check) -> None:
    with pytest.raises(AssertionError, match="shape"):
        check("y", BASELINE[:1], WANT, BASELINE)
    with pytest.raises(AssertionError, match="yardstick"):
        check("y", BASELINE.half(), WANT, BASELINE)
    with pytest.raises(AssertionError, match="oracle"):
        check("y", BASELINE, WANT.float(), BASELINE)


@BOTH
def test_empty_tensors_pass(check) -> None:
    check("y", BASELINE[:0], WANT[:0], BASELINE[:0])


@pytest.mark.usefixtures("nan_filled_empty")
def test_unwritten_memory_is_nan(device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.empty(1000, dtype=dtype, device=device).isnan().all()
    assert (torch.empty(1000, dtype=torch.uint8, device=device) == 255).all()

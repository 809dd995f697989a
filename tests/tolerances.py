"""How near is near enough: PyTorch's own error in the tested dtype is the yardstick."""

import torch
from torch import Tensor


def assert_within(
    name: str, got: Tensor, want: Tensor, baseline: Tensor, *, slack: float = 2.0
) -> None:
    """Assert that `got` is as close to `want` as `baseline` is, times `slack`, in the maximum.

    Args:
        name: what is compared, for the message.
        got: the result under test, finite.
        want: the oracle, fp64.
        baseline: PyTorch's result in the dtype of `got`.
        slack: 2 for outputs, 3 for gradients.
    """
    _assert_comparable(name, got, want, baseline)
    floor = 4 * torch.finfo(got.dtype).eps * _largest(want)
    error = _largest(got.double() - want)
    allowed = slack * _largest(baseline.double() - want) + floor
    assert error <= allowed, f"{name}: max error {error:.3e}, allowed {allowed:.3e}"


def assert_within_l2(
    name: str, got: Tensor, want: Tensor, baseline: Tensor, *, slack: float = 2.0
) -> None:
    """The same in relative L2, for whole networks: one flipped arg-max breaks a maximum."""
    _assert_comparable(name, got, want, baseline)
    scale = want.norm().item()
    floor = 4 * torch.finfo(got.dtype).eps * scale
    error = (got.double() - want).norm().item()
    allowed = slack * (baseline.double() - want).norm().item() + floor
    assert error <= allowed, (
        f"{name}: relative L2 error {error / scale:.3e}, allowed {allowed / scale:.3e}"
    )


def _assert_comparable(name: str, got: Tensor, want: Tensor, baseline: Tensor) -> None:
    assert want.dtype == torch.float64, f"{name}: the oracle is {want.dtype}"
    assert got.dtype == baseline.dtype, f"{name}: {got.dtype} against a {baseline.dtype} yardstick"
    assert got.shape == want.shape == baseline.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}, "
        f"yardstick {tuple(baseline.shape)}"
    )
    assert torch.isfinite(got).all(), f"{name}: not finite"


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0

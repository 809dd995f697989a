"""BatchNorm: what its layers hold, what they can be computed from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_inception.checks.tensors import beside, names_of, placed, tensor


def norm_vectors(
    x: Tensor, name: str, vectors: Sequence[Tensor | None], widths: Sequence[int], *, casts: bool
) -> list[Tensor]:
    """The tensors [C] of one kind, one for each of `widths`; none where all are None.

    Raises:
        ValueError, TypeError: some are None and some are not; of shapes or devices, of dtypes.
    """
    present = [t for t in vectors if t is not None]
    if not present:
        return present
    if len(present) != len(widths):
        raise ValueError(f"{name} must be {len(widths)} tensors or all None, got {len(present)}")
    allowed = beside(x, casts)
    for t, width in zip(present, widths, strict=True):
        tensor(name, t)
        if t.shape != (width,):
            raise ValueError(f"{name} must be of shape [{width}], got {list(t.shape)}")
        placed(x, name, t, allowed)
    return present


def written_to(name: str, vectors: Sequence[Tensor]) -> None:
    """Training can write to these: kernels know no strides.

    Raises:
        ValueError: one is not contiguous.
    """
    for t in vectors:
        if not t.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, as training writes to them, got stride {t.stride(0)}"
            )


def one_dtype(means: Sequence[Tensor], variances: Sequence[Tensor]) -> None:
    """Mean and variance of a layer can be written in one launch.

    Raises:
        TypeError: they differ in dtype.
    """
    for mean, var in zip(means, variances, strict=True):
        if mean.dtype != var.dtype:
            got = f"{names_of([mean.dtype])} and {names_of([var.dtype])}"
            raise TypeError(f"running_means and running_vars must be of one dtype, got {got}")


def norm_pair(first: str, a: Sequence[Tensor], second: str, b: Sequence[Tensor]) -> None:
    """Both kinds are there, or neither.

    Raises:
        ValueError: one alone is.
    """
    # lengths: torch.compile of torch 2.11 traces no bool() of a list
    if (len(a) > 0) != (len(b) > 0):
        missing, given = (first, second) if len(b) > 0 else (second, first)
        raise ValueError(f"{given} must come with {missing}, which is None")


def batch_counters(
    counters: Sequence[Tensor | None], momentum: float | None, running: Sequence[Tensor]
) -> None:
    """One counter of batches for each running mean, or none where no average is cumulative.

    Raises:
        ValueError: they are missing where a cumulative average needs them, or too few.
        TypeError: one is not int64.
    """
    present = [t for t in counters if t is not None]
    if not running:
        return
    if not present and momentum is None:
        raise ValueError("momentum=None averages over all batches and needs batches_tracked")
    if present and len(present) != len(running):
        raise ValueError(
            f"batches_tracked must be {len(running)} tensors or all None, got {len(present)}"
        )
    for t, mean in zip(present, running, strict=False):
        if t.dtype != torch.int64:
            raise TypeError(f"batches_tracked must be int64, got {names_of([t.dtype])}")
        if t.device != mean.device:
            raise ValueError(f"batches_tracked must be on {mean.device}, got {t.device}")


def batch_statistics(n: int, c: int, h: int, w: int, eps: float) -> None:
    """[N, C, H, W] has more than one value a channel, and `eps` is positive, as PyTorch asks.

    Raises:
        ValueError: it has one, PyTorch's words; eps is not.
    """
    if n * h * w == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {torch.Size([n, c, h, w])}"
        )
    if not eps > 0:
        raise ValueError(f"eps must be positive in training, got {eps}")

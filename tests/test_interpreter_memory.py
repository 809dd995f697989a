"""The watch over memory that all tests of kernels run under: it sees each kind of misuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="kernels run on the GPU, where a sanitizer sees them"
)

if HAS_TRITON:
    import triton
    import triton.language as tl

    from tests.interpreter_memory import MemoryMisuseError

    @triton.jit
    def double(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

    @triton.jit
    def double_without_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs), mask=offs < n)

    @triton.jit
    def store_without_mask(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < n))

    @triton.jit
    def overlapping(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

    # programs run one after another: here the first writes before the second reads, below after
    @triton.jit
    def shifted_back(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs - 1, mask=(offs > 0) & (offs < n))
        tl.store(y_ptr + offs, x, mask=offs < n)

    @triton.jit
    def shifted(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs + 1, mask=offs + 1 < n)
        tl.store(y_ptr + offs, x, mask=offs < n)

    @triton.jit
    def stored_and_read(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)
        tl.store(x_ptr + offs, tl.load(y_ptr + offs, mask=offs < n), mask=offs < n)

    @triton.jit
    def twice(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n), mask=offs < n)

    @triton.jit
    def all_to_one(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(y_ptr + offs * 0, tl.load(x_ptr + offs, mask=offs < n, other=0))

    # kernel, whether y is x, what is said
    CASES: dict[str, tuple[Any, bool, str]] = {
        "read outside": (double_without_mask, False, r"\(1, 0, 0\) reads outside: bytes 48 to 63"),
        "written outside": (store_without_mask, False, "writes outside: bytes 48 to 63 of y_ptr"),
        "written by two": (overlapping, False, "writes what another has written"),
        "read behind another": (shifted_back, True, "reads what another has written"),
        "read before another": (shifted, True, "writes what another has read"),
        "lanes in place": (shifted, True, "writes what another of its lanes has read"),
        "stored and read": (stored_and_read, False, "reads what it has written"),
        "written twice": (twice, False, "writes again what it has written"),
        "different values": (all_to_one, False, "writes different values to one place"),
    }
else:
    CASES = {}


def launch(kernel: Callable[..., Any], x: torch.Tensor, y: torch.Tensor) -> None:
    kernel[(2,)](x, y, x.numel(), BLOCK=8)


@pytest.mark.parametrize("case", CASES)
def test_misuse_is_seen(case: str) -> None:
    kernel, in_place, text = CASES[case]
    x = torch.randn(12)
    with pytest.raises(MemoryMisuseError, match=text):
        launch(kernel, x, x if in_place else torch.zeros(12))


def test_what_is_right_runs() -> None:
    """In place too, and on views of one storage, each of which is a view of its own."""
    x = torch.randn(12)
    want = 2 * x
    launch(double, x, x)
    assert torch.equal(x, want)
    both = torch.cat([x, torch.zeros(12)])
    launch(double, both[:12], both[12:])
    assert torch.equal(both, torch.cat([x, 2 * x]))


def test_a_view_ends_where_it_ends() -> None:
    """Not where its storage does."""
    x = torch.randn(16)
    with pytest.raises(
        MemoryMisuseError, match=r"reads outside: bytes 48 to 63 of x_ptr \[0, 48\)"
    ):
        launch(double_without_mask, x[:12], torch.zeros(12))

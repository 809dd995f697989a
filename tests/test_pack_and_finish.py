"""Packing and launch F, of one operator and of several at once."""

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import fused_inception as fi
from fused_inception import functional, geometry
from fused_inception.geometry import InceptionDims, align_up
from fused_inception.kernels.finish import (
    BiasSum,
    FilterSum,
    Sums,
    Unfinished,
    finish_arguments,
    launch_finish,
)
from fused_inception.kernels.pack import launch_pack, module_packing, row_packing
from fused_inception.tuning.configs import FinishConfig

FIRST = InceptionDims(16, 8, 16, 16, 8, 8, 8)
ODD = InceptionDims(21, 10, 12, 20, 6, 9, 11, 3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def parameters(shapes: tuple[tuple[int, ...], ...], device: torch.device) -> list[Tensor]:
    """Filters, every other one in channels last."""
    draw = torch.Generator().manual_seed(5)
    filters = [torch.randn(shape, generator=draw).to(device) for shape in shapes]
    for i in range(0, len(filters), 2):
        filters[i] = filters[i].contiguous(memory_format=torch.channels_last)
    return filters


def packed_rows(weight: Tensor, *, for_dgrad: bool) -> Tensor:
    """[slots of C_OUT, taps, slots of C_IN], or [slots of C_IN, taps backwards, slots of C_OUT]."""
    c_out, c_in, k, _ = weight.shape
    padded = weight.new_zeros((align_up(c_out), align_up(c_in), k, k))
    padded[:c_out, :c_in] = weight
    rows = padded.flatten(2).transpose(1, 2)
    return rows.flip(1).permute(2, 1, 0) if for_dgrad else rows


def packed_module(filters: list[Tensor], *, for_dgrad: bool) -> Tensor:
    """The 1x1 that read x as one matrix, then the 3x3, the 5x5, the projection."""
    w1, w3r, w3, w5r, w5, wp = (packed_rows(w, for_dgrad=for_dgrad) for w in filters)
    cat = torch.cat([w1, w3r, w5r], dim=2 if for_dgrad else 0)
    return torch.cat([part.flatten() for part in (cat, w3, w5, wp)])


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("for_dgrad", [False, True])
def test_several_operators_are_packed_at_once(
    for_dgrad: bool, dtype: torch.dtype, device: torch.device
) -> None:
    shapes = ((13, 5, 1, 1), (4, 9, 3, 3))
    filters = [parameters(of, device) for of in (FIRST.filter_shapes, shapes, ODD.filter_shapes)]
    biases = [torch.randn(w.shape[0], device=device) for of in filters for w in of]
    packings = [module_packing(FIRST), row_packing((13, 5, 1), (4, 9, 9)), module_packing(ODD)]
    with fi.record_launches() as launches:
        packed = launch_pack(
            packings, [w for of in filters for w in of], None if for_dgrad else biases, dtype,
            block=64,
        )  # fmt: skip
    assert [launch.kernel for launch in launches] == ["_pack_kernel"]
    assert len(packed) == 3
    rows = [packed_rows(w, for_dgrad=for_dgrad).flatten() for w in filters[1]]
    want = [packed_module(of, for_dgrad=for_dgrad) for of in (filters[0], filters[2])]
    want.insert(1, torch.cat(rows))
    for (w, _), expected in zip(packed, want, strict=True):
        assert torch.equal(w, expected.to(dtype))
        assert w.data_ptr() % 16 == 0
    if for_dgrad:
        assert not any(b.numel() for _, b in packed)
        return
    slots = [nn.functional.pad(b, (0, -len(b) % 8)) for b in biases]
    order = [0, 1, 3, 2, 4, 5]  # of a module's packed biases
    assert torch.equal(packed[0][1], torch.cat([slots[i] for i in order]))
    assert torch.equal(packed[1][1], torch.cat(slots[6:8]))
    assert torch.equal(packed[2][1], torch.cat([slots[8 + i] for i in order]))


def two_parts(dtype: torch.dtype, device: torch.device) -> list[Unfinished]:
    """Of two operators: the first has a filter and a bias that need no gradient; of the second the
    filters lie side by side in partial sums that begin behind others."""
    draw = torch.Generator().manual_seed(7)

    def partial(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device)

    def grad(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    none = grad(0)
    last = grad(11, 6, 3, 3).to(memory_format=torch.channels_last)
    first = Unfinished(
        Sums(
            (FilterSum(7, 5, 1, 8, 8, 0), FilterSum(11, 6, 9, 8, 16, 0)),
            (BiasSum(7, 24, 0), BiasSum(11, 24, 8)),
        ),
        (none, last), (none, partial(3, 72, 16)), (0, 0), (0, 3),
        (none, grad(11)), (none, partial(130, 24)),
    )  # fmt: skip
    wide = partial(64 + 16 * 8 * 40)
    second = Unfinished(
        Sums(
            (FilterSum(17, 7, 1, 8, 40, 0), FilterSum(16, 7, 1, 8, 40, 24)),
            (BiasSum(17, 17, 0), BiasSum(16, 16, 0)),
        ),
        (grad(17, 7, 1, 1), grad(16, 7, 1, 1)), (wide, wide), (64, 64), (16, 16),
        (grad(17), grad(16)), (partial(1, 17), partial(16, 16)),
    )  # fmt: skip
    return [first, second]


def sums_of(part: Unfinished) -> list[Tensor]:
    """The gradients of all filters and all biases that have elements, in fp64."""
    found = []
    for of, grad, partial, start, splits in zip(
        part.sums.filters, part.filter_grads, part.partials, part.starts, part.splits, strict=True
    ):
        if grad.numel():
            rows = of.taps * of.slot_in
            flat = partial.flatten()[start : start + splits * rows * of.row]
            total = flat.view(splits, of.taps, of.slot_in, of.row).double().sum(0)
            total = total[:, : of.c_in, of.column : of.column + of.c_out]
            found.append(total.permute(2, 1, 0).reshape(grad.shape))
    for of, grad, columns in zip(part.sums.biases, part.bias_grads, part.columns, strict=True):
        if grad.numel():
            found.append(columns.double().sum(0)[of.column : of.column + of.c_out])
    return found


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_operators_are_finished_at_once(dtype: torch.dtype, device: torch.device) -> None:
    parts = two_parts(dtype, device)
    with fi.record_launches() as launches:
        launch_finish(parts, FinishConfig(32, 32, 4))
    assert [launch.kernel for launch in launches] == ["_finish_kernel"]
    for part in parts:
        grads = [grad for grad in (*part.filter_grads, *part.bias_grads) if grad.numel()]
        assert len(grads) == (2 if part is parts[0] else 4)
        for grad, want in zip(grads, sums_of(part), strict=True):
            # a rounding apart where fp32 and fp64 round to 16 bits differently
            rtol = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
            torch.testing.assert_close(grad.double(), want.to(dtype).double(), rtol=rtol, atol=1e-5)


def test_sizes_of_a_batch_are_no_constants(device: torch.device) -> None:
    """Triton compiles anew for an integer in a tuple that is 1 or a multiple of 16."""
    parts = two_parts(torch.float32, device)
    splits = sorted(n for part in parts for n in part.splits)
    assert splits == [0, 3, 16, 16]
    _, _, (_, _, sizes, rows) = finish_arguments(parts, FinishConfig(32, 32, 4))
    assert sizes == (3, 9, 5, 35, 5, 35)
    assert rows == (263, 5, 35)


def test_gradients_of_a_trunk_wait_for_each_other(
    device: torch.device, few_large_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters of all modules are packed in one launch each way, and their gradients are finished
    in one, but where the partial sums would be many."""
    second = InceptionDims(40, 16, 8, 8, 8, 16, 8)
    x = torch.randn(1, 16, 3, 3, device=device)
    leaves = [
        [t for w in parameters(dims.filter_shapes, device) for t in (w, w.new_zeros(w.shape[0]))]
        for dims in (FIRST, second)
    ]
    flat = [t.requires_grad_() for of in leaves for t in of]
    runs = []
    for limit in (geometry.CACHE_BYTES, 0):
        monkeypatch.setattr(geometry, "CACHE_BYTES", limit)
        with fi.backend("triton"), fi.record_launches() as launches:
            y, _ = functional.inception_trunk(x, leaves, pools={})
            runs.append(torch.autograd.grad(y.sum(), flat))
        kernels = [launch.kernel for launch in launches]
        assert kernels.count("_pack_kernel") == 2
        assert kernels.count("_finish_kernel") == (2 if limit == 0 else 1)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

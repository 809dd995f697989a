"""Replayed scripts give the numbers of the scripts themselves, bit for bit, and only where they
may."""

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("triton")

import fused_inception as fi
from fused_inception import functional
from fused_inception.geometry import Window
from fused_inception.ops import global_pool_triton, replay
from fused_inception.tuning import dispatch, table
from tests.replaying import replaying

pytestmark = pytest.mark.usefixtures("on_device")
WIDTHS = (16, 8, 8, 16, 8, 8, 8)
SMALL = (2, 16, 4, 5)


class Stem(nn.Module):
    """conv1 to pool2, narrow."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (3, 8, 7), (8, 8, 1), (8, 16, 3)
        self.convs = nn.ModuleList([nn.Conv2d(*shape) for shape in shapes])

    def forward(self, x: Tensor) -> Tensor:
        parameters = [t for conv in self.convs for t in (conv.weight, conv.bias)]
        return functional.googlenet_stem(x, *parameters)


class Trunk(nn.Module):
    """Three modules, the first tapped, a pool behind the second, the mean at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([fi.Inception(c, *WIDTHS[1:]) for c in (16, 40, 40)])

    def forward(self, x: Tensor) -> Any:
        parameters = [
            [t for conv in _convs(block) for t in (conv.weight, conv.bias)] for block in self.blocks
        ]
        y, tapped = functional.inception_trunk(
            x,
            parameters,
            pools={1: Window(3, 2, 0, True)},
            taps=[0],
            global_pool=True,
            dropout=0.2 * self.training,
        )
        return y, *tapped


def _convs(block: nn.Module) -> Iterator[nn.Conv2d]:
    return (module for module in block.modules() if isinstance(module, nn.Conv2d))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "inception": (lambda: fi.Inception(*WIDTHS), SMALL),
    "inception_bn": (lambda: fi.Inception(*WIDTHS, norm="batch"), SMALL),
    "inception_naive": (lambda: fi.InceptionNaive(16, 8, 8, 8), SMALL),
    "conv": (lambda: fi.ConvBlock(16, 8, kernel_size=3, padding=1), SMALL),
    "conv_bn": (lambda: fi.ConvBlock(16, 8, kernel_size=3, padding=1, norm="batch"), SMALL),
    "image": (lambda: fi.ConvBlock(3, 8, kernel_size=7, stride=2, padding=3), (1, 3, 9, 10)),
    "max_pool": (lambda: fi.MaxPool2d(3, 2, ceil_mode=True), SMALL),
    "norm_pool": (lambda: fi.LRNMaxPool2d(5, 3, 2, ceil_mode=True), SMALL),
    "global_pool": (fi.GlobalAvgPool2d, SMALL),
    "auxiliary": (lambda: fi.InceptionAux(16, 5, dropout=0.5, pool="adaptive"), SMALL),
    "stem": (Stem, (1, 3, 20, 18)),
    "trunk": (Trunk, SMALL),
}


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, all gradients, running statistics."""
    torch.manual_seed(1)
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y.square().sum() for y in outputs), torch.zeros(()))
    gradients = torch.autograd.grad(loss, [x, *model.parameters()])
    return [*outputs, *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_the_same(name: str) -> None:
    """The first of three steps is run, the second, on other data, is recorded, the third, on the
    data of the first in other memory, is replayed."""
    make, shape = MODELS[name]
    model = make()
    state = copy.deepcopy(model.state_dict())
    x, other = torch.randn(shape), torch.randn(shape)
    found = []
    with fi.backend("triton"), replaying() as replays:
        for data in (x, other, x):
            model.load_state_dict(state)
            found.append(_step(model, data))
    # forward and backward; linear layers are PyTorch's
    assert len(replays) == 2
    ran, recorded, replayed = found
    for a, b, c in zip(ran, recorded, replayed, strict=True):
        assert torch.equal(a, c)
        assert a.stride() == c.stride()
        assert not torch.equal(a, b) or a.dtype == torch.int64  # counters of batches


@pytest.mark.parametrize("name", ["inception", "stem", "trunk"])
def test_inference_with_kept_filters(name: str) -> None:
    """What is behind the filters that a cache keeps is replayed; new ones are read."""
    make, shape = MODELS[name]
    model = make().eval()
    x = torch.randn(shape)
    with fi.backend("triton"), torch.no_grad(), replaying() as replays:
        # the second call finds that filters are kept, the third records what is behind them
        first, _, _, again = (model(x) for _ in range(4))
        assert len(replays) == 1
        for parameter in model.parameters():
            parameter.mul_(1.5)
        changed = model(x)
        assert len(replays) == 2
    with fi.backend("triton"), torch.no_grad():
        wanted = model(x)
    assert _all_equal(first, again)
    assert _all_equal(changed, wanted)
    assert not _all_equal(first, changed)


def _all_equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(map(_all_equal, a, b))
    return torch.equal(a, b)


def _forward_and_backward(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    y = functional.conv2d_relu(x, weight, bias, padding=1)
    torch.autograd.grad(y.sum(), weight)


def test_other_arguments_are_other_calls() -> None:
    """A dtype, strides, an alignment, gradients that are needed, a batch."""
    weight, bias = torch.randn(8, 16, 3, 3, requires_grad=True), torch.randn(8)
    x = torch.randn(3, 32, 4, 5).contiguous(memory_format=torch.channels_last)
    dense = x[:, :16].contiguous(memory_format=torch.channels_last)
    by_channels = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    unaligned = torch.randn(9)[1:]
    assert bias.data_ptr() % 16 != unaligned.data_ptr() % 16
    calls = [
        (dense, weight, bias),
        (dense[:2], weight, bias),
        (x[:, :16], weight, bias),
        (dense.clone(memory_format=torch.channels_last).requires_grad_(), weight, bias),
        (dense, by_channels, bias),
        (dense, weight, unaligned),
        (dense.half(), weight.detach().half().requires_grad_(), bias.half()),
    ]
    with fi.backend("triton"), replaying() as replays:
        for arguments in calls:
            before = len(replays)
            for _ in range(2):
                _forward_and_backward(*arguments)
            # the forward of a map is the same whether it needs a gradient
            assert len(replays) - before <= 2
            _forward_and_backward(*arguments)
            assert len({id(recording) for recording in replays[-2:]}) == 2
    assert len({id(recording) for recording in replays}) >= 2 * len(calls) - 1


@pytest.fixture
def pool() -> Callable[[], Tensor]:
    """One call that can be replayed."""
    x = torch.randn(SMALL).contiguous(memory_format=torch.channels_last)
    return lambda: functional.max_pool2d(x, 3, 2)


def test_whoever_watches_sees_the_script(pool: Callable[[], Tensor]) -> None:
    with fi.backend("triton"), replaying() as replays:
        for _ in range(3):
            pool()
        assert len(replays) == 1
        with fi.record_launches() as launched:
            pool()
        assert len(launched) == 1
        with dispatch.forced(()):
            pool()
        with dispatch.recorded():
            pool()
        with table.asked():
            pool()
        assert len(replays) == 1
        for _ in range(3):
            pool()
        # a table may say something else than before
        assert len(replays) == 2
        table.forget()
        for _ in range(3):
            pool()
        assert len(replays) == 3


def test_settings_of_tf32_are_part_of_a_call(pool: Callable[[], Tensor]) -> None:
    with fi.backend("triton"), replaying() as replays:
        for _ in range(3):
            pool()
        with torch.backends.cudnn.flags(allow_tf32=not torch.backends.cudnn.allow_tf32):
            pool()
        assert len(replays) == 1


@pytest.mark.parametrize(
    "extra",
    [
        lambda x, y: y + 1,  # computes
        lambda x, y: y.copy_(x.new_ones(1)),
        lambda x, y: y.fill_(0.5),
        lambda x, y: x,  # returns an argument
        lambda x, y: torch.ones_like(y),
        lambda x, y: y.view(torch.int32),  # of another dtype than made
        lambda x, y: x.sum().item() and y,  # reads memory
        lambda x, y: _kept,
    ],
)
def test_what_is_no_launch_is_never_replayed(extra: Callable[[Tensor, Tensor], Any]) -> None:
    ran = []

    def script(x: Tensor) -> Any:
        ran.append(x)
        return extra(x, torch.empty_like(x))

    run = replay.replayed(script)
    with replaying() as replays:
        for _ in range(5):
            run(torch.ones(4))
    assert len(ran) == 5
    assert not replays


_kept = torch.ones(4)


def test_outputs_and_memory_of_a_replay() -> None:
    """Views of what is made, lists, None, zeros; new memory each time."""

    def script(x: Tensor, count: int) -> Any:
        whole = torch.zeros(4, 6)
        return [whole[1:, 2:], None, (whole.flatten(), x.new_empty(0))], whole, count

    run = replay.replayed(script)
    with replaying() as replays:
        results = [run(torch.ones(3), 7) for _ in range(4)]
    assert len(replays) == 2
    for (part, none, (flat, empty)), whole, count in results:
        assert none is None
        assert count == 7
        assert part.storage_offset() == 8
        assert part.stride() == (6, 1)
        assert flat.data_ptr() == whole.data_ptr()
        assert empty.numel() == 0
        assert not whole.any()
        whole.fill_(1)
    assert len({whole.data_ptr() for _, whole, _ in results}) == 4


def test_memory_is_that_of_empty_strided(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the short way of this PyTorch, and without it."""
    guards = torch._C._dynamo.guards
    assert replay._EMPTY["cpu"] is guards._empty_strided_cpu  # type: ignore[attr-defined]
    made = [replay._EMPTY["cpu"]]
    monkeypatch.delattr(guards, "_empty_strided_cpu")
    made.append(replay._empty_on("cpu"))
    for empty in made:
        t = empty((2, 8, 4, 5), (160, 1, 40, 8), torch.bfloat16)
        assert (t.shape, t.stride()) == ((2, 8, 4, 5), (160, 1, 40, 8))
        assert (t.dtype, t.device, t.requires_grad) == (torch.bfloat16, torch.device("cpu"), False)
        with torch.inference_mode():
            assert empty((3,), (1,), torch.uint8).is_inference()


def test_memory_of_two_arguments_in_one_storage() -> None:
    """Parameters that are parts of one vector are told apart, wherever they lie in the next."""
    x = torch.randn(SMALL).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 16, 1, 1), torch.randn(8)

    def convolve(bias_first: bool) -> Tensor:
        parts = [bias, weight.flatten()] if bias_first else [weight.flatten(), bias]
        flat = torch.cat(parts).requires_grad_()
        first, second = flat.split([len(part) for part in parts])
        w, b = (second, first) if bias_first else (first, second)
        return functional.conv2d_relu(x, w.view(8, 16, 1, 1), b)

    with fi.backend("triton"), replaying() as replays:
        wanted, recorded, replayed, swapped = map(convolve, (False, False, False, True))
        assert len(replays) == 2
    assert all(torch.equal(y, wanted) for y in (recorded, replayed, swapped))


def test_overlapping_arguments_are_never_replayed() -> None:
    """Nobody knows which of both a launch was given."""
    run = replay.replayed(lambda x, y: _launched(x))
    with replaying() as replays:
        both = torch.randn(SMALL).contiguous(memory_format=torch.channels_last)
        for _ in range(4):
            run(both, both[:1])
    assert not replays


def _launched(x: Tensor) -> Tensor:
    return global_pool_triton.forward(x, None, 1.0)


def test_calls_that_never_repeat_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST", 4)
    run = replay.replayed(lambda x: torch.empty_like(x))
    with replaying() as replays:
        for n in range(1, 20):
            for _ in range(3):
                run(torch.ones(n))
        assert len(replay._known) <= 4
    assert len(replays) >= 10


def test_recording_keeps_no_memory() -> None:
    """What a script frees is free, also while it is recorded, and nothing holds it later."""
    alive: list[weakref.ref[Tensor]] = []
    held = []

    def script(x: Tensor) -> Tensor:
        for _ in range(3):
            scratch = torch.empty(1000)
            alive.append(weakref.ref(scratch))
            held.append(sum(of() is not None for of in alive))
            storages.append(StorageWeakRef(scratch.untyped_storage()))
            del scratch
            held.append(sum(not of.expired() for of in storages))
        return torch.empty_like(x)

    storages: list[StorageWeakRef] = []
    run = replay.replayed(script)
    with replaying() as replays:
        for _ in range(3):
            run(torch.ones(4))
    assert len(replays) == 1
    assert held == [1, 0] * 6


def test_buffers_live_no_longer_than_launches_need_them() -> None:
    model = fi.ConvBlock(16, 8, kernel_size=3, padding=1)
    with fi.backend("triton"), replaying() as replays:
        for _ in range(3):
            _step(model, torch.randn(SMALL))
    _, backward = replays
    made = {b.slot for step in backward.steps for b in step.buffers}
    ended = {slot for step in backward.steps for slot in step.ends}
    returned = {view.slot for view in replay._parts_of(backward.outputs)}
    assert made == ended | returned
    assert not ended & returned
    # of the masked gradient the last launch, which sums and casts, knows nothing
    assert any(step.ends for step in backward.steps[:-1])

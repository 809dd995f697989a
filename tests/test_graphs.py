"""Models in CUDA graphs: refused inputs anywhere, captures where there is a GPU."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.ops import filter_cache
from fused_inception.tools import graphs

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test for a machine with a GPU."""
    return pytest.mark.gpu(NO_GPU(test))


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match="needs an input on a CUDA device, got a tensor on cpu"):
        fi.graphed(fi.Inception(16, 8, 8, 8, 8, 8, 8), torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="needs an input on a CUDA device, got a list"):
        fi.graphed(fi.Inception(16, 8, 8, 8, 8, 8, 8), [torch.zeros(1, 16, 4, 4)])  # type: ignore[arg-type]


class Asks(nn.Linear):
    """Notes at each call whether autocast keeps casts."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.kept: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept.append(torch.is_autocast_cache_enabled())
        return super().forward(x)


class Graph(contextlib.nullcontext[None]):
    """In the place of torch.cuda.graph."""

    default_capture_stream: object = "of the first device"

    def __init__(self, *_: object) -> None:
        super().__init__()


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `graphed` asks of CUDA is a stub; a training graph runs the model once."""
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda model, inputs: model(*inputs))
    monkeypatch.setattr(graphs, "_check", lambda model, x: None)
    monkeypatch.setattr(graphs, "_as_before", lambda model, device: contextlib.nullcontext())


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("train", [True, False])
def test_autocast_keeps_no_cast_in_a_capture(train: bool) -> None:
    """Neither a run ahead nor the capture sees a cached cast."""
    model, x = Asks().train(train), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        fi.graphed(model, x)
        model(x)
    assert model.kept == [True, *[False] * (1 if train else graphs.WARM_UPS + 1), True]


def test_a_cast_is_made_anew_where_none_is_kept() -> None:
    """Also where one was kept before: that is why the capture may stand anywhere."""
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        with torch.no_grad():
            model.weight.mul_(2)
            model.bias.mul_(2)
        assert torch.equal(model(x), before)
        with graphs._without_cached_casts():
            assert torch.equal(model(x), 2 * before)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("train", [True, False])
def test_captures_run_on_the_device_of_the_input(
    train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    current: list[object] = ["cuda:0"]

    @contextlib.contextmanager
    def device(of: object) -> Iterator[None]:
        current.append(of)
        yield
        current.pop()

    class Asked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((current[-1], Graph.default_capture_stream))
            return super().forward(x)

    monkeypatch.setattr(torch.cuda, "device", device)

    class Stream(str):
        def wait_stream(self, other: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream(f"made on {current[-1]}"))
    seen: list[tuple[object, object]] = []
    x = torch.zeros(2, 4)
    fi.graphed(Asked(4, 4).train(train), x)
    assert seen == [(x.device, f"made on {x.device}")] * (1 if train else graphs.WARM_UPS + 1)
    assert Graph.default_capture_stream == "of the first device"


class StaticGradients(torch.autograd.Function):
    """A replay as `torch.cuda.make_graphed_callables` has it: gradients are one and the same
    memory at each."""

    @staticmethod
    def forward(ctx: Any, static: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.static, ctx.shape = static, x.shape
        ctx.save_for_backward(x)
        return x @ weight.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor]:
        (x,) = ctx.saved_tensors
        ctx.static.copy_(x.T @ dy)
        return None, None, ctx.static.detach()


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("keep", [False, True], ids=["accumulated", "zeroed in place"])
def test_gradients_of_replays_accumulate(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2))

    def graph(model: Any, inputs: object) -> None:
        static = torch.zeros(3, 2)
        model.forward = lambda x: StaticGradients.apply(static, x, model.weight)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graph)
    model = Product()
    run = fi.graphed(model, torch.zeros(4, 3))
    wanted = torch.zeros(3, 2)
    for i in range(4):
        if keep and i:
            model.weight.grad.zero_()
            wanted.zero_()
        x = torch.randn(4, 3)
        wanted += x.T @ torch.ones(4, 2)
        run(x).sum().backward()
        torch.testing.assert_close(model.weight.grad, wanted)


@pytest.mark.usefixtures("no_cuda")
def test_a_replay_empties_the_cache_of_filters() -> None:
    """Running statistics advance in it, and no version says so."""
    model, x = nn.Linear(4, 4), torch.zeros(2, 4)
    run = fi.graphed(model, x)
    made: list[int] = []
    for _ in range(2):
        with torch.no_grad():
            filter_cache.kept([x], (), lambda: made.append(1), save=False)
        run(x)
    assert len(made) == 2
    # in eval nothing is replayed
    model.eval()
    for _ in range(2):
        with torch.no_grad():
            filter_cache.kept([x], (), lambda: made.append(1), save=False)
        run(x)
    assert len(made) == 3


def network(variant: str = "paper") -> nn.Module:
    torch.manual_seed(0)
    return fi.googlenet(variant, num_classes=10, image_size=64).to("cuda")


def images(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 3, 64, 64, device="cuda").contiguous(memory_format=torch.channels_last)


@needs_gpu
@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_inference_follows_its_parameters(variant: str) -> None:
    model = network(variant).eval()
    run = fi.graphed(model, images(0))
    for scale in (1.0, 1.1):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
            got = run(images(1))
            torch.testing.assert_close(got, model(images(1)), rtol=1e-5, atol=1e-5)
            other = run(images(2))
    assert not torch.equal(got, other)
    with pytest.raises(ValueError, match=r"captured for \(2, 3, 64, 64\)"):
        run(images(1)[:1])


@needs_gpu
@pytest.mark.parametrize("train", [True, False])
def test_autocast_is_captured_and_may_end(train: bool) -> None:
    """Casts are made anew in each replay, from the parameters of then."""
    model = network().eval()
    layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to("cuda")
    for plain in (model, layer):
        captured = copy.deepcopy(plain).train(train and plain is layer)
        with torch.autocast("cuda", torch.bfloat16):
            plain(images(0))
            run = fi.graphed(captured, images(0))
        # whatever was freed is written over
        junk = [torch.full_like(p, torch.nan) for p in plain.parameters() for _ in range(4)]
        for changed in (plain, captured):
            with torch.no_grad():
                for p in changed.parameters():
                    p.mul_(1.1)
        with torch.autocast("cuda", torch.bfloat16):
            got = run(images(1))
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            torch.testing.assert_close(got, plain(images(1)), rtol=2e-2, atol=2e-2)
        del junk


@needs_gpu
@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_training_steps_are_those_of_the_plain_model(variant: str) -> None:
    """Without dropout: gradients and buffers after some steps, with an optimiser outside."""
    models = [network(variant).train() for _ in range(2)]
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
    before = [b.clone() for b in models[0].buffers()]
    runs = [fi.graphed(models[0], images(0)), models[1]]
    for buffer, kept in zip(models[0].buffers(), before, strict=True):
        assert torch.equal(buffer, kept)
    for run, model in zip(runs, models, strict=True):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        for seed in range(3):
            optimiser.zero_grad()
            sum(output.float().square().mean() for output in run(images(seed))).backward()
            optimiser.step()
    for ours, theirs in zip(
        (*models[0].parameters(), *models[0].buffers()),
        (*models[1].parameters(), *models[1].buffers()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_gpu
def test_dropout_draws_anew() -> None:
    run = fi.graphed(network().train(), images(0))
    first, second = (run(images(1)).logits.detach().clone() for _ in range(2))
    assert not torch.equal(first, second)


@needs_gpu
def test_gradients_accumulate_over_replays() -> None:
    plain, captured = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).cuda() for _ in range(2))
    captured.load_state_dict(plain.state_dict())
    run = fi.graphed(captured, images(0))
    for seed in range(3):
        for model in (plain, run):
            model(images(seed)).square().sum().backward()
    for ours, theirs in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("train", [True, False])
def test_graphs_on_two_devices(train: bool) -> None:
    for device in ("cuda:0", "cuda:1"):
        model = nn.Conv2d(3, 4, 3).to(device).train(train)
        x = images(0).to(device)
        want = model(images(1).to(device))
        run = fi.graphed(model, x)
        torch.testing.assert_close(run(images(1).to(device)), want, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_what_cannot_be_captured() -> None:
    model = network().train()
    with pytest.raises(ValueError, match="all of the model on cuda"):
        fi.graphed(network().cpu(), images(0))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="GoogLeNet without hooks of its own"):
        fi.graphed(model, images(0))

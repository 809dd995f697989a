"""What only a GPU can show: streams, devices, graphs, hidden synchronisation."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception.tuning import dispatch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def module_and_input(device: str = "cuda") -> tuple[fi.Inception, Tensor]:
    module = fi.Inception(192, 64, 96, 128, 16, 32, 32).to(device)
    x = torch.randn(4, 192, 14, 14, device=device).contiguous(memory_format=torch.channels_last)
    return module, x.requires_grad_()


def step(module: fi.Inception, x: Tensor) -> list[Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    """Any operation that waits for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_kernels_run_on_the_current_stream() -> None:
    module, x = module_and_input()
    want = step(module, x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # the side stream is busy: kernels launched elsewhere would read x too early
        delayed = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        delayed.copy_(x)
        got = step(module, delayed.requires_grad_())
    side.synchronize()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    module, x = module_and_input("cuda:1")
    assert torch.cuda.current_device() == 0
    got = step(module, x)
    with torch.cuda.device(1):
        want = step(module, x)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("parts", [(), dispatch.PARTS], ids=["ours", "library"])
def test_a_step_never_waits_for_the_gpu(parts: tuple[str, ...]) -> None:
    module, x = module_and_input()
    with dispatch.forced(parts):
        step(module, x)


def test_a_captured_graph_sees_new_parameters() -> None:
    """A replay packs the filters again: it must not use those of the capture."""
    module, x = module_and_input()
    for train in (True, False):
        run = step if train else lambda module, x: [module(x)]
        with torch.set_grad_enabled(train):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(module, x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = run(module, x)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.25)
        graph.replay()
        with torch.set_grad_enabled(train):
            want = run(module, x)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)


def test_a_captured_graph_drops_anew_in_every_replay() -> None:
    x = torch.ones(8, 512, 7, 7, device="cuda").contiguous(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fi.functional.global_avg_pool2d_dropout(x, 0.4)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fi.functional.global_avg_pool2d_dropout(x, 0.4)
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(y.clone())
    assert not torch.equal(*drawn)
    for features in drawn:
        assert 0.5 < (features != 0).float().mean() < 0.7

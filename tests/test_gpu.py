"""What only a GPU can show: streams, devices, graphs, hidden synchronisation."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception.nn import stem
from fused_inception.ops.ahead import calls_with_tensors
from fused_inception.tools.launch_bench import LaunchBench, graph_seconds
from fused_inception.tools.tune import problems_of
from fused_inception.tuning import dispatch
from fused_inception.tuning.search import candidates
from fused_inception.tuning.targets import target_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def module_and_input(device: str = "cuda") -> tuple[fi.Inception, Tensor]:
    module = fi.Inception(192, 64, 96, 128, 16, 32, 32).to(device)
    x = torch.randn(4, 192, 14, 14, device=device).contiguous(memory_format=torch.channels_last)
    return module, x.requires_grad_()


def step(module: fi.Inception, x: Tensor) -> list[Tensor]:
    y = module(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, any operation that waits for the GPU raises."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
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


@torch.no_grad()
def test_filters_that_one_stream_packs_are_not_read_by_another() -> None:
    module, x = module_and_input()
    want = module(x)
    fi.clear_cache()
    torch.cuda.synchronize()
    busy, other = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(busy):
        torch.cuda._sleep(50_000_000)
        module(x)
    with torch.cuda.stream(other):
        got = module(x)
    other.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    module, x = module_and_input("cuda:1")
    assert torch.cuda.current_device() == 0
    got = step(module, x)
    with torch.cuda.device(1):
        want = step(module, x)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def batch_norm_and_input() -> tuple[fi.Inception, Tensor]:
    module = fi.Inception(24, 8, 8, 16, 8, 16, 8, norm="batch").cuda()
    return module, torch.randn(2, 24, 9, 9, device="cuda").requires_grad_()


def network_and_input() -> tuple[fi.GoogLeNet, Tensor]:
    network = fi.googlenet("paper", num_classes=10, image_size=64).cuda()
    return network, torch.randn(2, 3, 64, 64, device="cuda")


class Stem(torch.nn.Module):
    """The network's first layers, as one operator."""

    def __init__(self, network: fi.GoogLeNet) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(network._stem())

    def forward(self, x: Tensor) -> Tensor:
        return stem.stem(x, [*self.layers])


def stem_and_input() -> tuple[Stem, Tensor]:
    network, x = network_and_input()
    return Stem(network), x


def transformed_and_input() -> tuple[fi.GoogLeNet, Tensor]:
    options = {"num_classes": 10, "aux_logits": False, "transform_input": True}
    network = fi.googlenet("torchvision", **options).cuda()
    return network, torch.randn(2, 3, 64, 64, device="cuda")


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("parts", [(), dispatch.PARTS], ids=["ours", "library"])
@pytest.mark.parametrize(
    "made",
    [
        module_and_input,
        batch_norm_and_input,
        stem_and_input,
        network_and_input,
        transformed_and_input,
    ],
)
def test_nothing_waits_for_the_gpu(
    made: Callable[[], tuple[torch.nn.Module, Tensor]], parts: tuple[str, ...], train: bool
) -> None:
    """In a step after the first, which compiles kernels and looks for cuDNN's algorithms."""
    module, x = made()
    module.train(train)

    def run() -> None:
        outputs = module(x)
        if train:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(y.float().square().mean() for y in outputs).backward()

    with dispatch.forced(parts), torch.set_grad_enabled(train):
        run()
        torch.cuda.synchronize()
        with no_synchronisation():
            # the mode is on: a read does wait
            with pytest.raises(RuntimeError, match="synchroniz"):
                x.sum().item()
            run()


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


def test_step_after_precompile_compiles_nothing(tmp_path: Path) -> None:
    """In a process of its own, with a cache of its own."""
    code = """
import torch
from triton import knobs
import fused_inception as fi

model = fi.Inception(24, 8, 8, 16, 8, 16, 8).cuda()
x = torch.randn(2, 24, 9, 9, device="cuda").to(memory_format=torch.channels_last)
state = torch.cuda.get_rng_state()
report = fi.precompile(model, x)
assert report.compiled == report.kernels > 5, str(report)
assert not report.errors, str(report)
assert torch.equal(state, torch.cuda.get_rng_state())
hits = []
knobs.compilation.listener = lambda **facts: hits.append(facts["cache_hit"])
model(x).square().mean().backward()
torch.cuda.synchronize()
assert hits and all(hits), hits
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_tune_measures_one_family() -> None:
    """Candidates of one launch, compiled, checked and timed in graphs."""
    from fused_inception.ops.ahead_triton import lookups_of

    module, x = module_and_input()
    calls = calls_with_tensors(module, x, training=True)
    target = target_of(x.device)
    lookups = lookups_of(calls, target)
    (problem,) = (p for p in problems_of(lookups) if p.family == "branches")
    pairs = [(call, calls[call]) for call in lookups["branches", problem.key]]
    bench = LaunchBench(problem, pairs, graph_seconds, 4)
    start, *others = candidates(problem)
    assert 0 < bench.seconds(start) < 0.1
    usable = bench.usable(others[:6])
    assert usable
    assert all(0 < bench.seconds(config) < 0.1 for config in usable)

"""torch.compile over the kernels, each kind of operator in one graph: as without it."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional

pytestmark = [
    pytest.mark.usefixtures("few_large_tiles"),
    # third-party warnings of compilers are no failures here
    pytest.mark.filterwarnings("default"),
]

MODULES: dict[str, Callable[[], nn.Module]] = {
    "max_pool": lambda: fi.MaxPool2d(3, 2, ceil_mode=True),
    "norm": lambda: fi.LocalResponseNorm(5),
    "norm-pool": lambda: fi.LRNMaxPool2d(5, 3, 2),
    "pool-norm": lambda: fi.MaxPoolLRN2d(5, 3, 2),
    "convolution": lambda: fi.ConvBlock(8, 16, kernel_size=3, padding=1),
    "norm-convolution": lambda: fi.ConvBlock(8, 16, kernel_size=3, padding=1, norm="batch"),
    "naive": lambda: fi.InceptionNaive(8, 8, 8, 8),
}


def compared(module: nn.Module, run: Callable[[Callable[..., Any]], list[Tensor]]) -> None:
    """Outputs and gradients of the module, and of the module in one graph."""
    torch._dynamo.reset()
    state = {name: t.clone() for name, t in module.state_dict().items()}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with fi.backend("triton"):
        want = run(module)
        module.load_state_dict(state)
        with fi.record_launches() as launches:
            got = run(compiled)
    assert launches
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", MODULES)
def test_one_operator(name: str, device: torch.device) -> None:
    module = MODULES[name]().to(device)
    x = torch.randn(2, 8, 5, 6, device=device).contiguous(memory_format=torch.channels_last)

    def run(call: Callable[..., Any]) -> list[Tensor]:
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_()]
        y = call(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])]

    compared(module, run)


def test_parallel_convolutions(device: torch.device) -> None:
    weights = [torch.randn(c, 8, 1, 1, device=device) for c in (8, 16)]
    biases = [torch.randn(c, device=device) for c in (8, 16)]
    x = torch.randn(1, 8, 3, 4, device=device)
    compiled = torch.compile(functional.parallel_conv1x1_relu, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    with fi.backend("triton"):
        for ours, theirs in zip(
            compiled(x, weights, biases),
            functional.parallel_conv1x1_relu(x, weights, biases),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


EXPORTED: dict[str, Callable[[], nn.Module]] = {
    **MODULES,
    "module": lambda: fi.Inception(8, 8, 8, 8, 8, 8, 8),
    "norm-module": lambda: fi.Inception(8, 8, 8, 8, 8, 8, 8, norm="batch"),
    "global-pool": lambda: fi.GlobalAvgPool2d(),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export_for_any_batch(name: str, device: torch.device) -> None:
    """`torch.export`, written and read: the operators are in it as they are."""
    module = EXPORTED[name]().to(device).eval()
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    x, other = (torch.randn(n, 8, 5, 6, device=device) for n in (2, 3))
    file = io.BytesIO()
    with fi.backend("triton"), torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(batch,))
        torch.export.save(program, file)
        file.seek(0)
        exported = torch.export.load(file).module()
        with fi.record_launches() as launches:
            got = exported(other)
        torch.testing.assert_close(got, module(other))
    assert launches

"""Packed filters are never older than the parameters, whoever writes those."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.ops import filter_cache

OPTIMIZERS = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and "fused" in inspect.signature(cls.__init__).parameters
}


def block(norm: str | None) -> nn.Module:
    torch.manual_seed(0)
    module = fi.Inception(8, 8, 8, 8, 8, 8, 8, norm=norm)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module.eval()


def check(module: nn.Module, x: Tensor, backend: str) -> None:
    """In eval, against a copy that nothing is kept of."""
    with torch.no_grad(), fi.backend(backend):
        got = module(x)
        filter_cache.clear()
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("norm", "backend"), [("batch", "torch"), (None, "triton")])
@pytest.mark.filterwarnings("ignore:.*foreach:UserWarning")
def test_after_a_step_of_a_fused_optimizer(name: str, norm: str | None, backend: str) -> None:
    """Those raise no version of what they write."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    optimizer = OPTIMIZERS[name](module.parameters(), lr=0.1, fused=True)
    check(module, x, backend)
    with torch.no_grad(), fi.backend(backend):
        before = module(x)
    # fine-tuning in eval mode, as frozen statistics are trained
    module(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad(), fi.backend(backend):
        assert not torch.equal(module(x), before)
    check(module, x, backend)


def set_data(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_after_other_memory_was_put_under_a_parameter(norm: str | None) -> None:
    """`.data = ...`, as `.to()` does, raises no version either; addresses come back."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    weight = module.get_parameter("branch1.conv.weight")
    for _ in range(6):
        check(module, x, "torch" if norm else "triton")
        with torch.no_grad(), fi.backend("torch" if norm else "triton"):
            module(x)
        # what was there before is freed, and its address may be the next one's
        set_data(weight, torch.randn(weight.shape))


def test_what_is_kept_dies_with_its_tensors() -> None:
    made: list[int] = []

    def make() -> int:
        made.append(0)
        return len(made)

    keep: Callable[[Tensor], int] = lambda t: filter_cache.kept([t], (), make, save=False)  # noqa: E731
    with torch.no_grad():
        t = torch.zeros(3)
        assert (keep(t), keep(t)) == (1, 1)
        t.add_(1)
        assert keep(t) == 2
        del t
        assert keep(torch.zeros(3)) == 3

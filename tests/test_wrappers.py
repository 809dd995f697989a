"""What wrappers of PyTorch do to modules, and ours inside."""

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fused_inception as fi
from fused_inception.ops import batch_norm

WIDTHS = (16, 8, 8, 8, 8, 8, 8)
BLOCKS = {
    "module": (lambda: fi.Inception(*WIDTHS), (2, 16, 6, 6)),
    "module with BatchNorm": (lambda: fi.Inception(*WIDTHS, norm="batch"), (2, 16, 6, 6)),
    "convolution": (lambda: fi.ConvBlock(16, 8, kernel_size=1), (2, 16, 6, 6)),
    "convolution with BatchNorm": (
        lambda: fi.ConvBlock(16, 8, kernel_size=1, norm="batch"),
        (2, 16, 6, 6),
    ),
    "naive": (lambda: fi.InceptionNaive(16, 8, 8, 8), (2, 16, 6, 6)),
    "network": (
        lambda: fi.googlenet("paper", num_classes=4, aux_logits=False, dropout=0.0),
        (2, 3, 32, 32),
    ),
    "network with BatchNorm": (
        lambda: fi.googlenet("torchvision", num_classes=4, aux_logits=False, dropout=0.0),
        (2, 3, 32, 32),
    ),
}


def replica_of(model: nn.Module) -> Any:
    """What `nn.DataParallel` runs on a GPU: `torch.nn.parallel.replicate`, with clones in the place
    of broadcasts. Parameters become attributes, as autograd has to pass through the copies."""
    modules = list(model.modules())
    replicas: list[Any] = [module._replicate_for_data_parallel() for module in modules]
    of = dict(zip(modules, replicas, strict=True))
    for module, replica in of.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else of[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
        for name, buffer in module._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return of[model]


@pytest.mark.parametrize("name", BLOCKS)
def test_replicas_of_data_parallel_are_fused(name: str) -> None:
    make, shape = BLOCKS[name]
    model = make().double()
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, 0.5, 1.5)
    alone, x = copy.deepcopy(model), torch.randn(shape, dtype=torch.float64)
    replica = replica_of(model)
    assert getattr(replica, "is_fused", True)
    assert str(replica) == str(model)
    y, expected = replica(x), alone(x)
    torch.testing.assert_close(y, expected)
    (y.square().sum() + expected.square().sum()).backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", [*BLOCKS, "auxiliary"])
@pytest.mark.parametrize("pre", [False, True])
def test_backward_hooks_of_every_layer(name: str, pre: bool) -> None:
    """They make views of outputs, which nobody may write to: no ReLU either."""
    make, shape = BLOCKS.get(name, (lambda: fi.InceptionAux(16, 3, map_size=6), (2, 16, 6, 6)))
    model = make().double().eval()
    hooked, seen = copy.deepcopy(model), set[nn.Module]()
    for layer in hooked.modules():
        if pre:
            layer.register_full_backward_pre_hook(lambda layer, *_: seen.add(layer))
        else:
            layer.register_full_backward_hook(lambda layer, *_: seen.add(layer))
    x = torch.randn(shape, dtype=torch.float64)
    found = []
    for each in (model, hooked):
        leaves = [x.clone().requires_grad_(), *each.parameters()]
        found.append(torch.autograd.grad(each(leaves[0]).square().sum(), leaves))
    torch.testing.assert_close(*found)
    assert seen.issuperset(m for m in hooked.modules() if isinstance(m, nn.Conv2d | nn.Linear))


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_sharded_parameters_are_never_stale(norm: str | None) -> None:
    """FSDP gathers parameters into the same tensors, of the same version, whatever the shards
    hold by then: averaged weights, a checkpoint."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = nn.Sequential(
        fi.Inception(*WIDTHS, norm=norm), fi.Inception(32, *WIDTHS[1:], norm=norm)
    )
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (1,))
    for module in (*sharded, sharded):
        fully_shard(module, mesh=mesh)
    x = torch.randn(2, 16, 5, 5)
    for model in (plain, sharded):
        model.eval()
    backend = "torch" if norm else "triton"
    with torch.no_grad(), fi.backend(backend):
        for _ in range(2):
            torch.testing.assert_close(sharded(x), plain(x))
            for model in (plain, sharded):
                for p in model.parameters():
                    p.mul_(1.5)


@pytest.mark.usefixtures("one_process")
def test_sharded_modules_train_as_others() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain = fi.Inception(*WIDTHS, norm="batch")
    sharded = copy.deepcopy(plain)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for _ in range(2):
        x = torch.randn(2, 16, 5, 5)
        for model in (plain, sharded):
            optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
            model(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
    torch.testing.assert_close(sharded(x), plain(x))


@pytest.mark.usefixtures("one_process")
def test_filters_are_kept_beside_other_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group, and FSDP's code that PyTorch has loaded by itself, make no shards."""
    import torch.distributed.fsdp

    gc.collect()  # shards of other tests
    model = nn.parallel.DistributedDataParallel(
        fi.ConvBlock(16, 8, kernel_size=1, norm="batch").eval()
    )
    folded: list[int] = []
    fold = batch_norm.fold
    monkeypatch.setattr(batch_norm, "fold", lambda *args: folded.append(1) or fold(*args))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 16, 4, 4))
    assert len(folded) == 1

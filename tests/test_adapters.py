"""`fuse_`, `unfuse_`, `fused` on torchvision and the reference: what stays as it was."""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import reference
from tests.networks import draw_norms

WIDTHS = (16, 8, 16, 24, 8, 16, 8)
MODULES = [f"inception{name}" for name in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
STEM = ["conv1", "conv2", "conv3"]
POOLS = ["maxpool1", "maxpool2", "maxpool3", "maxpool4"]
HEADS = ["aux1", "aux2", "avgpool"]


def network(tv: ModuleType, **options: Any) -> nn.Module:
    """Without dropout, with statistics and affine parameters away from their start."""
    torch.manual_seed(1)
    options = {"num_classes": 5, "dropout": 0.0, "dropout_aux": 0.0, **options}
    model = tv.GoogLeNet(init_weights=False, **options)
    draw_norms(model)
    return model


def snapshot(model: nn.Module) -> list[Any]:
    """Every module and what it holds: identities, classes, attributes, keys."""
    modules = [(n, id(m), type(m), sorted(vars(m))) for n, m in model.named_modules()]
    state = [(n, id(t)) for n, t in model.state_dict(keep_vars=True).items()]
    return [modules, state]


def loss_of(outputs: Any) -> Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum((o.square().mean() * (i + 1) for i, o in enumerate(outputs)), torch.zeros(()))


def assert_same_training(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Outputs, the gradients of input and parameters, and buffers, after one step."""
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(z) for model, z in zip((ours, theirs), inputs, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        loss_of(output).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    for (name, b), c in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(b, c, msg=lambda m, name=name: f"{name}: {m}")


class TestTorchvisionsGoogLeNet:
    @pytest.fixture
    def model(self, tv: ModuleType) -> nn.Module:
        return network(tv).double()

    def test_what_is_fused(self, model: nn.Module) -> None:
        report = fi.fuse_(model)
        assert sorted(report.fused) == sorted(STEM + MODULES + POOLS + HEADS)
        assert report.skipped == {}
        assert report.fused[:3] == ["conv1", "maxpool1", "conv2"]
        types = {name: type(model.get_submodule(name)) for name in report.fused}
        assert {types[name] for name in MODULES} == {fi.Inception}
        assert {types[name] for name in STEM} == {fi.ConvBlock}
        assert {types[name] for name in POOLS} == {fi.MaxPool2d}
        assert types["aux2"] is fi.InceptionAux
        assert types["avgpool"] is fi.GlobalAvgPool2d

    def test_report_is_a_table(self, model: nn.Module) -> None:
        model.inception4a.branch1.bn.register_forward_hook(lambda *a: None)
        lines = str(fi.fuse_(model)).splitlines()
        assert lines[0].split(None, 2)[::2] == ["conv1", "torchvision's BasicConv2d -> ConvBlock"]
        assert lines[-2].split(None, 2) == ["inception4a", "skipped", "branch1.bn has a hook"]
        assert lines[-1] == "18 fused, 1 skipped"

    def test_training(self, model: nn.Module) -> None:
        theirs = copy.deepcopy(model)
        fi.fuse_(model)
        assert_same_training(model, theirs, torch.randn(3, 3, 64, 64, dtype=torch.float64))

    def test_eval(self, model: nn.Module) -> None:
        theirs = copy.deepcopy(model).eval()
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        fi.fuse_(model.eval())
        with torch.no_grad():
            torch.testing.assert_close(model(x), theirs(x))

    def test_objects_stay_and_come_back(self, model: nn.Module) -> None:
        before = snapshot(model)
        fi.fuse_(model)
        modules, state = snapshot(model)
        assert [(n, i) for n, i, *_ in modules] == [(n, i) for n, i, *_ in before[0]]
        assert state == before[1]
        fi.unfuse_(model)
        assert snapshot(model) == before

    def test_state_dict_loads_both_ways(self, tv: ModuleType, model: nn.Module) -> None:
        plain = network(tv).double()
        keys = list(plain.state_dict())
        fi.fuse_(model)
        assert list(model.state_dict()) == keys
        plain.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(network(tv).state_dict(), strict=True)
        ours = fi.googlenet("torchvision", num_classes=5).double()
        ours.load_state_dict(model.state_dict(), strict=True)
        model.load_state_dict(ours.state_dict(), strict=True)

    def test_fusing_twice_is_harmless(self, model: nn.Module) -> None:
        fi.fuse_(model)
        before = snapshot(model)
        report = fi.fuse_(model, strict=True)
        assert report.fused == []
        assert len(report.skipped) == 19
        assert all(why.startswith("already fused") for why in report.skipped.values())
        assert snapshot(model) == before

    def test_without_heads(self, tv: ModuleType) -> None:
        report = fi.fuse_(network(tv, aux_logits=False), strict=True)
        assert len(report.fused) == 17


class TestContext:
    def test_undoes_only_its_own(self, tv: ModuleType) -> None:
        model = network(tv)
        fi.fuse_(model, filter_fn=lambda module, name: name == "inception3a")
        before = snapshot(model)
        with fi.fused(model) as report:
            assert len(report.fused) == 18
            assert report.skipped.keys() == {"inception3a"}
            assert type(model.inception5b) is fi.Inception
        assert snapshot(model) == before
        fi.unfuse_(model)

    def test_undoes_after_an_error(self, tv: ModuleType) -> None:
        model = tv.Inception(*WIDTHS)
        with pytest.raises(RuntimeError, match="inside"), fi.fused(model):  # noqa: PT012
            assert type(model) is fi.Inception
            raise RuntimeError("inside")
        assert type(model) is tv.Inception

    def test_unfused_inside(self, tv: ModuleType) -> None:
        model = tv.Inception(*WIDTHS)
        with fi.fused(model):
            fi.unfuse_(model)
        assert type(model) is tv.Inception


def test_nothing_to_undo(tv: ModuleType) -> None:
    for model in (tv.Inception(*WIDTHS), fi.Inception(*WIDTHS)):
        with pytest.raises(ValueError, match="fuse_ has fused nothing in this Inception"):
            fi.unfuse_(model)


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got dict"):
        fi.fuse_({})


class TestHooks:
    """On a fused block itself: they fire as before, and stay when it goes back."""

    x = torch.randn(2, 16, 4, 4)

    def test_forward_and_backward(self, tv: ModuleType) -> None:
        model = nn.Sequential(tv.Inception(*WIDTHS))
        seen: list[str] = []
        block = model[0]
        block.register_forward_pre_hook(lambda *a: seen.append("forward pre"))
        block.register_forward_hook(lambda *a: seen.append("forward"))
        block.register_full_backward_pre_hook(lambda *a: seen.append("backward pre"))
        block.register_full_backward_hook(lambda *a: seen.append("backward"))
        everything = ["forward pre", "forward", "backward pre", "backward"]
        for change in (lambda m: None, fi.fuse_, fi.unfuse_):
            change(model)
            seen.clear()
            model(self.x.clone().requires_grad_()).sum().backward()
            assert seen == everything

    def test_set_while_fused_stay(self, tv: ModuleType) -> None:
        block = tv.Inception(*WIDTHS)
        fi.fuse_(block)
        seen: list[int] = []
        handle = block.register_forward_hook(lambda *a: seen.append(1))
        block.eval()
        fi.unfuse_(block)
        block(self.x)
        handle.remove()
        block(self.x)
        assert seen == [1]
        assert not block.branch1.bn.training

    def test_of_the_state_dict(self, tv: ModuleType) -> None:
        block = tv.BasicConv2d(16, 8, kernel_size=1)
        seen: list[str] = []
        block.register_state_dict_pre_hook(lambda *a: seen.append("save pre"))
        block.register_state_dict_post_hook(lambda *a: seen.append("save"))
        block.register_load_state_dict_pre_hook(lambda *a: seen.append("load pre"))
        block.register_load_state_dict_post_hook(lambda *a: seen.append("load"))
        for change in (fi.fuse_, fi.unfuse_):
            change(block)
            seen.clear()
            block.load_state_dict(block.state_dict())
            assert seen == ["save pre", "save", "load pre", "load"]

    def test_inside_of_a_fused_block(self, tv: ModuleType) -> None:
        """Set later, they make the layers compute."""
        block = tv.Inception(*WIDTHS)
        twin = copy.deepcopy(block)
        fi.fuse_(block)
        seen: list[int] = []
        block.branch2[1].bn.register_forward_hook(lambda *a: seen.append(1))
        torch.testing.assert_close(block(self.x), twin(self.x))
        assert seen == [1]
        assert "already fused, but plain PyTorch: branch2.1.bn has a hook" in str(fi.fuse_(block))


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(tv: ModuleType, copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(tv.Inception(*WIDTHS), nn.MaxPool2d(2)).eval()
    types = [type(m) for m in model.modules()]
    x = torch.randn(2, 16, 4, 4)
    want = model(x)
    fi.fuse_(model)
    twin = copy_of(model)
    assert type(twin[0]) is fi.Inception
    assert len(list(twin.parameters())) == len(list(model.parameters())) == 18
    torch.testing.assert_close(twin(x), want)
    fi.unfuse_(twin)
    assert [type(m) for m in twin.modules()] == types
    assert type(model[0]) is fi.Inception
    torch.testing.assert_close(twin(x), want)


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap_first", [True, False])
def test_distributed_data_parallel(tv: ModuleType, wrap_first: bool) -> None:
    model = nn.Sequential(tv.BasicConv2d(3, 16, kernel_size=3, padding=1), tv.Inception(*WIDTHS))
    twin = copy.deepcopy(model)
    if not wrap_first:
        fi.fuse_(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if wrap_first:
        assert fi.fuse_(wrapped).fused == ["module.0", "module.1"]
    assert_same_training(wrapped, twin, torch.randn(2, 3, 5, 5))
    fi.unfuse_(wrapped)
    assert type(model[1]) is tv.Inception


def test_optimiser_made_before(tv: ModuleType) -> None:
    """The same weights after steps that were fused, not fused and fused again."""
    models = [nn.Sequential(tv.Inception(*WIDTHS)).double()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in models]
    for change in (fi.fuse_, lambda m: None, fi.unfuse_, fi.fuse_):
        change(models[0])
        x = torch.randn(4, 16, 5, 5, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()
    ours, theirs = (m.state_dict() for m in models)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want)


def test_frozen_layers(tv: ModuleType) -> None:
    model = tv.Inception(*WIDTHS).double()
    model.branch2.requires_grad_(False)
    model.branch3[0].bn.eval()
    twin = copy.deepcopy(model)
    fi.fuse_(model)
    model.branch4[1].bn.requires_grad_(False)
    twin.branch4[1].bn.requires_grad_(False)
    assert_same_training(model, twin, torch.randn(2, 16, 5, 5, dtype=torch.float64))
    assert model.branch2[0].conv.weight.grad is None
    assert model.branch3[0].bn.num_batches_tracked == 0
    assert model.branch1.bn.num_batches_tracked == 1


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": None},
        {"eps": 0.1, "momentum": 0.5},
        {"affine": False},
        {"track_running_stats": False},
    ],
    ids=str,
)
def test_options_of_batch_norm_are_read_from_the_layers(tv: ModuleType, options: dict) -> None:
    model = tv.Inception(*WIDTHS)
    model.branch2[0].bn = nn.BatchNorm2d(16, **options)
    model.double()
    twin = copy.deepcopy(model)
    assert fi.fuse_(model).fused == [""]
    for _ in range(2):
        model.zero_grad()
        twin.zero_grad()
        assert_same_training(model, twin, torch.randn(2, 16, 5, 5, dtype=torch.float64))
    x = torch.randn(2, 16, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("variant", ["paper", "torchvision", "torchvision5x5"])
def test_reference(variant: str) -> None:
    options = {"num_classes": 3, "dropout": 0.0, "dropout_aux": 0.0, "image_size": 64}
    model = reference.googlenet(variant, **options).double()  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    before = snapshot(model)
    report = fi.fuse_(model, strict=True)
    expected = STEM + MODULES + POOLS + HEADS + (["norm1", "norm2"] if variant == "paper" else [])
    assert sorted(report.fused) == sorted(expected)
    fused = [m for m in model.modules() if isinstance(m, fi.Inception)]
    assert {m.dims.kernel_5x5 for m in fused} == {3 if variant == "torchvision" else 5}
    if variant == "paper":
        assert all(m.is_fused for m in fused)
    assert_same_training(model, twin, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    fi.unfuse_(model)
    assert snapshot(model) == before


def test_own_network_is_fused_already() -> None:
    report = fi.fuse_(fi.googlenet("paper", num_classes=3), strict=True)
    assert report.fused == []
    assert report.skipped["inception3a"] == report.skipped["maxpool1"] == "already fused"
    assert report.skipped.keys() == {*STEM, *MODULES, *POOLS, *HEADS, "norm1", "norm2"}


class TestInjectedBlocks:
    def test_state_dict_and_initialisation(self, tv: ModuleType) -> None:
        for init_weights in (True, False):
            options = {"num_classes": 5, "init_weights": init_weights, "aux_logits": False}
            torch.manual_seed(3)
            ours = tv.GoogLeNet(blocks=fi.torchvision_blocks(), **options)
            torch.manual_seed(3)
            theirs = tv.GoogLeNet(**options)
            assert list(ours.state_dict()) == list(theirs.state_dict())
            for name, want in theirs.state_dict().items():
                assert torch.equal(ours.state_dict()[name], want), name

    def test_training(self, tv: ModuleType) -> None:
        model = network(tv, blocks=fi.torchvision_blocks()).double()
        theirs = network(tv).double()
        theirs.load_state_dict(model.state_dict(), strict=True)
        assert_same_training(model, theirs, torch.randn(2, 3, 64, 64, dtype=torch.float64))
        assert model.aux1.dropout.p == 0.0

    def test_fuse_takes_the_pools(self, tv: ModuleType) -> None:
        model = tv.GoogLeNet(blocks=fi.torchvision_blocks(), init_weights=False)
        assert isinstance(model.inception3a, fi.Inception)
        assert model.inception3a.branch1.bn.eps == 1e-3
        assert fi.fuse_(model).fused == ["maxpool1", "maxpool2", "maxpool3", "maxpool4", "avgpool"]


@pytest.mark.usefixtures("on_device")
def test_compiled_before_fusing() -> None:
    """The compiler sees the change and compiles again."""
    torch._dynamo.reset()
    model = nn.Sequential(reference.ConvBlock(4, 8, kernel_size=3, padding=1))
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 4, 3, 3)
    want = model(x)
    for change in (lambda m: None, fi.fuse_, fi.unfuse_):
        change(model)
        with fi.backend("triton"):
            torch.testing.assert_close(compiled(x), want)
    assert ["fused_inception" in code for code in graphs] == [False, True]


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(tv: ModuleType, training: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(tv.BasicConv2d(3, 16, kernel_size=3, padding=1), tv.Inception(*WIDTHS))
    twin = copy.deepcopy(model.train(training).double())
    fi.fuse_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_training(compiled, twin, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def test_sync_batch_norm_after_fusing(tv: ModuleType) -> None:
    model = nn.Sequential(tv.Inception(*WIDTHS)).eval()
    x = torch.randn(2, 16, 4, 4)
    want = model(x)
    fi.fuse_(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[0].branch1.bn) is nn.SyncBatchNorm
    assert "branch1.bn is a SyncBatchNorm" in model[0].extra_repr()
    torch.testing.assert_close(model(x), want)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_torchscript_after_going_back(tv: ModuleType) -> None:
    block = tv.Inception(*WIDTHS).eval()
    before = torch.jit.script(block).code
    fi.fuse_(block)
    fi.unfuse_(block)
    assert torch.jit.script(block).code == before


def test_export_after_going_back(tv: ModuleType) -> None:
    block = tv.Inception(*WIDTHS).eval()
    x = torch.randn(1, 16, 4, 4)
    before = torch.export.export(block, (x,)).graph_module.code
    fi.fuse_(block)
    fi.unfuse_(block)
    assert torch.export.export(block, (x,)).graph_module.code == before

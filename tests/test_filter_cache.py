"""Packed filters are never older than the parameters, whoever writes those."""

import enum
import inspect
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.ops import filter_cache
from tests.conftest import INTERPRETED

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
    shape = weight.shape
    for _ in range(6):
        check(module, x, "torch" if norm else "triton")
        with torch.no_grad(), fi.backend("torch" if norm else "triton"):
            module(x)
        # what was there before is freed first, so that its address may be the next one's
        set_data(weight, torch.empty(0))
        set_data(weight, torch.randn(shape))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_after_writes_through_data(norm: str | None, training: bool) -> None:
    """As steps of optimisers written by hand do: what was kept is forgotten where gradients are
    recorded, in either mode; otherwise it is not."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    backend = "torch" if norm else "triton"
    with torch.no_grad(), fi.backend(backend):
        before = module(x)
        for parameter in module.parameters():
            parameter.data.mul_(0.9).add_(torch.ones_like(parameter), alpha=0.1)
        torch.testing.assert_close(module.eval()(x), before, rtol=0, atol=0)
        with torch.enable_grad():
            module.train(training)(x)
        got = module.eval()(x)
        filter_cache.clear()
        torch.testing.assert_close(got, module(x), rtol=0, atol=0)
    assert not torch.equal(got, before)


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


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_inference_mode_keeps_what_no_grad_keeps(norm: str | None) -> None:
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    with torch.inference_mode(), fi.backend("triton"):
        module(x)
        with fi.record_launches() as launches:
            module(x)
    assert [launch.kernel for launch in launches] == ["_pointwise_kernel", "_branches_kernel"]


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may not read what another is still packing, nor keep what another frees."""
    made: list[int] = []
    t = torch.zeros(3)
    with torch.no_grad():
        for stream in (1, 2, 1, 2):
            monkeypatch.setattr(filter_cache, "_stream_of", lambda _, stream=stream: stream)
            filter_cache.kept([t], (), lambda stream=stream: made.append(stream), save=False)
    assert made == [1, 2]


class Trees:
    """As much of `torch._inductor.cudagraph_trees` as is asked for."""

    ExecutionState = enum.Enum("ExecutionState", ["NONE", "WARMUP", "RECORDING", "EXECUTION"])

    def __init__(self, state: str | None) -> None:
        self.state = state

    def get_manager(self, index: int, create_if_none_exists: bool) -> SimpleNamespace | None:
        assert not create_if_none_exists
        return self.state and SimpleNamespace(path_state=self.ExecutionState[self.state])


class NoThread(Trees):
    def get_manager(self, index: int, create_if_none_exists: bool) -> SimpleNamespace | None:
        raise AssertionError("no trees on this thread")


@pytest.mark.parametrize(
    ("trees", "theirs"),
    [
        (Trees(None), False),
        (Trees("NONE"), False),
        (Trees("WARMUP"), True),
        (Trees("RECORDING"), True),
        (Trees("EXECUTION"), False),
        (NoThread("WARMUP"), False),
        (SimpleNamespace(), True),
    ],
)
def test_nothing_is_kept_of_what_runs_ahead_of_inductors_graphs(
    trees: object, theirs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.compile(mode="reduce-overhead")`: memory that is allocated there is the graph's."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    assert filter_cache._is_for_graphs(torch.device("cuda", 0)) is theirs
    assert not filter_cache._is_for_graphs(torch.device("cpu"))


def test_inductors_trees_are_those_that_are_asked() -> None:
    """The names above are those of the installed torch."""
    trees = pytest.importorskip("torch._inductor.cudagraph_trees")
    assert {"WARMUP", "RECORDING"} <= set(trees.ExecutionState.__members__)
    assert "create_if_none_exists" in inspect.signature(trees.get_manager).parameters
    assert not filter_cache._runs_ahead(trees, torch.device("cuda", 0))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
def test_parameters_that_are_parts_of_a_vector(norm: str | None) -> None:
    """`vector_to_parameters` puts new vectors under parameters of the same version, and the next
    vector may lie where the last one did."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    vector = nn.utils.parameters_to_vector(module.parameters()).detach()
    for _ in range(3):
        vector.mul_(1.2)
        nn.utils.vector_to_parameters(vector, module.parameters())
        check(module, x, "torch" if norm else "triton")
        with torch.no_grad(), fi.backend("torch" if norm else "triton"):
            module(x)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_parameters_in_shared_memory(norm: str | None) -> None:
    """Another process writes, and counts for itself."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    check(module, x, "torch")
    backend = "torch" if norm or not INTERPRETED else "triton"
    with torch.no_grad(), fi.backend(backend):
        module(x)
        module.share_memory()
        before = module(x)
        context = torch.multiprocessing.get_context("spawn")
        child = context.Process(target=_double, args=(list(module.parameters()),))
        child.start()
        child.join()
        assert child.exitcode == 0
        assert not torch.equal(module(x), before)
    check(module, x, backend)


def _double(parameters: list[nn.Parameter]) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for p in parameters:
            p.numpy()[...] *= 2


def test_nothing_fake_is_kept() -> None:
    """A model that is run once for its shapes runs on real tensors afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, x = block("batch"), torch.randn(1, 8, 3, 3)
    with torch.no_grad(), fi.backend("torch"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(x)
        assert type(module(x)) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_traces_hold_no_packed_filters() -> None:
    module, x = block("batch"), torch.randn(1, 8, 3, 3)
    made: list[int] = []
    with torch.no_grad():
        module(x)

        def look(t: Tensor) -> Tensor:
            filter_cache.kept([module.get_parameter("branch1.conv.weight")], (), one, save=False)
            return t + 1

        def one() -> None:
            made.append(1)

        look(x)
        look(x)
        assert len(made) == 1
        torch.jit.trace(look, x, check_trace=False)
    assert len(made) == 2


@pytest.mark.parametrize(("norm", "backend"), [("batch", "torch"), (None, "triton")])
def test_parameters_that_conversions_swap(norm: str | None, backend: str) -> None:
    """PyTorch swaps no tensor that a weak reference knows."""
    module, x = block(norm), torch.randn(1, 8, 3, 3)
    weights = {name: 2 * t for name, t in module.state_dict().items()}
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        check(module, x, backend)
        with torch.no_grad(), fi.backend(backend):
            module(x)
        module.load_state_dict(weights)
        check(module, x, backend)
        with torch.no_grad(), fi.backend(backend):
            module(x)
        module.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_what_is_made_while_another_thread_trains_is_not_kept() -> None:
    """Its step, of a fused optimiser that raises no version, comes between reading and keeping."""
    weight = nn.Parameter(torch.zeros(1))

    def pack() -> list[Tensor]:
        packed = weight.detach().clone()
        if not packed:
            trainer = threading.Thread(target=step)
            trainer.start()
            trainer.join()
        return [packed]

    def step() -> None:
        weight.data.fill_(1)
        filter_cache.clear()

    with torch.no_grad():
        kept = [filter_cache.kept([weight], (), pack, save=False) for _ in range(3)]
    assert [packed.item() for (packed,) in kept] == [0, 1, 1]
    assert kept[1] is kept[2]

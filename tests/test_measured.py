"""Functions that give way to plain PyTorch where a table says that it is faster."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional
from fused_inception.backend import choose, resolve, selected
from fused_inception.ops import ahead, measured
from fused_inception.tools.launch_bench import plain_speed_up
from fused_inception.tools.tune import Tuning
from fused_inception.tuning import table
from fused_inception.tuning.targets import target_of
from tests import tables
from tests.conftest import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.usefixtures("on_device"),
]


@pytest.fixture(autouse=True)
def kernels_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend "auto" takes Triton here as it does on a GPU, for what Triton computes."""

    def on_a_gpu(name: str, device: torch.device, dtype: torch.dtype) -> str:
        return choose(name, torch.device("cuda") if name == "auto" else device, dtype)

    # the module has the name of the class in it
    monkeypatch.setitem(resolve.__globals__, "choose", on_a_gpu)
    monkeypatch.setitem(resolve.__globals__, "_is_cpu", lambda x: False)
    monkeypatch.setattr("fused_inception.tools.blocks.choose", on_a_gpu)


@pytest.fixture
def block(on_device: None) -> nn.Module:
    return fi.Inception(8, 8, 8, 8, 8, 8, 8)


def images(batch: int = 2) -> Tensor:
    x = torch.randn(batch, 8, 4, 3)
    return x.contiguous(memory_format=torch.channels_last)


def key_of(work: Callable[[], Any]) -> table.Key:
    with measured.recorded() as calls:
        work()
    (key,) = calls
    return key


def launched(work: Callable[[], Any]) -> bool:
    with fi.record_launches() as launches:
        work()
    return len(launches) > 0


def test_a_table_decides_for_its_problem_alone(
    device: torch.device, own_tables: Path, block: nn.Module
) -> None:
    x, target = images(), target_of(device)
    want = block(x)
    key = key_of(lambda: block(x))
    assert key[:2] == ("inception", "training")
    assert launched(lambda: block(x))
    with table.trying(measured.FAMILY, key, target, {"speed_up": 1.25}):
        with measured.reasons() as why:
            assert not launched(lambda: block(x).sum().backward())
        assert why == ["table sm_90, plain PyTorch 1.25x as fast"]
        torch.testing.assert_close(block(x), want)
        # neighbouring batches share it; other modes, sizes and dtypes do not
        assert not launched(lambda: block(images(2)))
        assert launched(lambda: block(images(3)))
        assert launched(lambda: block(x[:, :, :3]))
        with torch.no_grad():
            assert launched(lambda: block(x))
        # who insists is not asked
        with fi.backend("triton"):
            assert launched(lambda: block(x))
    with table.trying(measured.FAMILY, key, target, {"speed_up": 0.8}):
        assert launched(lambda: block(x))


def test_backward_stays_where_forward_was(
    device: torch.device, own_tables: Path, block: nn.Module
) -> None:
    x, target = images(), target_of(device)
    key = key_of(lambda: block(x))
    y = block(x)
    with table.trying(measured.FAMILY, key, target, {"speed_up": 2.0}):
        assert launched(lambda: y.sum().backward())
        y = block(x)
    assert not launched(lambda: y.sum().backward())


@pytest.mark.parametrize(
    "fields", [{"speed_up": 0}, {"speed_up": "2"}, {"faster": 2.0}, {}], ids=str
)
def test_an_entry_of_no_use_is_told_and_forgotten(
    fields: dict[str, Any], device: torch.device, own_tables: Path, block: nn.Module
) -> None:
    x = images()
    row = {
        "family": measured.FAMILY,
        "key": list(key_of(lambda: block(x))),
        "fields": fields,
        "run": 0,
    }
    tables.put(tables.contents([row]))
    table.forget()
    with pytest.warns(RuntimeWarning, match="field must be speed_up, above 0"):
        assert launched(lambda: block(x))


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "conv2d_relu": lambda x: functional.conv2d_relu(
        x, torch.ones(8, 8, 3, 3), torch.ones(8), padding=1
    ),
    "max_pool2d": lambda x: functional.max_pool2d(x, 3, 2, ceil_mode=True),
    "lrn_max_pool2d": lambda x: functional.lrn_max_pool2d(x, 5, 3, 2),
    "global_avg_pool2d": functional.global_avg_pool2d,
    "avg_pool2d_conv1x1_relu": lambda x: functional.avg_pool2d_conv1x1_relu(
        x, torch.ones(8, 8, 1, 1), torch.ones(8), 3, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_functions(name: str, own_tables: Path) -> None:
    """Each is asked for, and its problem can be run again by either path."""
    x = images().requires_grad_()
    with measured.recorded() as calls:
        CALLS[name](x)
    ((key, call),) = calls.items()
    assert key[:2] == (name, "training")
    found = {}
    for backend in ("triton", "torch"):
        with fi.backend(backend), fi.record_launches() as launches:
            (found[backend],) = call.run()
        assert (len(launches) > 0) == (backend == "triton")
    torch.testing.assert_close(found["triton"], found["torch"])
    assert x.grad is None


def test_integers_tell_problems_apart(own_tables: Path) -> None:
    x = images()
    windows = [(k, s, ceil) for k in (2, 3) for s in (1, 2) for ceil in (False, True)]

    def pool(kernel: int, stride: int, ceil: bool) -> Tensor:
        return functional.max_pool2d(x, kernel, stride, ceil_mode=ceil)

    assert len({key_of(partial(pool, *window)) for window in windows}) == 8
    # the same number under two names
    by_name = [{"stride": 1}, {"padding": 1}]
    assert len({key_of(partial(functional.max_pool2d, x, 2, **one)) for one in by_name}) == 2


def test_the_network_of_stages(own_tables: Path) -> None:
    """What the stem and the stages of the paper's network would be is a choice of their own."""
    network = fi.googlenet("paper", num_classes=3, image_size=47, dropout=0.0, dropout_aux=0.0)
    with measured.recorded() as calls:  # without data, which the interpreter would take minutes for
        ahead.calls_of(network.eval(), torch.empty(1, 3, 47, 47), training=False)
    assert [key[0] for key in calls] == ["googlenet_stem", *["inception_trunk"] * 3]
    assert len(set(calls)) == 4
    assert not any(call.training for call in calls.values())


def timer(work: Callable[[], Any]) -> float:
    """Plain PyTorch takes half the time."""
    work()
    return 1.0 if selected() == "torch" else 2.0


def test_speed_up_is_of_the_whole_step(device: torch.device, block: nn.Module) -> None:
    launches: list[Any] = []

    def counting(work: Callable[[], Any]) -> float:
        with fi.record_launches() as found:
            work()
        launches.append([launch.kernel for launch in found])
        return timer(work)

    with measured.recorded() as calls:
        block(images())
    (call,) = calls.values()
    assert plain_speed_up(call, counting) == 2.0
    assert "_gradients_kernel" in launches[0]
    assert not launches[1]


@pytest.fixture
def nothing_else_searched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tuning, "_search", lambda *_: True)
    monkeypatch.setattr(Tuning, "_compare", lambda *_: None)
    return


@pytest.mark.usefixtures("nothing_else_searched")
def test_tune_writes_what_the_model_then_follows(
    device: torch.device, own_tables: Path, block: nn.Module
) -> None:
    model, x = nn.Sequential(block, fi.GlobalAvgPool2d()), images()
    target = target_of(device)
    path = table.user_path(target.name)

    def tune(again: bool = False) -> Tuning:
        tuning = Tuning(target, path, {"gpu": "a test's"}, timer, 1)
        tuning.go(model, x, time.monotonic() + 600, again=again)
        return tuning

    assert launched(lambda: model(x))
    found = tune()
    assert "plain PyTorch is faster in 2 of 2 whole functions" in str(found)
    assert {entry.family for entry in table.read(path, target.name)} == {measured.FAMILY}
    assert not launched(lambda: model(x).sum().backward())
    # a search must see the kernels all the same
    with measured.recorded():
        assert launched(lambda: model(x))
    # what is there is not measured again, unless asked
    assert not tune().plain
    assert len(tune(again=True).plain) == 2
    report = fi.explain(model, x)
    assert {b.path.name for b in report.blocks} == {"ATen"}
    assert report.blocks[0].path.reason == "table sm_90, plain PyTorch 2.00x as fast"


def test_compilers_trace_the_function_itself(
    device: torch.device, own_tables: Path, block: nn.Module
) -> None:
    x = images()
    key = key_of(lambda: block(x))
    torch._dynamo.reset()
    with table.trying(measured.FAMILY, key, target_of(device), {"speed_up": 2.0}):
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert launched(lambda: compiled(x))

"""The trunk on the ATen path: the function, its errors, the network's use of it."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import InceptionDims, Window
from fused_inception.ops import trunk as ops
from fused_inception.ops.stages import Trunk
from tests.test_trunk_kernels import CASES, POOL, Case, of_modules, results

WIDE = Case((InceptionDims(16, 8, 8, 16, 8, 8, 8), InceptionDims(40, 8, 8, 8, 8, 8, 8)), (1, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_part_by_part(dtype: torch.dtype) -> None:
    case = CASES["as-in-googlenet"]
    # a window that has no kernel, and a tap behind which there is a pool
    others = {"pools": {1: Window(5, 2)}, "taps": (0, 1, 2)}
    for options in (case.options, others, {**others, "global_pool": True}):
        got, want = (
            results(function, case.tensors(dtype), **options)
            for function in (functional.inception_trunk, reference.inception_trunk)
        )
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dims", "pools", "taps", "reason"),
    [
        (InceptionDims(16, 8, 8, 12, 8, 12, 8), {}, (), r"multiples of 8, got \[8, 12, 12, 8\]"),
        (None, {0: Window(5, 2)}, (), "kernel_size 5: kernels exist up to 3"),
        (None, {0: POOL}, (0,), "the last module is tapped, or one that has a pool behind it"),
        (None, {}, (1,), "the last module is tapped"),
        (None, {1: POOL}, (), "the global pool is behind another pool"),
        (None, {0: POOL}, (), None),
    ],
    ids=["widths", "window", "tap-and-pool", "last-tap", "two-pools", "as-in-googlenet"],
)
def test_trunks_without_an_operator(
    dims: InceptionDims | None,
    pools: Mapping[int, Window],
    taps: tuple[int, ...],
    reason: str | None,
) -> None:
    case = WIDE if dims is None else Case((dims, WIDE.dims[1]), WIDE.shape)
    filters = case.tensors(torch.float32)[1::2]
    why = ops.why_not(filters, Trunk(dict(pools), taps, True))
    assert why is None if reason is None else re.search(reason, why or "")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ((1, (8, 12, 1, 1)), {}, r"module 0: w1 must be of shape \[C_out, 16, 1, 1\]"),
        ((13, (8, 16, 1, 1)), {}, r"module 1: w1 must be of shape \[C_out, 40, 1, 1\]"),
        ((14, (9,)), {}, r"module 1: b1 must be of shape \[8\]"),
        ((0, (1, 16, 6)), {}, "x must have 4 dimensions"),
        (None, {"pools": {2: POOL}}, r"pools must name modules from 0 to 1, got \[2\]"),
        (None, {"taps": (-1,)}, r"taps must name modules from 0 to 1, got \[-1\]"),
        (None, {"taps": (1, 0)}, r"taps must be in ascending order, each once, got \[1, 0\]"),
        (None, {"pools": {0: Window(7, 1)}}, "module 0: a window of 7 .* the map to pool is 6x"),
        (None, {"pools": {0: Window(3, 1, 2)}}, "module 0: padding must be at most half"),
        (None, {"global_pool": True, "dropout": 1.5}, "p must be between 0 and 1"),
        (None, {"dropout": 0.5}, "dropout is behind the global pool"),
    ],
)
def test_wrong_arguments(
    change: tuple[int, tuple[int, ...]] | None, options: dict[str, Any], message: str
) -> None:
    inputs = WIDE.tensors(torch.float32)
    if change is not None:
        inputs[change[0]] = torch.randn(change[1])
    with pytest.raises(ValueError, match=message):
        functional.inception_trunk(
            inputs[0], of_modules(inputs[1:]), **{"pools": {}, "taps": (), **options}
        )


def test_arguments_that_fitted_once_are_checked_anew_when_they_change() -> None:
    good = WIDE.tensors(torch.float32)
    options: dict[str, Any] = {"pools": {0: Window(5, 2)}, "taps": ()}

    def run(tensors: list[Tensor], **changes: Any) -> None:
        functional.inception_trunk(tensors[0], of_modules(tensors[1:]), **{**options, **changes})

    for _ in range(2):
        run(good)
    for i in (1, 2, 13, 24):
        for change in (good[i][:-1], good[i].double(), good[i].to("meta")):
            with pytest.raises((ValueError, TypeError), match=r"^module [01]: [wb]"):
                run([*good[:i], change, *good[i + 1 :]])
    for x in (good[0][:, :-1], good[0].double()):
        with pytest.raises((ValueError, TypeError), match=r"^module 0: w1"):
            run([x, *good[1:]])
    with pytest.raises(ValueError, match="does not fit a side of 4"):
        run([good[0][..., :4], *good[1:]])
    for changes in ({"taps": (1, 0)}, {"pools": {0: Window(7, 1)}}, {"pools": {2: POOL}}):
        with pytest.raises(ValueError, match=r"taps|module 0: a window|pools"):
            run(good, **changes)
    cast = [good[0], *(t.bfloat16() for t in good[1:])]
    with torch.autocast("cpu", torch.bfloat16):
        run(cast)
    with pytest.raises(TypeError, match="module 0: w1 must be float32"):
        run(cast)
    with pytest.raises(ValueError, match="24 for module 0"):
        functional.inception_trunk(good[0], [good[1:]], **options)
    run(good)


def test_wrong_numbers_of_parameters_and_types() -> None:
    x, *parameters = WIDE.tensors(torch.float32)
    with pytest.raises(ValueError, match="at least one module, got none"):
        functional.inception_trunk(x, [], pools={})
    with pytest.raises(ValueError, match=r"12 for each module.*got 11 for module 1"):
        functional.inception_trunk(x, [parameters[:12], parameters[12:23]], pools={})
    parameters[12] = parameters[12].double()
    with pytest.raises(TypeError, match="module 1: w1 must be float32, got float64"):
        functional.inception_trunk(x, of_modules(parameters), pools={})
    with fi.backend("triton"), pytest.raises(TypeError, match="float64"):
        functional.inception_trunk(
            x.double(), of_modules([p.double() for p in parameters]), pools={}
        )


class TestChangesInAStage:
    """What its operator would pass over makes the layers compute one by one."""

    # in fp64 no rounding turns a ReLU, and with it a gradient
    x = torch.rand(1, 3, 48, 48, dtype=torch.float64)

    @pytest.fixture(autouse=True)
    def _network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        options = {"num_classes": 3, "image_size": 48, "dropout": 0.0, "dropout_aux": 0.0}
        self.network = fi.googlenet("paper", **options).double()
        self.calls: list[dict[str, Any]] = []
        trunk = functional.inception_trunk

        def count(*tensors: Tensor, **options: Any) -> Any:
            self.calls.append(options)
            return trunk(*tensors, **options)

        monkeypatch.setattr(functional, "inception_trunk", count)
        for stage in "345":
            assert f"stage {stage}: one operator" in self.network.extra_repr()
        self.before = self.run()
        assert [call["pools"] for call in self.calls] == [{1: POOL}, {4: POOL}, {}]
        assert [call["taps"] for call in self.calls] == [[], [0, 3], []]  # 4a and 4d
        assert [call["global_pool"] for call in self.calls] == [False, False, True]

    def run(self) -> list[Tensor]:
        """All logits, and gradients of some parameters."""
        self.calls.clear()
        outputs = self.network(self.x)
        weights = [
            self.network.get_parameter(f"{name}.weight")
            for name in ("inception3a.branch1.conv", "inception4d.branch2.1.conv", "aux1.fc1")
        ]
        return [*outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), weights)]

    def check(self, stage: int, reason: str) -> None:
        assert f"stage {stage}: layer by layer, {reason}" in self.network.extra_repr()
        for ours, before in zip(self.run(), self.before, strict=True):
            torch.testing.assert_close(ours, before, rtol=1e-9, atol=1e-12)
        assert len(self.calls) == 2

    @pytest.mark.parametrize(
        ("stage", "name"),
        [(3, "inception3a"), (3, "maxpool3"), (4, "inception4d"), (5, "avgpool"), (5, "dropout")],
    )
    def test_hook(self, stage: int, name: str) -> None:
        seen = []
        self.network.get_submodule(name).register_forward_hook(lambda *a: seen.append(a))
        self.check(stage, f"{name} has a hook")
        assert len(seen) == 1

    def test_inner_hook(self) -> None:
        seen = []
        layer = self.network.get_submodule("inception5b.branch3.1.conv")
        layer.register_forward_hook(lambda *a: seen.append(a))
        self.check(5, "inception5b is plain PyTorch")
        assert len(seen) == 1

    def test_another_type(self) -> None:
        self.network.maxpool4 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.check(4, "maxpool4 is a torch.nn.modules.pooling.MaxPool2d")

    def test_a_size_for_each_direction(self) -> None:
        self.network.maxpool3 = fi.MaxPool2d((3, 3), (2, 2), ceil_mode=True)
        self.check(3, "maxpool3 has a size for each direction")

    def test_a_hook_on_a_head_sees_the_whole_gradient_of_the_map(self) -> None:
        """The one that hooks on the map itself get, not the head's part of it."""
        found: dict[str, list[Tensor]] = {"ours": [], "theirs": []}
        plain = reference.googlenet(
            "paper", num_classes=3, image_size=48, dropout=0.0, dropout_aux=0.0
        )
        plain.double().load_state_dict(self.network.state_dict())
        for name, network in (("ours", self.network), ("theirs", plain)):

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                args[0].register_hook(found[name].append)

            network.aux1.register_forward_pre_hook(hook)
            sum(o.sum() for o in network(self.x)).backward()
        torch.testing.assert_close(found["ours"], found["theirs"], rtol=1e-9, atol=1e-12)
        self.check(4, "an auxiliary classifier has a hook")

    def test_hooks_of_all_modules(self) -> None:
        """As many layers are seen as of the reference."""
        seen: dict[str, set[str]] = {"ours": set(), "theirs": set()}
        plain = reference.googlenet("paper", num_classes=3, image_size=48).double()
        for who, network in (("ours", self.network), ("theirs", plain)):
            names = {module: name for name, module in network.named_modules()}
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, *_, who=who, names=names: seen[who].add(names[module])
            )
            try:
                network(self.x)
                if who == "ours":
                    assert "layer by layer, hooks of all modules" in network.extra_repr()
            finally:
                handle.remove()
        missing = {name for name in seen["theirs"] - seen["ours"] if "pool" not in name}
        assert not missing
        self.run()
        assert len(self.calls) == 3

    def test_dropout_draws_as_layer_by_layer(self) -> None:
        """Behind the heads, as in PyTorch's own network: the same seed drops the same."""
        for layer in self.network.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.5
        found = []
        for calls in (3, 2):
            torch.manual_seed(5)
            found.append(self.run())
            assert len(self.calls) == calls
            self.network.avgpool.register_forward_hook(lambda *a: None)
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)

    def test_eval_asks_for_no_taps(self) -> None:
        self.calls.clear()
        for head in (self.network.aux1, self.network.aux2):
            for layer in head.modules():
                layer.register_forward_pre_hook(lambda *_: pytest.fail("a head ran in eval"))
        logits = self.network.eval()(self.x)
        assert [call["taps"] for call in self.calls] == [[], [], []]
        torch.testing.assert_close(logits, self.before[0])


def test_networks_with_batch_norm_go_layer_by_layer() -> None:
    network = fi.googlenet("torchvision", num_classes=3, aux_logits=False, init_weights=False)
    assert "stage 3: layer by layer, inception3a has batch norm" in network.extra_repr()

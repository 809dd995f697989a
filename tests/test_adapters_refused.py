"""What `fuse_` leaves as it is, and why; where it looks, and where not."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, weight_norm

import fused_inception as fi
from fused_inception import reference

WIDTHS = (16, 8, 16, 24, 8, 16, 8)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Marked(Tensor):
    """Stands for quantised and distributed tensors."""


def prune_weight(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "weight", amount=0.5)


def own_forward(module: nn.Module) -> None:
    module.forward = lambda x: x  # type: ignore[method-assign]


def mark(conv: Any) -> None:
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Marked))


def put(path: str, make: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    return lambda block: block.set_submodule(path, make())


def at(path: str, change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    return lambda block: change(block.get_submodule(path))


def conv(side: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(16, 24, side, bias=False, **options)


# (change of a torchvision Inception, reason)
INSIDE = {
    "forward hook": (
        at("branch2.1.conv", lambda m: m.register_forward_hook(lambda *a: None)),
        "branch2.1.conv has a hook",
    ),
    "pre-hook on a sequence": (
        at("branch2", lambda m: m.register_forward_pre_hook(lambda *a: None)),
        "branch2 has a hook",
    ),
    "backward hook": (
        at("branch3.0.bn", lambda m: m.register_full_backward_hook(lambda *a: None)),
        "branch3.0.bn has a hook",
    ),
    "backward pre-hook": (
        at("branch4.0", lambda m: m.register_full_backward_pre_hook(lambda *a: None)),
        "branch4.0 has a hook",
    ),
    "pruning": (at("branch1.conv", prune_weight), "branch1.conv has a hook"),
    "parametrisation": (
        at("branch1.conv", lambda m: parametrize.register_parametrization(m, "weight", Double())),
        "branch1.conv is a ParametrizedConv2d",
    ),
    "forward replaced inside": (
        at("branch4.1.conv", own_forward),
        "branch4.1.conv has a forward of its own",
    ),
    "forward replaced": (own_forward, "has a forward of its own"),
    "SyncBatchNorm": (
        put("branch2.1.bn", lambda: nn.SyncBatchNorm(24)),
        "branch2.1.bn is a SyncBatchNorm",
    ),
    "folded": (put("branch2.1.bn", nn.Identity), "branch2.1.bn is a Identity"),
    "quantisation-aware": (
        put("branch1.conv", lambda: type("ConvBn2d", (nn.Conv2d,), {})(16, 8, 1, bias=False)),
        "branch1.conv is a ConvBn2d",
    ),
    "tensor subclass": (at("branch1.conv", mark), "branch1.conv.weight is a Marked"),
    "another block": (
        put("branch1", lambda: nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())),
        "branch1 is a Sequential",
    ),
    "layer added": (
        lambda block: block.branch3.append(nn.Dropout(0.1)),
        "layers were added or removed",
    ),
    "groups": (put("branch2.1.conv", conv(3, padding=1, groups=2)), "branch2.1.conv has 2 groups"),
    "dilation": (
        put("branch2.1.conv", conv(3, padding=2, dilation=2)),
        "branch2.1.conv has dilation (2, 2)",
    ),
    "padding mode": (
        put("branch2.1.conv", conv(3, padding=1, padding_mode="reflect")),
        "branch2.1.conv has padding_mode 'reflect'",
    ),
    "stride": (
        put("branch2.1.conv", conv(3, padding=1, stride=2)),
        "branch2.1.conv has kernel_size (3, 3), stride (2, 2), padding (1, 1)",
    ),
    "bias besides BatchNorm": (
        put("branch2.1.conv", lambda: nn.Conv2d(16, 24, 3, padding=1)),
        "branch2.1.conv has a bias besides BatchNorm",
    ),
    "another pool": (
        put("branch4.0", lambda: nn.MaxPool2d(3, 1, 1, dilation=2)),
        "branch4.0 has dilation 2",
    ),
    "average pool": (
        put("branch4.0", lambda: nn.AvgPool2d(3, 1, 1)),
        "branch4.0 is a AvgPool2d",
    ),
    "compiled": (lambda block: block.compile(backend="eager"), "was compiled on its own"),
}


@pytest.mark.parametrize(("change", "reason"), INSIDE.values(), ids=INSIDE.keys())
def test_inception_is_left_as_it_is(
    tv: ModuleType, change: Callable[[nn.Module], Any], reason: str
) -> None:
    model = nn.ModuleDict({"a": tv.Inception(*WIDTHS), "b": tv.Inception(*WIDTHS)})
    change(model["a"])
    types = [type(m) for m in model["a"].modules()]
    report = fi.fuse_(model)
    assert report.fused == ["b"]
    assert report.skipped.keys() == {"a"}
    assert report.skipped["a"].startswith(reason)
    assert [type(m) for m in model["a"].modules()] == types


def test_old_weight_norm(tv: ModuleType) -> None:
    block = tv.Inception(*WIDTHS)
    with pytest.warns(FutureWarning):
        weight_norm(block.branch1.conv)
    assert fi.fuse_(block).skipped == {"": "branch1.conv has a hook"}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kernel_size": 3, "stride": 2}, "conv has kernel 3, stride 2, padding 0 of 16 channels"),
        ({"kernel_size": 7, "padding": 3}, "conv has kernel 7, stride 1, padding 3 of 16"),
        ({"kernel_size": (1, 7), "padding": (0, 3)}, "conv has kernel_size (1, 7)"),
        ({"kernel_size": 3, "padding": "same"}, "conv has kernel_size (3, 3), stride (1, 1), pad"),
        ({"kernel_size": 1, "groups": 4}, "conv has 4 groups"),
    ],
)
def test_convolution_block(tv: ModuleType, options: dict, reason: str) -> None:
    report = fi.fuse_(nn.Sequential(tv.BasicConv2d(16, 8, **options)))
    assert report.fused == []
    assert report.skipped["0"].startswith(reason)


def test_convolution_block_with_another_layer(tv: ModuleType) -> None:
    block = tv.BasicConv2d(16, 8, kernel_size=1)
    block.extra = nn.ReLU()
    assert fi.fuse_(block).skipped == {"": "layers were added or removed"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("fc1", nn.Identity), "fc1 is a Identity"),
        (at("fc2", lambda m: m.register_forward_hook(lambda *a: None)), "fc2 has a hook"),
        (at("conv.bn", lambda m: m.register_forward_hook(lambda *a: None)), "conv.bn has a hook"),
        (put("conv", lambda: nn.Conv2d(16, 128, 1)), "conv is a Conv2d"),
        (lambda block: block.add_module("fc3", nn.ReLU()), "layers were added or removed"),
    ],
)
def test_auxiliary_classifier(tv: ModuleType, change: Callable, reason: str) -> None:
    block = tv.InceptionAux(16, 5)
    change(block)
    assert fi.fuse_(block).skipped == {"": reason}
    assert type(block) is tv.InceptionAux


def test_classifier_with_new_outputs(tv: ModuleType) -> None:
    block = tv.InceptionAux(16, 5)
    block.fc2 = nn.Linear(1024, 3)
    fi.fuse_(block, strict=True)
    assert block(torch.randn(2, 16, 6, 6)).shape == (2, 3)


class TestPools:
    def test_options(self, tv: ModuleType) -> None:
        model = tv.GoogLeNet(init_weights=False, aux_logits=False)
        model.maxpool1 = nn.MaxPool2d(5, stride=2)
        model.maxpool2 = nn.MaxPool2d(3, stride=(2, 1))
        model.maxpool3 = nn.MaxPool2d(3, stride=2, dilation=2)
        model.maxpool4 = nn.MaxPool2d((2, 2), return_indices=True)
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        assert fi.fuse_(model).skipped == {
            "maxpool1": "has kernel_size 5: kernels exist up to 3",
            "maxpool2": "has stride (2, 1)",
            "maxpool3": "has dilation 2",
            "maxpool4": "returns indices",
            "avgpool": "has output_size 2",
        }

    def test_elsewhere_they_stay(self, tv: ModuleType) -> None:
        model = nn.Sequential(tv.BasicConv2d(3, 8, kernel_size=3), nn.MaxPool2d(2))
        report = fi.fuse_(model, strict=True)
        assert report.fused == ["0"]
        assert report.skipped == {}
        assert type(model[1]) is nn.MaxPool2d


class TestSubclasses:
    def test_of_blocks(self, tv: ModuleType) -> None:
        class Mine(tv.Inception):
            pass

        model = nn.Sequential(Mine(*WIDTHS))
        report = fi.fuse_(model)
        want = "is a Mine, a subclass of torchvision.models.googlenet.Inception"
        assert report.skipped == {"0": want}
        assert type(model[0].branch1) is tv.BasicConv2d

    def test_of_the_network(self, tv: ModuleType) -> None:
        class Mine(tv.GoogLeNet):
            pass

        report = fi.fuse_(Mine(init_weights=False))
        assert len(report.fused) == 14
        assert report.skipped.keys() == {f"maxpool{i}" for i in (1, 2, 3, 4)} | {"avgpool"}
        want = "the network is a Mine, a subclass of torchvision.models.googlenet.GoogLeNet"
        assert set(report.skipped.values()) == {want}


class TestStrict:
    def test_raises_and_changes_nothing(self, tv: ModuleType) -> None:
        model = nn.Sequential(tv.Inception(*WIDTHS), tv.Inception(*WIDTHS))
        model[1].branch1.conv.register_forward_hook(lambda *a: None)
        with pytest.raises(fi.FusionError, match=r"1: branch1.conv has a hook") as caught:
            fi.fuse_(model, strict=True)
        assert isinstance(caught.value, ValueError)
        assert caught.value.report.skipped == {"1": "branch1.conv has a hook"}
        assert "could be fused" in str(caught.value.report)
        assert {type(m) for m in model} == {tv.Inception}

    def test_nothing_known(self) -> None:
        with pytest.raises(fi.FusionError, match="no block that fuse_ knows"):
            fi.fuse_(nn.Sequential(nn.Conv2d(3, 3, 1)), strict=True)
        assert str(fi.fuse_(nn.ReLU())) == "nothing here that fuse_ knows"

    def test_a_choice_is_no_obstacle(self, tv: ModuleType) -> None:
        model = nn.Sequential(tv.Inception(*WIDTHS))
        fi.fuse_(model, filter_fn=lambda *_: False, strict=True)
        assert type(model[0]) is tv.Inception


def test_filter(tv: ModuleType) -> None:
    model = tv.GoogLeNet(init_weights=False)
    asked: dict[str, nn.Module] = {}

    def only_blocks(module: nn.Module, name: str) -> bool:
        asked[name] = module
        return name.startswith("inception4")

    report = fi.fuse_(model, filter_fn=only_blocks)
    assert report.fused == [f"inception4{letter}" for letter in "abcde"]
    assert set(report.skipped.values()) == {"filter_fn said no"}
    assert asked.keys() == {*report.fused, *report.skipped}
    assert asked["aux1"] is model.aux1


def test_model_that_is_a_block(tv: ModuleType) -> None:
    block = tv.Inception(*WIDTHS)
    report = fi.fuse_(block)
    assert report.fused == [""]
    assert str(report).startswith("(the model)  fused")
    assert type(block) is fi.Inception
    fi.unfuse_(block)
    assert type(block) is tv.Inception


def test_block_at_two_places(tv: ModuleType) -> None:
    model = nn.Module()
    model.first = tv.Inception(*WIDTHS)
    model.second = model.first
    model.part = model.first.branch2[0]
    report = fi.fuse_(model)
    assert report.fused == ["first", "second", "part"]
    assert model.second is model.first
    fi.unfuse_(model)
    assert type(model.second) is tv.Inception
    assert type(model.part) is tv.BasicConv2d


def test_part_that_was_fused_before(tv: ModuleType) -> None:
    block = tv.Inception(*WIDTHS)
    fi.fuse_(block.branch1)
    assert fi.fuse_(block).fused == [""]
    fi.unfuse_(block)
    assert type(block.branch1) is tv.BasicConv2d


def test_model_that_holds_itself(tv: ModuleType) -> None:
    model = nn.Module()
    model.add_module("block", tv.Inception(*WIDTHS))
    model.add_module("again", model)
    assert fi.fuse_(model).fused == ["block"]


def test_native_blocks_inside_theirs(tv: ModuleType) -> None:
    convolution_block, *_ = fi.torchvision_blocks()
    block = tv.Inception(*WIDTHS, conv_block=convolution_block)
    twin = copy.deepcopy(block)
    assert fi.fuse_(block).fused == [""]
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(block(x), twin(x))


def test_reference_without_its_bias() -> None:
    model = nn.Sequential(reference.ConvBlock(16, 8, kernel_size=1), reference.Inception(*WIDTHS))
    for path in ("0.conv", "1.branch1.conv"):
        model.get_submodule(path).bias = None
    report = fi.fuse_(model)
    assert report.skipped == {"0": "conv has no bias", "1": "branch1.conv has no bias"}

"""Modules that become ours in place: what stays, what goes back, when the children compute."""

import copy
import pickle
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fused_inception as fi
from fused_inception import reference
from fused_inception.nn.adoption import origin_of, release
from fused_inception.nn.inception import change_inside

WIDTHS = (16, 8, 16, 24, 8, 16, 8)
norms = pytest.mark.parametrize("norm", [None, "batch"])


def inception(norm: str | None) -> reference.Inception:
    return reference.Inception(*WIDTHS, norm=norm, kernel_5x5=3, dtype=torch.float64)


@norms
def test_adopted_module_computes_the_same_and_goes_back(norm: str | None) -> None:
    block = inception(norm)
    twin = copy.deepcopy(block)
    inside = list(block.modules())
    parameters = list(block.state_dict(keep_vars=True).items())
    types = [type(m) for m in inside]
    attributes = [set(vars(m)) for m in inside]
    changed = fi.Inception.adopt(block, norm)
    assert type(block) is fi.Inception
    assert [type(m) for m in changed] == [fi.ConvBlock] * 6 + [fi.Inception]
    assert "16 -> 56 (1x1: 8, 3x3: 16 -> 24, 3x3: 8 -> 16, pool: 8)" in block.extra_repr()
    assert all(a is b for a, b in zip(block.modules(), inside, strict=True))
    for (name, t), (want, u) in zip(
        block.state_dict(keep_vars=True).items(), parameters, strict=True
    ):
        assert name == want
        assert t is u
    x = torch.randn(2, 16, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(block(x), twin(x))
    for module in changed:
        release(module)
    assert [type(m) for m in block.modules()] == types
    assert [set(vars(m)) for m in block.modules()] == attributes
    torch.testing.assert_close(block(x), twin(x))


def test_a_second_fuse_says_what_was_fused_before() -> None:
    model = nn.Sequential(inception(None), inception("batch"))
    assert str(fi.fuse_(model)).splitlines()[-1] == "2 fused, 0 skipped"
    model.append(inception(None))
    lines = str(fi.fuse_(model)).splitlines()
    assert lines[-1] == "1 fused, 2 skipped, 2 of them fused before"


def test_adopted_module_is_one_operator() -> None:
    block = inception(None)
    fi.Inception.adopt(block, None)
    assert block.is_fused
    assert fi.Inception(*WIDTHS, kernel_5x5=3).dims == block.dims


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_can_go_back(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    block = inception("batch")
    fi.Inception.adopt(block, "batch")
    twin = copy_of(block)
    for module in [m for m in twin.modules() if origin_of(m) is not None]:
        release(module)
    assert type(twin) is reference.Inception
    assert [type(m) for m in twin.modules()] == [type(m) for m in inception("batch").modules()]


def test_native_blocks_inside_stay_native() -> None:
    block = reference.Inception(*WIDTHS)
    block.branch1 = fi.ConvBlock(16, 8, kernel_size=1)
    for module in fi.Inception.adopt(block, None):
        release(module)
    assert type(block.branch1) is fi.ConvBlock
    assert type(block.branch2[0]) is reference.ConvBlock


def test_attributes_of_the_user_with_our_names() -> None:
    """They mean nothing to us, and come back."""
    network = reference.GoogLeNet("torchvision", num_classes=3)
    block, aux = network.inception3a, network.aux1
    theirs: list[tuple[nn.Module, str, object]] = [
        (block, "dims", 3),
        (block, "skip_nonfinite", "never"),
        (block.branch1, "path", "/tmp"),
        (network.conv1, "path", ["a"]),
    ]
    before = {id(m): dict(vars(m)) for m in network.modules()}
    for module, name, value in theirs:
        setattr(module, name, value)
    want = {id(m): {**before[id(m)], **vars(m)} for m in network.modules()}
    fi.fuse_(network)
    assert isinstance(block, fi.Inception)
    assert "192 -> 256" in block.extra_repr()
    assert block.branch1.path == "parameters of the fused module"
    assert aux.pool == "adaptive"
    fi.unfuse_(network)
    assert {id(m): dict(vars(m)) for m in network.modules()} == want


def test_attributes_of_the_user_that_theirs_do_not_have(tv: ModuleType) -> None:
    block, aux = tv.Inception(*WIDTHS), tv.InceptionAux(16, 3)
    block.norm, aux.pool = "group", nn.functional.max_pool2d
    model = nn.ModuleList([block, aux])
    x = torch.randn(2, 16, 5, 5)
    want = [copy.deepcopy(module)(x) for module in model.eval()]
    fi.fuse_(model)
    for module, y in zip(model, want, strict=True):
        torch.testing.assert_close(module(x), y)
    twin = copy.deepcopy(model)
    for fused in (model, twin):
        fi.unfuse_(fused)
        assert fused[0].norm == "group"
        assert fused[1].pool is nn.functional.max_pool2d


def test_what_was_set_while_fused_goes() -> None:
    block = inception("batch")
    before = set(vars(block))
    fi.fuse_(block)
    block.skip_nonfinite = block.branch1.skip_nonfinite = True
    fi.unfuse_(block)
    assert set(vars(block)) == before
    assert not hasattr(block.branch1, "skip_nonfinite")


class _Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# layer, option, value, what `print` says
SET_LATER: list[tuple[str, str, object, str]] = [
    ("maxpool1", "dilation", 2, "has dilation 2"),
    ("maxpool3", "dilation", (1, 2), "has dilation (1, 2)"),
    ("avgpool", "output_size", 2, "has output_size 2"),
]


@pytest.mark.parametrize(("name", "option", "value", "reason"), SET_LATER)
def test_options_of_pools_that_are_set_later(
    tv: ModuleType, name: str, option: str, value: object, reason: str
) -> None:
    """Each by itself, and in the networks, whose operators for more than a layer step aside."""
    x = torch.rand(1, 8, 20, 20)
    theirs = tv.GoogLeNet(num_classes=3, aux_logits=False, init_weights=False)
    pool, plain = theirs.get_submodule(name), copy.deepcopy(theirs.get_submodule(name))
    fi.fuse_(theirs)
    for layer in (pool, plain):
        setattr(layer, option, value)
    assert f"plain PyTorch: {reason}" in repr(pool)
    torch.testing.assert_close(pool(x), plain(x))
    fi.unfuse_(theirs)
    assert type(pool) is type(plain)
    assert getattr(pool, option) == value


@pytest.mark.parametrize(("name", "option", "value", "reason"), SET_LATER)
def test_operators_of_many_layers_step_aside(
    name: str, option: str, value: object, reason: str
) -> None:
    network = fi.googlenet("paper", num_classes=3, aux_logits=False, image_size=64).eval()
    pool, plain = network.get_submodule(name), nn.MaxPool2d(3, 2, ceil_mode=True)
    if option == "output_size":
        plain, network.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4096, 3)
    for layer in (pool, plain):
        setattr(layer, option, value)
    assert f"{name} {reason}" in network.extra_repr()
    x = torch.rand(1, 3, 64, 64)
    y = network(x)
    network.set_submodule(name, plain)
    torch.testing.assert_close(y, network(x))


def test_indices_that_are_asked_for_later(tv: ModuleType) -> None:
    network = tv.GoogLeNet(num_classes=3, aux_logits=False, init_weights=False)
    fi.fuse_(network)
    network.maxpool1.return_indices = True
    assert "plain PyTorch: returns indices" in repr(network.maxpool1)
    x = torch.rand(1, 8, 9, 9)
    want = torch.nn.functional.max_pool2d(x, 3, 2, ceil_mode=True, return_indices=True)
    torch.testing.assert_close(network.maxpool1(x), want)


@pytest.mark.parametrize("path", ["", "0.branch2.1"])
def test_a_class_that_was_put_on_later_is_not_lost(path: str) -> None:
    model = nn.Sequential(inception("batch")) if path else inception("batch")
    fi.fuse_(model)
    block = model.get_submodule(path)
    block.register_parameter("alpha", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(block, "alpha", _Double())
    before = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"fuse_ made: its parametrisations .* nothing was changed"
    ):
        fi.unfuse_(model)
    with pytest.raises(ValueError, match=f"^{path or 'the model'} is a Parametrized"):
        fi.unfuse_(model)
    assert [type(m) for m in model.modules()] == before
    assert block.alpha.item() == 2
    parametrize.remove_parametrizations(block, "alpha")
    fi.unfuse_(model)
    assert type(block) in (reference.Inception, reference.ConvBlock)


def test_any_other_class_is_not_lost_either() -> None:
    model = nn.Sequential(inception("batch"))
    sharded = type("FSDPInception", (fi.Inception,), {})
    with (
        pytest.raises(
            ValueError, match=r"^0 is a FSDPInception, no longer the Inception .*fully_sh"
        ),
        fi.fused(model),
    ):
        model[0].__class__ = sharded
    assert type(model[0]) is sharded
    assert type(model[0].branch1) is fi.ConvBlock
    with pytest.raises(ValueError, match="this module is a FSDPInception"):
        release(model[0])


@norms
def test_inside_of_an_inception_module(norm: str | None) -> None:
    for block in (fi.Inception(*WIDTHS, norm=norm), reference.Inception(*WIDTHS, norm=norm)):
        container = type(block.branch1)
        assert change_inside(block, norm, (container,)) is None
        assert change_inside(block, norm, ()) == (
            None if container is fi.ConvBlock else f"branch1 is a {container.__module__}.ConvBlock"
        )
        other = "batch" if norm is None else None
        assert change_inside(block, other, (container,)) == "layers were added or removed"


@norms
@pytest.mark.parametrize(
    ("path", "make", "reason"),
    [
        ("branch1.conv", lambda o: nn.Conv2d(16, 8, 1, groups=2, **o), "has 2 groups"),
        ("branch1.conv", lambda o: nn.Conv2d(16, 8, 3, padding=1, **o), "kernel_size (3, 3)"),
        ("branch1.conv", lambda o: nn.Conv2d(16, 8, 1, stride=2, **o), "stride (2, 2)"),
        ("branch2.1.conv", lambda o: nn.Conv2d(16, 24, 3, **o), "padding (0, 0)"),
        ("branch2.1.conv", lambda o: nn.Conv2d(16, 24, 3, padding="same", **o), "padding 'same'"),
        ("branch2.1.conv", lambda o: nn.Conv2d(16, 24, (3, 1), padding=(1, 0), **o), "kernel_size"),
        (
            "branch2.1.conv",
            lambda o: nn.Conv2d(16, 24, 3, padding=2, dilation=2, **o),
            "dilation (2, 2)",
        ),
        (
            "branch2.1.conv",
            lambda o: nn.Conv2d(16, 24, 3, padding=1, padding_mode="circular", **o),
            "padding_mode 'circular'",
        ),
        ("branch4.0", lambda o: nn.MaxPool2d(5, 1, 2), "kernel_size 5"),
        ("branch4.0", lambda o: nn.MaxPool2d(3, 2, 1), "stride 2"),
        ("branch4.0", lambda o: nn.MaxPool2d(3, 1, 1, return_indices=True), "returns indices"),
    ],
)
def test_options_that_no_operator_has(
    norm: str | None, path: str, make: Callable[[dict], nn.Module], reason: str
) -> None:
    """A layer that is put in later is seen at the next call."""
    block = fi.Inception(*WIDTHS, norm=norm)
    block.set_submodule(path, make({"bias": norm is None}))
    assert not block.is_fused
    assert path in block.extra_repr()
    assert reason in block.extra_repr()


@norms
def test_bias_where_none_belongs(norm: str | None) -> None:
    block = fi.Inception(*WIDTHS, norm=norm)
    block.branch3[0].conv = nn.Conv2d(16, 8, 1, bias=norm is not None)
    want = "has no bias" if norm is None else "has a bias besides BatchNorm"
    assert f"branch3.0.conv {want}" in block.extra_repr()


def test_batch_norm_of_another_kind() -> None:
    block = fi.ConvBlock(16, 24, kernel_size=1, norm="batch")
    block.bn = nn.SyncBatchNorm(24)
    assert "bn is a SyncBatchNorm" in block.extra_repr()
    module = fi.Inception(*WIDTHS, norm="batch")
    module.branch2[1].bn = nn.GroupNorm(2, 24)
    assert "branch2.1.bn is a GroupNorm" in module.extra_repr()


def test_conv_block_with_another_filter_computes_its_children() -> None:
    block = fi.ConvBlock(4, 8, kernel_size=3, padding=1)
    block.conv = nn.Conv2d(4, 8, (1, 3), padding=(0, 1))
    x = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(block(x), block.conv(x).relu())
    assert "conv has kernel_size (1, 3)" in block.extra_repr()

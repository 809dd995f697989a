"""The modules and the network on the ATen path, against the reference."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fused_inception as fi
from fused_inception import reference
from fused_inception.geometry import GOOGLENET, VARIANTS
from tests.tolerances import assert_within, assert_within_l2

WIDTHS = (16, 8, 16, 24, 8, 16, 8)
variants = pytest.mark.parametrize("variant", VARIANTS)


def twins(variant: str, dtype: torch.dtype = torch.float64, **options: object) -> list[nn.Module]:
    """Ours and the reference with the same weights, without dropout."""
    options = {"num_classes": 7, "image_size": 64, "dropout": 0.0, "dropout_aux": 0.0, **options}
    ours = fi.googlenet(variant, **options)  # type: ignore[arg-type]
    theirs = reference.googlenet(variant, **options)  # type: ignore[arg-type]
    theirs.load_state_dict(ours.state_dict())
    return [ours.to(dtype), theirs.to(dtype)]


def loss_of(output: Tensor | fi.GoogLeNetOutputs) -> Tensor:
    maps = output if isinstance(output, tuple) else (output,)
    return sum(((t * t).mean() * (i + 1) for i, t in enumerate(maps)), torch.zeros(()))


@variants
@pytest.mark.parametrize("aux", [True, False], ids=["heads", "no-heads"])
def test_state_dict_loads_both_ways(variant: str, aux: bool) -> None:
    ours = fi.googlenet(variant, num_classes=3, aux_logits=aux, init_weights=False)
    theirs = reference.googlenet(variant, num_classes=3, aux_logits=aux, init_weights=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


@variants
def test_children_in_the_order_of_the_reference(variant: str) -> None:
    ours = fi.googlenet(variant, num_classes=3, init_weights=False)
    theirs = reference.googlenet(variant, num_classes=3, init_weights=False)
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


@variants
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_network_in_fp64(variant: str, training: bool) -> None:
    ours, theirs = (model.train(training) for model in twins(variant))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    assert type(outputs[0]) is (fi.GoogLeNetOutputs if training else Tensor)
    torch.testing.assert_close(outputs[0], outputs[1])
    for output in outputs:
        loss_of(output).backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None
            assert name.startswith("aux")
        else:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
    for b, c in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(b, c)


def test_network_in_fp32() -> None:
    exact = twins("paper")[1]
    ours, theirs = twins("paper", torch.float32)
    for model in (ours, theirs):
        model.load_state_dict(exact.state_dict())
    x = torch.randn(2, 3, 64, 64)
    outputs = [model(x.to(next(model.parameters()))) for model in (ours, exact, theirs)]
    for name, got, want, baseline in zip(fi.GoogLeNetOutputs._fields, *outputs, strict=True):
        assert_within_l2(name, got, want, baseline)
    for output in outputs:
        loss_of(output).backward()
    grads = [[p.grad for p in model.parameters()] for model in (ours, exact, theirs)]
    for (name, _), got, want, baseline in zip(ours.named_parameters(), *grads, strict=True):
        assert_within_l2(name, got, want, baseline, slack=3.0)


def test_transform_input() -> None:
    ours, theirs = (m.eval() for m in twins("torchvision", transform_input=True))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kernel_5x5", [3, 5])
@pytest.mark.parametrize("norm", [None, "batch"])
def test_inception(norm: str | None, kernel_5x5: int) -> None:
    ours = fi.Inception(*WIDTHS, norm=norm, kernel_5x5=kernel_5x5, dtype=torch.float64)
    theirs = reference.Inception(*WIDTHS, norm=norm, kernel_5x5=kernel_5x5, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 16, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_aten_path_runs_what_pytorch_runs() -> None:
    """A training step has the operators of the plain network, but for the normalisations, which
    are two operators of ours with their backwards."""
    counts = []
    for library in (fi, reference):
        network = library.googlenet("paper", num_classes=3, image_size=64)
        with torch.profiler.profile(acc_events=True) as profile:
            loss_of(network(torch.randn(1, 3, 64, 64))).backward()
        counts.append({event.key: event.count for event in profile.key_averages()})
    ours, theirs = counts
    for name in ("convolution", "convolution_backward", "max_pool2d_with_indices", "cat"):
        assert ours[f"aten::{name}"] == theirs[f"aten::{name}"]
    assert {name for name in ours if name.startswith("fused_inception::")} == {
        f"fused_inception::{name}{way}"
        for name in ("max_pool2d_lrn", "lrn_max_pool2d")
        for way in ("", "_backward")
    }


def test_aux_with_either_pool() -> None:
    for options in ({"pool": "paper", "map_size": 9}, {"pool": "adaptive", "norm": "batch"}):
        ours = fi.InceptionAux(12, 5, dropout=0.0, dtype=torch.float64, **options)
        theirs = reference.InceptionAux(12, 5, dropout=0.0, dtype=torch.float64, **options)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(3, 12, 9, 9, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))


def test_heads_only_run_in_training() -> None:
    network = fi.googlenet("paper", num_classes=3, image_size=64)
    network.aux1 = network.aux2 = None
    assert isinstance(network.eval()(torch.randn(1, 3, 64, 64)), Tensor)


def test_dropout_defaults() -> None:
    paper, other = fi.googlenet("paper", num_classes=3), fi.googlenet("torchvision", num_classes=3)
    assert paper.aux1 is not None
    assert (paper.dropout.p, paper.aux1.dropout.p) == (0.4, 0.7)
    assert other.aux1 is not None
    assert (other.dropout.p, other.aux1.dropout.p) == (0.2, 0.7)


def test_paper_initialisation() -> None:
    network = fi.googlenet("paper")
    for name, p in network.named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
            continue
        fan_in = p[0].numel()
        classifier = name in ("fc.weight", "aux1.fc2.weight", "aux2.fc2.weight")
        std = 0.01 if classifier else (2 / fan_in) ** 0.5
        # five deviations of the estimate, and of the mean
        assert p.std().item() == pytest.approx(std, rel=5 / (2 * p.numel()) ** 0.5), name
        assert abs(p.mean().item()) < 5 * std / p.numel() ** 0.5, name


def test_torchvision_initialisation() -> None:
    network = fi.googlenet("torchvision")
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.05), name
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all(), name
            assert module.bias.eq(0).all(), name
            assert module.eps == 1e-3, name


def test_initialisation_is_that_of_the_reference() -> None:
    for variant in VARIANTS:
        torch.manual_seed(3)
        ours = fi.googlenet(variant, num_classes=5)
        torch.manual_seed(3)
        theirs = reference.googlenet(variant, num_classes=5)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def test_without_initialisation_pytorchs_defaults_stay() -> None:
    network = fi.googlenet("paper", num_classes=5, init_weights=False)
    assert network.inception3a.branch1.conv.bias.count_nonzero() > 0


def test_device_and_dtype() -> None:
    network = fi.googlenet("torchvision", num_classes=5, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


@variants
@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(variant: str, copy_of: Callable[[nn.Module], nn.Module]) -> None:
    network = fi.googlenet(variant, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    twin = copy_of(network)
    assert torch.equal(network(x), twin(x))
    with torch.no_grad():
        list(twin.parameters())[-1].add_(1)
    assert not torch.equal(network(x), twin(x))


def test_children_are_pytorchs_own_layers() -> None:
    module = fi.Inception(*WIDTHS, norm="batch")
    assert type(module.branch2[1].conv) is nn.Conv2d
    assert type(module.branch2[1].bn) is nn.BatchNorm2d
    assert type(module.branch4[0]) is nn.MaxPool2d
    assert module.branch1.conv.bias is None


def test_print_tells_widths_mode_and_path() -> None:
    text = repr(fi.Inception(*GOOGLENET["3a"].widths)).splitlines()[1].strip()
    assert text == (
        "192 -> 256 (1x1: 64, 3x3: 96 -> 128, 5x5: 16 -> 32, pool: 32), bias, relu, "
        "one fused operator"
    )
    assert (
        repr(fi.Inception(*WIDTHS, norm="batch"))
        .splitlines()[1]
        .endswith("batch norm, relu, one fused operator")
    )
    assert "3x3: 8 -> 16, pool" in repr(fi.Inception(*WIDTHS, kernel_5x5=3)).splitlines()[1]


def test_print_hides_no_plain_layer() -> None:
    network = fi.googlenet("paper", num_classes=3)
    assert "9 of 9 Inception modules, 5 of 5 other convolutions" in repr(network)
    for fused in (network.conv1, network.aux1, network.aux2, network.avgpool):
        assert "one fused operator" in fused.extra_repr()
    assert "parameters of the fused module" in network.aux1.conv.extra_repr()
    assert "7 of 7 pools and local response norms" in repr(network)
    network.maxpool1 = torch.nn.MaxPool2d(3, 2, ceil_mode=True)
    assert "6 of 7 pools and local response norms" in repr(network)
    network = fi.googlenet("torchvision", num_classes=3)
    assert "9 of 9 Inception modules, 5 of 5 other convolutions" in repr(network)
    for fused in (network.conv1, network.aux1.conv):
        assert "one fused operator" in fused.extra_repr()
    assert "pool, its convolution is fused, pool and" in network.aux1.extra_repr()


def test_optimiser_and_freezing_see_the_parameters() -> None:
    module = fi.Inception(*WIDTHS)
    module.branch2.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    module(torch.rand(2, 16, 4, 4)).sum().backward()
    optimiser.step()
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("branch2"), name


class TestInnerChanges:
    """What a fused operator would pass over makes the children compute."""

    module: fi.Inception
    x = torch.rand(2, 16, 4, 4)

    @pytest.fixture(autouse=True)
    def _module(self) -> None:
        self.module = fi.Inception(*WIDTHS)

    def test_forward_hook(self) -> None:
        seen = []
        handle = self.module.branch2[0].conv.register_forward_hook(lambda *a: seen.append(a))
        y = self.module(self.x)
        assert len(seen) == 1
        assert "branch2.0.conv has a hook" in repr(self.module)
        handle.remove()
        torch.testing.assert_close(self.module(self.x), y)
        assert len(seen) == 1
        assert self.module.is_fused

    def test_backward_hook(self) -> None:
        seen = []
        self.module.branch1.register_full_backward_hook(lambda *a: seen.append(a))
        self.module(self.x.clone().requires_grad_()).sum().backward()
        assert len(seen) == 1

    def test_hook_on_the_module_itself_keeps_it_fused(self) -> None:
        seen = []
        self.module.register_forward_hook(lambda *a: seen.append(a))
        self.module(self.x)
        assert len(seen) == 1
        assert self.module.is_fused

    def test_pruning(self) -> None:
        prune.l1_unstructured(self.module.branch1.conv, "weight", amount=0.5)
        assert not self.module.is_fused
        self.module(self.x).sum().backward()
        grad = self.module.branch1.conv.weight_orig.grad
        assert (grad == 0).sum() >= grad.numel() // 2

    def test_parametrization(self) -> None:
        class Zero(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return weight * 0

        parametrize.register_parametrization(self.module.branch4[1].conv, "weight", Zero())
        assert not self.module.is_fused
        bias = self.module.branch4[1].conv.bias.relu().view(-1, 1, 1).expand(8, 4, 4)
        torch.testing.assert_close(self.module(self.x)[0, -8:], bias)

    def test_replaced_layer(self) -> None:
        self.module.branch4[0] = nn.AvgPool2d(3, stride=1, padding=1)
        assert "branch4.0 is a AvgPool2d" in repr(self.module)
        want = self.module.branch4(self.x)
        torch.testing.assert_close(self.module(self.x)[:, -8:], want)

    def test_added_layer(self) -> None:
        self.module.branch1 = nn.Sequential(self.module.branch1, nn.Dropout(0.5))
        assert "layers were added or removed" in repr(self.module)
        self.module(self.x)


class TestInnerChangesOfAConvBlock:
    block: fi.ConvBlock
    x = torch.rand(2, 4, 3, 3)

    @pytest.fixture(autouse=True)
    def _block(self) -> None:
        self.block = fi.ConvBlock(4, 8, kernel_size=3, padding=1)

    def test_hook(self) -> None:
        seen = []
        handle = self.block.conv.register_forward_hook(lambda *a: seen.append(a))
        y = self.block(self.x)
        assert len(seen) == 1
        assert "conv has a hook" in repr(self.block)
        handle.remove()
        torch.testing.assert_close(self.block(self.x), y)
        assert self.block.is_fused

    def test_pruning_follows_its_mask(self) -> None:
        prune.l1_unstructured(self.block.conv, "weight", amount=0.5)
        for _ in range(2):  # a stale weight has a graph for one backward alone
            self.block(self.x).sum().backward()

    def test_no_bias(self) -> None:
        self.block.conv.bias = None
        assert "conv has no bias" in repr(self.block)
        torch.testing.assert_close(self.block(self.x), self.block.conv(self.x).relu())

    def test_replaced_layer(self) -> None:
        self.block.conv = nn.Sequential(self.block.conv, nn.Tanh())
        assert "conv is a Sequential" in repr(self.block)
        assert self.block(self.x).max() < 1


def test_compiled_network() -> None:
    torch._dynamo.reset()
    network = fi.googlenet("paper", num_classes=3, image_size=64, dropout=0.0, dropout_aux=0.0)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), network(x))
    loss_of(compiled(x)).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_conv_block() -> None:
    for norm in (None, "batch"):
        ours = fi.ConvBlock(3, 5, kernel_size=3, stride=2, padding=1, norm=norm)
        theirs = reference.ConvBlock(3, 5, kernel_size=3, stride=2, padding=1, norm=norm)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        x = torch.randn(2, 3, 7, 7)
        want = theirs(x)
        assert_within("y", ours(x), want.double(), want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fi.googlenet("resnet"), "variant must be one of paper, torchvision"),
        (lambda: fi.googlenet("paper", image_size=46), "image_size must be at least 47"),
        (lambda: fi.ConvBlock(1, 1, kernel_size=1, norm="layer"), "norm must be None or"),
        (lambda: fi.Inception(*WIDTHS, kernel_5x5=7), "kernel_5x5 must be 3 or 5, got 7"),
        (lambda: fi.Inception(16, 0, 1, 1, 1, 1, 1), "widths must be at least 1"),
        (lambda: fi.Inception(*WIDTHS, norm="layer"), "norm must be None or"),
        (lambda: fi.InceptionAux(1, 1, pool="max"), "pool must be"),
    ],
)
def test_wrong_options(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_no_heads_no_limit_of_their_size() -> None:
    network = fi.googlenet("paper", num_classes=3, aux_logits=False, image_size=31)
    assert network.eval()(torch.randn(1, 3, 31, 31)).shape == (1, 3)


class TestArguments:
    """Messages of functional.inception: what was expected, what came."""

    @staticmethod
    def call(change: dict[str, Tensor]) -> None:
        dims = fi.Inception(*WIDTHS).dims
        names = ("w1", "w3r", "w3", "w5r", "w5", "wp")
        arguments = {"x": torch.zeros(1, 16, 3, 3)}
        for name, shape in zip(names, dims.filter_shapes, strict=True):
            arguments[name] = torch.zeros(shape)
            arguments["b" + name[1:]] = torch.zeros(shape[0])
        fi.functional.inception(**{**arguments, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(16, 3, 3)}, r"x must have 4 dimensions \[N, C, H, W\], got 3"),
            ({"x": torch.zeros(1, 16, 0, 3)}, "of at least 1, got"),
            ({"x": torch.zeros(1, 15, 3, 3)}, r"w1 must be of shape \[C_out, 15, 1, 1\], got"),
            ({"w1": torch.zeros(8, 16, 3, 3)}, r"w1 must be of shape .* got \[8, 16, 3, 3\]"),
            ({"w3": torch.zeros(24, 8, 3, 3)}, r"w3 must be of shape \[C_out, 16, 3, 3\]"),
            ({"w5": torch.zeros(16, 8, 7, 7)}, r"3, 3\] or \[C_out, 8, 5, 5\], got"),
            ({"w5": torch.zeros(16, 8, 5, 3)}, "w5 must be of shape"),
            ({"wp": torch.zeros(0, 16, 1, 1), "bp": torch.zeros(0)}, "wp must be of shape"),
            ({"b3r": torch.zeros(15)}, r"b3r must be of shape \[16\], .* got \[15\]"),
            (
                {"b5": torch.zeros(16, device="meta")},
                "b5 must be on the device of x, cpu, got meta",
            ),
        ],
    )
    def test_shapes_and_devices(self, change: dict[str, Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(change)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(1, 16, 3, 3, dtype=torch.int64)}, "x must be float16 .* got int64"),
            ({"w5r": torch.zeros(8, 16, 1, 1).half()}, "w5r must be float32, got float16"),
            ({"bp": torch.zeros(8).double()}, "bp must be float32, got float64"),
        ],
    )
    def test_dtypes(self, change: dict[str, Tensor], message: str) -> None:
        with pytest.raises(TypeError, match=message):
            self.call(change)

    def test_the_unchanged_arguments_are_right(self) -> None:
        self.call({})

    def test_pool(self) -> None:
        with pytest.raises(ValueError, match="4 dimensions"):
            fi.functional.global_avg_pool2d(torch.zeros(3, 3))
        with pytest.raises(TypeError, match="got int32"):
            fi.functional.global_avg_pool2d(torch.zeros(1, 1, 2, 2, dtype=torch.int32))

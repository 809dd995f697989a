"""BatchNorm's operators, functions and modules: what registration, autograd and layers promise."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import InceptionDims
from fused_inception.ops import batch_norm
from tests.cases import InceptionCase
from tests.tolerances import assert_within
from tests.torchvision_import import import_torchvision

pytestmark = pytest.mark.usefixtures("on_device")

DIMS = InceptionDims(24, 16, 24, 32, 8, 16, 8)
IMPLEMENTATIONS = ["torch", "triton"]


def block() -> fi.Inception:
    """A module whose BatchNorms have parameters and statistics of their own."""
    module = fi.Inception(*DIMS.widths, norm="batch")
    draw_norms(module)
    return module


def draw_norms(module: nn.Module) -> None:
    """Give all BatchNorms parameters and statistics away from their start."""
    for layer in norms(module):
        nn.init.normal_(layer.weight, 1.0, 0.3)
        nn.init.normal_(layer.bias, 0.0, 0.3)
        nn.init.normal_(layer.running_mean, 0.0, 0.5)
        nn.init.uniform_(layer.running_var, 0.5, 1.5)


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def twin_of(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The reference with copies of the same layers, and so their options."""
    twin: nn.Module = reference.ConvBlock(1, 1, kernel_size=1, norm="batch")
    if isinstance(module, fi.Inception):
        twin = reference.Inception(*DIMS.widths, norm="batch")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            twin.set_submodule(name, copy.deepcopy(layer))
    return twin.to(dtype)


def data(seed: int) -> tuple[Tensor, Tensor]:
    """A batch and the gradient of its output."""
    draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x = torch.randn(2, DIMS.in_channels, 5, 6, generator=draw).relu()
    return x, torch.randn(2, DIMS.out_channels, 5, 6, generator=draw)


def step(module: nn.Module, x: Tensor, dy: Tensor, amp: torch.dtype | None = None) -> list[Tensor]:
    """Output, gradients and buffers after a forward, with `amp` under autocast, and a backward."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    with torch.autocast(x.device.type, dtype=amp, enabled=amp is not None):
        y = module(x)
    y.backward(dy.to(y.dtype))
    gradients = [p.grad for p in module.parameters()]
    return [y.detach(), x.grad, *gradients, *(b.detach().clone() for b in module.buffers())]


def assert_same_step(
    module: nn.Module,
    impl: str = "torch",
    steps: int = 2,
    draw: Callable[[int], tuple[Tensor, Tensor]] = data,
) -> None:
    """`steps` steps of the module and of the reference in its dtype are as near to fp64."""
    exact, theirs = twin_of(module, torch.float64), twin_of(module)
    first = next(module.parameters())
    gradients = range(1, 2 + len([*module.parameters()]))
    for seed in range(steps):
        x, dy = (t.to(first) for t in draw(seed))
        with fi.backend(impl):
            got = step(module, x, dy)
        want, baseline = step(exact, x.double(), dy), step(theirs, x, dy)
        for i, (a, b, c) in enumerate(zip(got, want, baseline, strict=True)):
            if a.dtype == torch.int64:
                assert torch.equal(a, b)
            else:
                assert_within(f"{i}", a, b, c, slack=3.0 if i in gradients else 2.0)


def test_training_steps_on_the_aten_path() -> None:
    module = block()
    assert module.is_fused
    assert_same_step(module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_training_steps_under_autocast(impl: str, dtype: torch.dtype) -> None:
    """torchvision's block behind `fuse_`: fp32 parameters and statistics, 16-bit maps.

    Its gradients all together: rounding flips gates, and one shows in the few pixels here.
    """
    theirs = import_torchvision("torchvision.models.googlenet").Inception(*DIMS.widths)
    draw_norms(theirs)
    for layer in norms(theirs):
        # most gates open: few that rounding flips
        nn.init.normal_(layer.bias, 1.0, 0.3)
    module, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    fi.fuse_(module, strict=True)
    for seed in range(2):
        x, dy = data(seed)
        with fi.backend(impl):
            got = step(module, x, dy, dtype)
        want, baseline = step(exact, x.double(), dy), step(theirs, x, dy, dtype)
        assert got[0].dtype == dtype
        assert [g.dtype for g in got[1:]] == [b.dtype for b in baseline[1:]]
        count = 2 + len([*module.parameters()])
        for i, (a, b, c) in enumerate(zip(got, want, baseline, strict=True)):
            if i == 0 or (i >= count and a.is_floating_point()):
                assert_within(f"{i}", a, b, c)
        errors, yardsticks = (
            torch.stack([(a - b).norm() / b.norm() for a, b in zip(of, want[1:count], strict=True)])
            for of in (got[1:count], baseline[1:count])
        )
        # noise so large would hide an error
        assert yardsticks.norm() < 0.3, yardsticks
        assert errors.norm() <= 3 * yardsticks.norm()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_layers_without_parameters_or_statistics(impl: str) -> None:
    module = block()
    for layer in norms(module):
        layer.weight = layer.bias = None
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        layer.track_running_stats = layer.affine = False
    assert module.is_fused
    assert_same_step(module, impl, steps=1)
    # nothing is tracked: the batch's statistics in eval, too
    module.eval()
    assert_same_step(module, impl, steps=1)


def test_cumulative_momentum() -> None:
    module = block()
    for layer in norms(module):
        layer.momentum = None
    assert_same_step(module, steps=3)
    assert all(layer.num_batches_tracked == 3 for layer in norms(module))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of infinities
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["module", "convolution"])
def test_skip_nonfinite(kind: str, impl: str) -> None:
    """One channel of one layer overflows: it alone keeps its statistics, and counts the batch."""
    module = block() if kind == "module" else fi.ConvBlock(24, 16, kernel_size=1, norm="batch")
    first = module.branch1 if kind == "module" else module
    with torch.no_grad():
        first.conv.weight[3, 0] = torch.inf
    module.skip_nonfinite = True
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms(module)]
    with fi.backend(impl):
        module(data(0)[0])
    for layer, old in zip(norms(module), before, strict=True):
        assert layer.num_batches_tracked == 1
        for now, then in zip((layer.running_mean, layer.running_var), old, strict=True):
            kept = [3] if layer is first.bn else []
            assert (now == then).nonzero().flatten().tolist() == kept
    module.skip_nonfinite = False
    with fi.backend(impl):
        module(data(0)[0])
    assert first.bn.running_mean.isfinite().tolist() == [c != 3 for c in range(16)]


@pytest.mark.parametrize("change", ["hook", "eps", "another type"])
@pytest.mark.parametrize("kind", ["module", "convolution"])
def test_skip_nonfinite_where_the_children_compute(kind: str, change: str) -> None:
    """The same; and, the pass over, its backward runs."""
    module = block() if kind == "module" else fi.ConvBlock(24, 16, kernel_size=1, norm="batch")
    first = module.branch1 if kind == "module" else module
    last = module.branch4[1] if kind == "module" else module
    if change == "hook" or kind == "convolution":
        last.conv.register_forward_hook(lambda *_: None)
    elif change == "eps":
        last.bn.eps = 0.1
    if change == "another type":
        last.bn = nn.SyncBatchNorm(last.conv.out_channels)
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        first.conv.weight[3, 0] = torch.inf
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in layers]
    assert not module.is_fused
    module.skip_nonfinite = True
    x = data(0)[0].requires_grad_()
    module(x).sum().backward()
    for layer, old in zip(layers, before, strict=True):
        assert layer.num_batches_tracked == 1
        for now, then in zip((layer.running_mean, layer.running_var), old, strict=True):
            kept = [3] if layer is first.bn else []
            assert (now == then).nonzero().flatten().tolist() == kept
    module.skip_nonfinite = False
    module(x)
    assert first.bn.running_mean.isfinite().tolist() == [c != 3 for c in range(16)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_module_made_in_inference_mode(impl: str) -> None:
    """Its buffers have no version to count; they advance all the same."""
    with torch.inference_mode(), fi.backend(impl):
        module = block()
        twin = twin_of(module)
        x = torch.randn(2, 24, 4, 5)
        torch.testing.assert_close(module(x), twin(x))
        for ours, theirs in zip(module.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_frozen_layers_in_training(impl: str) -> None:
    """In eval the running statistics normalise, are kept, and every gradient is the reference's."""
    module = block()
    for layer in norms(module):
        layer.eval()
    before = [b.clone() for b in module.buffers()]
    assert module.is_fused
    assert_same_step(module, impl, steps=1)
    assert all(torch.equal(a, b) for a, b in zip(before, module.buffers(), strict=True))


def test_a_mixture_is_left_to_the_children() -> None:
    module = block()
    norms(module)[2].eval()
    assert "BatchNorm layers differ in training" in module.extra_repr()
    assert_same_step(module)
    module = block()
    norms(module)[0].eps = 1e-5
    assert "BatchNorm layers differ in eps" in module.extra_repr()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_folded_in_eval_and_never_stale(impl: str) -> None:
    """The folded filters are kept, and made anew after whatever changes them."""
    module, x = block().eval(), torch.randn(1, 24, 4, 5)

    def check() -> None:
        with torch.no_grad(), fi.backend(impl):
            torch.testing.assert_close(module(x), twin_of(module)(x))
            with fi.record_launches() as launches:
                module(x)
        packed = [launch for launch in launches if launch.kernel == "_pack_kernel"]
        assert not packed  # the second call finds all that it needs

    check()
    module.train()
    step(module, x, torch.ones(()).expand(1, DIMS.out_channels, 4, 5))
    module.eval()
    check()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    optimiser.step()
    check()
    module.load_state_dict(block().state_dict())
    check()
    module.bfloat16().float()
    check()
    # each alone, as the model averaging of others writes them
    for name in ("weight", "bias", "running_mean", "running_var"):
        with torch.no_grad():
            getattr(norms(module)[4], name).add_(0.5)
        check()
    for layer in norms(module):
        layer.eps = 0.1
    check()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("single", [False, True], ids=["module", "convolution"])
def test_empty_batch_counts_and_changes_nothing_else(single: bool, impl: str) -> None:
    """As PyTorch's own layers have it."""
    if single:
        ours = fi.ConvBlock(8, 16, kernel_size=3, padding=1, norm="batch")
        theirs = fi.reference.ConvBlock(8, 16, kernel_size=3, padding=1, norm="batch")
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(0, 8, 4, 5)
    else:
        ours = block()
        theirs, x = twin_of(ours), torch.randn(0, 24, 4, 5)
    for module in (ours, theirs):
        with fi.backend(impl):
            y = module(x)
            y.sum().backward()
    assert y.shape[0] == 0
    for (name, got), want in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert torch.equal(got, want), name
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad), name
        assert not got.grad.any(), name


def test_errors() -> None:
    x = torch.randn(1, 24, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block()(x)
    p = InceptionCase("", DIMS, 1, 4, 4).tensors(torch.float32, torch.get_default_device())
    nothing = [None] * 6
    with pytest.raises(ValueError, match="training=False needs running_means"):
        functional.inception_bn(p.x, p.filters, nothing, nothing, nothing, nothing)
    with pytest.raises(
        ValueError, match="running_means must come with running_vars, which is None"
    ):
        functional.inception_bn(
            p.x, p.filters, [torch.zeros_like(b) for b in p.biases], nothing, nothing, nothing
        )
    with pytest.raises(ValueError, match="gammas must be 6 tensors or all None, got 1"):
        functional.inception_bn(
            p.x, p.filters, nothing, nothing, [p.biases[0], *nothing[1:]], nothing, training=True
        )
    gammas = [p.biases[0], p.biases[0], *p.biases[2:]]
    with pytest.raises(ValueError, match=r"gammas must be of shape \[24\], got \[16\]"):
        functional.inception_bn(p.x, p.filters, nothing, nothing, gammas, gammas, training=True)
    means, variances = (torch.zeros(16), torch.ones(16))
    with pytest.raises(ValueError, match="needs batches_tracked"):
        functional.conv2d_bn_relu(p.x, p.filters[0], means, variances, training=True, momentum=None)
    counters: list[Tensor | None] = [torch.zeros((), dtype=torch.int64)]
    running = [torch.zeros_like(b) for b in p.biases]
    for given, error in (
        ([*counters, *[None] * 5], r"batches_tracked must be 6 tensors or all None, got 1"),
        ([torch.zeros(())] * 6, "batches_tracked must be int64, got float32"),
        ([torch.zeros((), dtype=torch.int64, device="meta")] * 6, "batches_tracked must be on "),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            functional.inception_bn(
                p.x, p.filters, running, running, nothing, nothing, training=True,
                batches_tracked=given,
            )  # fmt: skip
    with pytest.raises(ValueError, match="filters must be 6, got 1"):
        functional.inception_bn(p.x, p.filters[:1], nothing, nothing, nothing, nothing)


def test_double_backward_is_refused() -> None:
    module, x = block(), torch.randn(2, 24, 3, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        dx.sum().backward()


def test_gradcheck() -> None:
    """Every gradient of the ATen path in fp64, against differences."""
    torch.manual_seed(3)
    module = fi.Inception(3, 2, 2, 2, 2, 2, 2, norm="batch").double()
    parameters = [p for p in module.parameters() if p.dim() == 1]
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return module(x)

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


def arguments(name: str) -> tuple[object, ...]:
    """Of an operator in training, up to its options."""
    p = InceptionCase("", DIMS, 1, 3, 4).tensors(torch.float32, torch.get_default_device())
    filters = p.filters if name == "inception_bn" else p.filters[2:3]
    x = p.x if name == "inception_bn" else p.x[:, :24]
    vectors = [[torch.rand(f.shape[0]) + 0.5 for f in filters] for _ in range(4)]
    return (x, filters, *vectors, [torch.tensor(1) for _ in filters])


@pytest.mark.parametrize("name", ["inception_bn", "conv2d_bn_relu"])
def test_opcheck(name: str) -> None:
    operators = batch_norm._OPERATORS[name]
    geometry = () if name == "inception_bn" else (1, 1)
    x, filters, gammas, betas, means, variances, batches = arguments(name)
    training = (*geometry, 0.1, 1e-3, False)
    inputs = (x, filters, gammas, betas, means, variances, batches, *training)
    torch.library.opcheck(operators["forward"], inputs)
    y, *saved = operators["forward"](*inputs)
    needs = [True] * (1 + 3 * len(filters))
    torch.library.opcheck(
        operators["backward"],
        (torch.randn_like(y), x, saved, filters, gammas, betas, *geometry, needs),
    )
    torch.library.opcheck(
        operators["eval"], (x, filters, gammas, betas, means, variances, *geometry, 1e-3)
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_counters_advance_in_one_call(impl: str) -> None:
    """Not in six: on a GPU that is one launch."""
    module = block()
    x = data(0)[0].requires_grad_()
    with fi.backend(impl), torch.profiler.profile(acc_events=True) as profile:
        module(x)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_foreach_add_"] == 1
    assert all(layer.num_batches_tracked == 1 for layer in norms(module))
    # a CPU has no kernel for lists: there, and only there, the one call goes tensor by tensor
    assert counts.get("aten::add_", 0) == len(norms(module))


@pytest.mark.parametrize("training", [True, False])
def test_compiled_module_counts_and_tracks(training: bool) -> None:
    torch._dynamo.reset()
    module = block().train(training)
    twin = twin_of(module).train(training)
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        module, fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 24, 4, 4)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), twin(x))
    for ours, theirs in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)

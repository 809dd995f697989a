"""The naive module: its kernels against fp64, its operator and its class, on both paths."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.geometry import NaiveDims
from fused_inception.ops.inception import inception_naive, inception_naive_backward
from tests.cases import LAYOUTS, NAIVE_CASES, InceptionCase, InceptionTensors
from tests.conftest import implementations, needs_triton
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["y", "x", "w1", "w3", "w5", "b1", "b3", "b5"]
DIMS = NaiveDims(16, 8, 16, 8)
WIDTHS = (16, 8, 16, 8)
ALL = [True] * 7
cases = pytest.mark.parametrize("case", NAIVE_CASES, ids=lambda case: case.name)


def problem(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    dims: NaiveDims = DIMS,
    batch: int = 2,
    height: int = 4,
    width: int = 3,
) -> InceptionTensors:
    return InceptionCase("", dims, batch, height, width).tensors(dtype, device)


def pairs(p: InceptionTensors) -> list[Tensor]:
    return [t for pair in zip(p.filters, p.biases, strict=True) for t in pair]


def run(p: InceptionTensors, impl: str = "triton", needs: list[bool] = ALL) -> list[Tensor]:
    """y and the gradients by one path; gradients that are not needed are empty."""
    tensors = (p.x, *p.filters, *p.biases)
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    narrow = p.x.dtype if p.filters[0].dtype != p.x.dtype else None
    amp = torch.autocast(p.x.device.type, narrow, enabled=narrow is not None)
    with fi.backend(impl), amp:
        y = functional.inception_naive(
            leaves[0], *pairs(p._replace(filters=leaves[1:4], biases=leaves[4:]))
        )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = iter(torch.autograd.grad(y, wanted, p.dy))
    return [y.detach(), *(next(gradients) if need else p.x.new_empty(0) for need in needs)]


def plain(p: InceptionTensors) -> list[Tensor]:
    """y and the gradients by PyTorch's own operators and autograd."""
    leaves = [t.detach().requires_grad_() for t in (p.x, *p.filters, *p.biases)]
    parameters = [t for pair in zip(leaves[1:4], leaves[4:], strict=True) for t in pair]
    y = reference.inception_naive(leaves[0], *parameters)
    return [y.detach(), *torch.autograd.grad(y, leaves, p.dy)]


def check(p: InceptionTensors, got: list[Tensor]) -> None:
    """Each result as near to fp64 as PyTorch's in the dtype of x, and in its parameter's dtype."""
    want, baseline = plain(p.to(torch.float64)), plain(p.to(p.x.dtype))
    like = [p.dy, p.x, *p.filters, *p.biases]
    for name, ours, exact, theirs, source in zip(NAMES, got, want, baseline, like, strict=True):
        assert ours.dtype == source.dtype, name
        slack = 2.0 if name == "y" else 3.0
        assert_within(name, ours.to(theirs.dtype), exact, theirs, slack=slack)
    for maps in got[: 1 + (p.x.numel() > 0)]:  # an empty gradient has any strides
        _, c, h, w = maps.shape
        assert maps.stride() == (h * w * c, 1, w * c, c)


@implementations
@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@cases
def test_output_and_all_gradients(
    case: InceptionCase, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    p = case.tensors(dtype, device)
    check(p, run(p, impl))


@cases
def test_fp64_is_exact(case: InceptionCase) -> None:
    p = case.tensors(torch.float64)
    for name, a, b in zip(NAMES, run(p, "torch"), plain(p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


@implementations
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=str)
def test_filters_in_channels_last_memory_and_their_own_dtype(
    parameters: torch.dtype, impl: str, device: torch.device
) -> None:
    """Gradients come in the dtype and the strides of their parameters."""
    p = problem(device, torch.bfloat16)
    last = torch.channels_last
    p = p._replace(
        filters=[w.to(parameters, memory_format=last) for w in p.filters],
        biases=[b.float() for b in p.biases],
    )
    got = run(p, impl)
    check(p, got)
    for gradient, weight in zip(got[2:5], p.filters, strict=True):
        assert gradient.stride() == weight.stride()


@implementations
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_input_and_gradient_strides(layout: str, impl: str, device: torch.device) -> None:
    p = problem(device).laid_out(layout)
    check(p, run(p, impl))


@implementations
@pytest.mark.parametrize("position", range(7), ids=NAMES[1:])
def test_each_gradient_alone(position: int, impl: str, device: torch.device) -> None:
    """What is not needed comes back empty, what is needed comes back the same."""
    p = problem(device)
    everything = run(p, impl)[1:]
    with fi.record_launches() as some:
        got = run(p, impl, [i == position for i in range(7)])[1:]
    for i, (ours, full) in enumerate(zip(got, everything, strict=True)):
        if i == position:
            torch.testing.assert_close(ours, full, rtol=0, atol=0 if impl == "triton" else 1e-5)
        else:
            assert ours.numel() == 0
    kernels = {x.kernel for x in some}
    if impl == "triton":
        assert ("_naive_input_grad_kernel" in kernels) == (position == 0)
        assert ("_naive_wgrad_kernel" in kernels) == (1 <= position <= 3)
        assert ("_finish_kernel" in kernels) == (position > 0)


@needs_triton
def test_runs_are_bitwise_repeatable(device: torch.device) -> None:
    p = problem(device, dims=NaiveDims(8, 8, 8, 8), height=9, width=8)
    for first, second in zip(run(p), run(p), strict=True):
        assert torch.equal(first, second)


@needs_triton
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_launches(training: bool, device: torch.device) -> None:
    module = fi.InceptionNaive(*WIDTHS).to(device)
    x = problem(device).x
    names = [[], []]
    with fi.backend("triton"), torch.set_grad_enabled(training):
        with fi.record_launches() as launches:
            y = module(x.requires_grad_(training))
        names[0] = [launch.kernel for launch in launches]
        if training:
            with fi.record_launches() as launches:
                y.sum().backward()
            names[1] = [launch.kernel for launch in launches]
    assert names[0] == ["_pack_kernel", "_naive_conv_kernel", "_max_pool_fwd_kernel"]
    if training:
        assert names[1] == [
            "_relu_mask_kernel",
            "_pack_kernel",
            "_naive_input_grad_kernel",
            "_naive_wgrad_kernel",
            "_finish_kernel",
        ]


@needs_triton
def test_packed_filters_are_kept_until_one_changes(device: torch.device) -> None:
    module = fi.InceptionNaive(*WIDTHS).to(device)
    x = problem(device).x

    def kernels() -> list[str]:
        with fi.backend("triton"), torch.no_grad(), fi.record_launches() as launches:
            module(x)
        return [launch.kernel for launch in launches]

    assert "_pack_kernel" in kernels()
    assert "_pack_kernel" not in kernels()
    with torch.no_grad():
        module.branch3.conv.bias.add_(1)
    assert "_pack_kernel" in kernels()


@implementations
# the interpreter computes with NumPy, which warns of infinity times zero
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_pooling_follows_torch_with_ties_nan_and_infinity(impl: str, device: torch.device) -> None:
    """The pool branch forward, and where its gradient goes, also where the convolutions are NaN."""
    x = torch.randint(0, 3, (1, 8, 6, 6), generator=torch.Generator().manual_seed(3)).float()
    x[0, 0] = 1.0
    x[0, 1, 2, 2] = math.nan
    x[0, 2, 1, 1] = x[0, 2, 2, 3] = math.nan
    x[0, 3] = -math.inf
    x[0, 5, 0, 0] = math.inf
    dims = NaiveDims(8, 8, 8, 8)
    p = problem(device, dims=dims, batch=1, height=6, width=6)
    p = p._replace(x=x.to(device).contiguous(memory_format=torch.channels_last))
    p.dy[:, :24] = 0
    zeros = [torch.zeros_like(w) for w in p.filters]
    y = run(p, impl)[0]
    torch.testing.assert_close(y[:, 24:], reference.max_pool2d(p.x, 3, 1, 1), equal_nan=True)
    torch.testing.assert_close(y, plain(p)[0], equal_nan=True)
    dx = run(p._replace(filters=zeros), impl, [True] + [False] * 6)[1]
    leaf = p.x.clone().requires_grad_()
    (want,) = torch.autograd.grad(reference.max_pool2d(leaf, 3, 1, 1), leaf, p.dy[:, 24:])
    torch.testing.assert_close(dx, want)


@implementations
def test_nan_passes_relu_forward_and_backward(impl: str, device: torch.device) -> None:
    """A NaN output lets its gradient through; a closed gate stops even a NaN gradient."""
    p = problem(device, dims=NaiveDims(8, 8, 8, 8), batch=1)
    p.biases[0][:4] = math.nan  # output NaN
    p.biases[0][4:] = -1e6  # output 0
    p.dy[:, 4:8] = math.nan
    y, *gradients = run(p, impl)
    assert y[:, :4].isnan().all()
    assert not y[:, 4:8].any()
    db1 = gradients[4]
    torch.testing.assert_close(db1[:4], p.dy[:, :4].sum((0, 2, 3)))
    assert not db1[4:].any()
    assert all(g.isfinite().all() for g in gradients)


@needs_triton
@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("save", [False, True], ids=["forward", "training"])
def test_opcheck(batch: int, save: bool, device: torch.device) -> None:
    p = problem(device, dims=NaiveDims(8, 8, 8, 8), batch=batch, height=2, width=1)
    for t in (p.x, *p.filters, *p.biases):
        t.requires_grad_(save)
    torch.library.opcheck(inception_naive, (p.x, p.filters, p.biases, save))


@needs_triton
@pytest.mark.parametrize("every", [1, 2], ids=["all", "every-second"])
def test_opcheck_backward(every: int, device: torch.device) -> None:
    p = problem(device, dims=NaiveDims(8, 8, 8, 8), height=2, width=1)
    _, saved = inception_naive(p.x, p.filters, p.biases, True)
    needs = [i % every == 0 for i in range(7)]
    arguments = (p.dy, p.x, saved, p.filters, p.biases, needs)
    torch.library.opcheck(inception_naive_backward, arguments)


def test_gradcheck() -> None:
    p = problem(torch.device("cpu"), torch.float64, NaiveDims(3, 2, 2, 2), 2, 3, 2)
    # distinct values: differences across a tie of the pool are not gradients
    x = torch.randperm(p.x.numel()).double().view_as(p.x) / p.x.numel()
    leaves = [t.requires_grad_() for t in (x, *pairs(p))]
    assert torch.autograd.gradcheck(functional.inception_naive, leaves)


def test_double_backward_is_an_error() -> None:
    p = problem(torch.device("cpu"))
    x = p.x.requires_grad_()
    y = functional.inception_naive(x, *pairs(p))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward .*reference\.inception_naive"):
        dx.sum().backward()


def test_compile() -> None:
    """One graph forward and backward, and none anew where the batch changes twice."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.inception_naive, fullgraph=True, backend=graphs)

    def step(function: Callable[..., Tensor], p: InceptionTensors) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (p.x, *pairs(p))]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, p.dy)]

    for batch in (2, 3, 5):
        p = problem(torch.device("cpu"), torch.float64, batch=batch)
        results = (step(f, p) for f in (compiled, reference.inception_naive))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2  # batch 2, then any


@implementations
def test_autocast_casts_input_and_filters(impl: str, device: torch.device) -> None:
    """The whole output is narrow; PyTorch's pool, and so its concatenation, would stay fp32."""
    p = problem(device)
    p = p._replace(dy=p.dy.bfloat16())

    def narrow(x: Tensor, *parameters: Tensor) -> Tensor:
        return reference.inception_naive(x.bfloat16(), *parameters)

    def step(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in (p.x, *pairs(p))]
        with fi.backend(impl), torch.autocast(device.type, torch.bfloat16):
            y = function(*leaves)
        x, *rest = torch.autograd.grad(y, leaves, p.dy)
        return [y.detach(), x, *rest[::2], *rest[1::2]]

    got, baseline = step(functional.inception_naive), step(narrow)
    assert [t.dtype for t in got] == [torch.bfloat16, *[torch.float32] * 7]
    want = plain(p.to(torch.float64))
    for name, a, b, c in zip(NAMES, got, want, baseline, strict=True):
        assert_within(name, a, b, c, slack=2.0 if name == "y" else 3.0)


@needs_triton
def test_saved_for_backward(device: torch.device) -> None:
    """Bytes beside x, y and the parameters."""
    module = fi.InceptionNaive(*WIDTHS).to(device)
    x = problem(device).x.requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.data_ptr()] = t.nbytes
        return t

    with fi.backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    for known in (x, *module.parameters()):
        assert saved.pop(known.data_ptr())
    assert sum(saved.values()) == 2 * 4 * 3 * (16 + 32 // 8)


class TestModule:
    x = torch.rand(2, 16, 5, 4)

    def test_is_the_reference(self) -> None:
        ours, theirs = fi.InceptionNaive(*WIDTHS), reference.InceptionNaive(*WIDTHS)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]
        torch.testing.assert_close(ours(self.x), theirs(self.x))
        torch.testing.assert_close(copy.deepcopy(ours)(self.x), theirs(self.x))

    def test_print_tells_widths_and_path(self) -> None:
        module = fi.InceptionNaive(*WIDTHS, dtype=torch.float64)
        text = "16 -> 48 (1x1: 8, 3x3: 16, 5x5: 8, pool: 16), bias, relu, one fused operator"
        assert text in repr(module)
        assert repr(module).count("parameters of the fused module") == 3
        assert {p.dtype for p in module.parameters()} == {torch.float64}

    def test_a_hook_inside_makes_the_children_compute(self) -> None:
        module = fi.InceptionNaive(*WIDTHS)
        seen = []
        want = module(self.x)
        handle = module.branch2.conv.register_forward_hook(lambda *a: seen.append(a))
        torch.testing.assert_close(module(self.x), want)
        assert len(seen) == 1
        assert "branch2.conv has a hook" in repr(module)
        handle.remove()
        assert module.is_fused

    def test_the_reference_becomes_one_in_place_and_goes_back(self) -> None:
        module = reference.InceptionNaive(*WIDTHS)
        want, parameters = module(self.x), [*module.parameters()]
        report = fi.fuse_(module)
        assert report.fused == [""]
        assert type(module) is fi.InceptionNaive
        assert module.is_fused
        torch.testing.assert_close(module(self.x), want)
        assert all(p is q for p, q in zip(module.parameters(), parameters, strict=True))
        fi.unfuse_(module)
        assert type(module) is reference.InceptionNaive
        assert type(module.branch2) is reference.ConvBlock
        module.branch4 = torch.nn.MaxPool2d(5, stride=1, padding=2)
        assert "branch4 has kernel_size 5" in fi.fuse_(module).skipped[""]

    def test_widths(self) -> None:
        with pytest.raises(ValueError, match="widths must be at least 1"):
            fi.InceptionNaive(16, 8, 0, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(16, 3, 3)}, ValueError, "x must have 4 dimensions"),
        ({"w1": torch.zeros(8, 15, 1, 1)}, ValueError, r"w1 must be of shape \[C_out, 16, 1, 1\]"),
        ({"w3": torch.zeros(16, 16, 5, 5)}, ValueError, r"w3 must be of shape \[C_out, 16, 3, 3\]"),
        ({"w5": torch.zeros(8, 16, 3, 3)}, ValueError, r"w5 must be of shape \[C_out, 16, 5, 5\]"),
        ({"b3": torch.zeros(8)}, ValueError, r"b3 must be of shape \[16\], .* got \[8\]"),
        ({"w5": torch.zeros(8, 16, 5, 5).half()}, TypeError, "w5 must be float32, got float16"),
    ],
)
def test_wrong_arguments(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    p = problem(torch.device("cpu"))
    arguments = dict(zip(("w1", "b1", "w3", "b3", "w5", "b5"), pairs(p), strict=True))
    functional.inception_naive(p.x, **arguments)
    with pytest.raises(error, match=message):
        functional.inception_naive(**{"x": p.x, **arguments, **change})

"""Global average pool, alone and with dropout in one kernel: against torch's own, with torch's
generator."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fused_inception as fi
from fused_inception import functional, reference
from fused_inception.launches import record_launches
from fused_inception.ops import global_pool as ops
from fused_inception.ops import global_pool_triton
from tests.conftest import HAS_TRITON, implementations, needs_triton
from tests.tolerances import assert_within

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = {
    "googlenet": (2, 1024, 7, 7),
    "one-pixel": (3, 24, 1, 1),
    "odd": (1, 13, 5, 9),
    "more-pixels-than-a-tile": (1, 16, 13, 11),
    "empty-batch": (0, 16, 3, 3),
}


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype, memory_format=torch.channels_last)


def step(module: object, x: Tensor, p: float, *, seed: int = 5) -> list[Tensor]:
    """y and dx of a seed, for a gradient of all different numbers."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    y = module.global_avg_pool2d_dropout(x, p)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, x, dy)]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("share", [1.0, 0.6], ids=["alone", "dropout"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels(name: str, dtype: torch.dtype, share: float, device: torch.device) -> None:
    x = draw(SHAPES[name], dtype, device)
    n, c, h, w = x.shape
    kept = torch.rand(n, c, generator=torch.Generator().manual_seed(2)).to(device) < share
    drawn = (None if share == 1 else kept), 1 / share
    dy = draw((n, c, 1, 1), dtype, device)
    with record_launches() as launches:
        y = global_pool_triton.forward(x, *drawn)
        dx = global_pool_triton.backward(dy, *drawn, (n, c, h, w))
    assert len(launches) == (2 if n else 0)
    factor = kept[:, :, None, None]
    want = x.double().mean((2, 3), keepdim=True) * factor / share
    assert_within("y", y, want, x.mean((2, 3), keepdim=True) * factor / share)
    want, baseline = ((t * factor / share / (h * w)).expand(x.shape) for t in (dy.double(), dy))
    assert_within("dx", dx, want, baseline, slack=3.0)
    assert dx.stride() == (h * w * c, 1, w * c, c)


def test_any_strides_of_x_and_dy(device: torch.device) -> None:
    x, dy = (draw((2, 24, *sides), torch.float32, device) for sides in ((5, 6), (1, 1)))
    want = global_pool_triton.forward(x, None, 1.0)
    wide = torch.full((2, 40, 5, 6), torch.nan, device=device)
    wide[:, 3:27] = x
    for other in (x.contiguous(), wide[:, 3:27], x.transpose(2, 3)):
        torch.testing.assert_close(global_pool_triton.forward(other, None, 1.0), want)
    expanded = dy[:1, :1].expand(dy.shape)
    dx = global_pool_triton.backward(expanded, None, 1.0, tuple(x.shape))
    torch.testing.assert_close(dx, (expanded / 30).expand(x.shape))


def test_nan_stays_in_its_channel(device: torch.device) -> None:
    x = draw((2, 24, 3, 3), torch.float32, device)
    x[1, 5, 2, 0] = torch.nan
    y = global_pool_triton.forward(x, None, 1.0)
    assert y.isnan().nonzero().tolist() == [[1, 5, 0, 0]]


@implementations
@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_seed_drops_what_torch_drops(
    p: float, dtype: torch.dtype, impl: str, device: torch.device
) -> None:
    x = draw((3, 200, 4, 5), dtype, device)
    with fi.backend(impl):
        got, again = step(functional, x, p), step(functional, x, p)
        other = step(functional, x, p, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert p == 1 or not torch.equal(got[0] != 0, other[0] != 0)
    want, baseline = step(reference, x.double(), p), step(reference, x, p)
    assert torch.equal(got[0] != 0, baseline[0] != 0)
    for name, ours, exact, theirs in zip(("y", "dx"), got, want, baseline, strict=True):
        assert_within(name, ours, exact, theirs, slack=2.0 if name == "y" else 3.0)


@implementations
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": 0.4, "training": False}], ids=str)
def test_nothing_is_drawn_without_dropout(options: dict, impl: str, device: torch.device) -> None:
    x = draw((2, 24, 3, 5), torch.float32, device)
    state = torch.get_rng_state()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), fi.backend(impl):
        y = functional.global_avg_pool2d_dropout(x.requires_grad_(), **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert saved == []
    torch.testing.assert_close(y, x.mean((2, 3)))


@implementations
def test_saves_a_byte_a_feature(impl: str, device: torch.device) -> None:
    x = draw((2, 24, 3, 5), torch.float32, device).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t), fi.backend(impl):
        functional.global_avg_pool2d_dropout(x, 0.5)
    assert sum(t.nbytes for t in saved) == 2 * 24


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@implementations
def test_not_a_number_stays_where_it_is_dropped(impl: str, device: torch.device) -> None:
    x = draw((1, 64, 2, 2), torch.float32, device)
    x[0, ::3, 0, 1] = math.nan
    with fi.backend(impl):
        torch.manual_seed(0)
        got = functional.global_avg_pool2d_dropout(x, 0.5)
    torch.manual_seed(0)
    want = F.dropout(x.mean((2, 3)), 0.5)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got.isnan().sum() == 22


@implementations
def test_any_strides(impl: str, device: torch.device) -> None:
    x = draw((2, 24, 5, 6), torch.float32, device)
    with fi.backend(impl):
        want = step(functional, x, 0.5)
        for other in (x.contiguous(), F.pad(x, (0, 0, 0, 0, 3, 2))[:, 3:27]):
            for ours, theirs in zip(step(functional, other, 0.5), want, strict=True):
                torch.testing.assert_close(ours, theirs)


@needs_triton
def test_any_strides_of_what_is_kept(device: torch.device) -> None:
    x = draw((2, 24, 5, 6), torch.float32, device)
    kept = torch.tensor([[True], [False]], device=device).expand(2, 24)
    y = ops.global_avg_pool2d(x, kept, 2.0)
    torch.testing.assert_close(y[0, :, 0, 0], 2 * x[0].mean((1, 2)))
    assert not y[1].any()


@needs_triton
@pytest.mark.parametrize("shape", [(2, 13, 3, 4), (0, 5, 4, 3), (1, 1, 1, 1)], ids=str)
def test_operator_passes_opcheck(shape: tuple[int, ...], device: torch.device) -> None:
    x = draw(shape, torch.float32, device).requires_grad_()
    n, c, _, _ = shape
    kept = torch.arange(n * c, device=device).view(n, c) % 3 > 0
    for drop in ((kept, 1.5), (None, 1.0)):
        torch.library.opcheck(ops.global_avg_pool2d, (x, *drop))
        dy = torch.randn(n, c, 1, 1, device=device)
        torch.library.opcheck(ops.global_avg_pool2d_backward, (dy, *drop, shape))


def test_gradcheck_in_fp64() -> None:
    x = draw((2, 5, 3, 4), torch.float64, torch.device("cpu")).requires_grad_()

    def seeded(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return functional.global_avg_pool2d_dropout(x, 0.4)

    assert torch.autograd.gradcheck(seeded, x, fast_mode=True)


@implementations
def test_compiles_into_one_graph(impl: str, device: torch.device) -> None:
    x = draw((2, 24, 3, 5), torch.float32, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: functional.global_avg_pool2d_dropout(x, 0.5), backend=counter, fullgraph=True
    )
    with fi.backend(impl):
        torch.manual_seed(3)
        got = compiled(x.requires_grad_())
        torch.manual_seed(3)
        want = functional.global_avg_pool2d_dropout(x, 0.5)
    assert counter.frame_count == 1
    torch.testing.assert_close(got, want)
    (dx,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(want.sum(), x)[0])


def test_what_follows_may_work_in_place(device: torch.device) -> None:
    x = draw((2, 8, 3, 3), torch.float32, device).requires_grad_()
    layers = torch.nn.Sequential(
        fi.GlobalAvgPool2d(), torch.nn.Flatten(), torch.nn.Dropout(0.5, inplace=True)
    )
    for backend in ("torch", "triton"):
        with fi.backend(backend):
            layers(x).sum().backward()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_wrong_probability(p: float) -> None:
    with pytest.raises(ValueError, match="p must be between 0 and 1, got"):
        functional.global_avg_pool2d_dropout(torch.zeros(1, 1, 2, 2), p)


@pytest.mark.skipif(not HAS_TRITON, reason="launches need Triton")
@pytest.mark.parametrize("changed", ["nothing", "avgpool", "dropout", "eval"])
def test_network_drops_in_the_kernel_of_the_pool(
    changed: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a hook looks at one of the two; with the same result."""
    network = fi.googlenet("paper", num_classes=3, aux_logits=False).to(device)
    modules = ("avgpool", "dropout", "fc")
    x = draw((2, 1024, 2, 2), torch.float32, device)
    # all that stands in front of the pool gives x
    for name, module in network.named_children():
        if name not in modules:
            monkeypatch.setattr(module, "forward", lambda *a: x)
    monkeypatch.setattr("fused_inception.nn.googlenet.stem", lambda *a: x)
    seen: list[object] = []
    if changed in modules:
        network.get_submodule(changed).register_forward_hook(lambda *a: seen.append(a))
    network.train(changed != "eval")
    torch.manual_seed(9)
    with fi.backend("triton"), record_launches() as launches:
        logits = network(torch.zeros(1, 3, 64, 64, device=device))
    assert len(seen) == (changed in modules)
    assert [dict(launch.config)["DROPOUT"] for launch in launches] == [changed == "nothing"]
    torch.manual_seed(9)
    features = F.dropout(x.mean((2, 3)), 0.4, changed != "eval")
    torch.testing.assert_close(logits, network.fc(features))

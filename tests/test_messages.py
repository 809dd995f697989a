"""What is said of a wrong call, where users see it."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import fused_inception as fi

WIDTHS = (16, 8, 8, 8, 8, 8, 8)


def test_what_is_wrong_with_an_input_is_said_of_it() -> None:
    module = fi.Inception(*WIDTHS)
    with pytest.raises(ValueError, match=r"got \[8, 16, 1, 1\]; x has 15 channels"):
        module(torch.rand(2, 15, 4, 4))
    with pytest.raises(TypeError, match="w1 must be float64, got float32; x is float64"):
        module(torch.rand(2, 16, 4, 4).double())
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got NoneType"):
        module(None)
    network = fi.googlenet("paper", num_classes=3, image_size=96)
    with pytest.raises(ValueError, match=r"; x has 1 channels"):
        network(torch.rand(1, 1, 96, 96))
    with pytest.raises(ValueError, match=r"a map of 4x4 gives 128 features, and fc1 takes 512"):
        network(torch.rand(1, 3, 64, 64))


F = fi.functional
X, W, B = torch.rand(1, 8, 6, 6), torch.rand(8, 8, 1, 1), torch.rand(8)
MODULE = [t for side in (1, 1, 3, 1, 3, 1) for t in (torch.rand(8, 8, side, side), B)]
STEM = [torch.rand(8, 8, 3, 3), B, W, B, torch.rand(8, 8, 3, 3), B]


def but(parameters: list[torch.Tensor], place: int, value: Any = None) -> list[Any]:
    return [*parameters[:place], value, *parameters[place + 1 :]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.conv2d_relu(X, W, None), "bias must be a torch.Tensor, got NoneType"),
        (lambda: F.conv2d_relu(X, [W], B), "weight must be a torch.Tensor, got list"),
        (lambda: F.conv2d_relu(X, W, B, (1, 1)), r"stride must be an integer, got \(1, 1\)"),
        (lambda: F.conv2d_relu(X, W, B, 1.0), "stride must be an integer, got 1.0"),
        (lambda: F.conv2d_relu(X, W, B, padding="same"), "padding must be an integer, got 'same'"),
        (lambda: F.inception(X, *but(MODULE, 1)), "b1 must be a torch.Tensor, got NoneType"),
        (lambda: F.inception(X, *but(MODULE, 2)), "w3r must be a torch.Tensor, got NoneType"),
        (lambda: F.inception(X, *but(MODULE, 8, "w")), "w5 must be a torch.Tensor, got str"),
        (lambda: F.inception_trunk(X, [but(MODULE, 3)], pools={}), "module 0: b3r must be a torch"),
        (lambda: F.googlenet_stem(X, *but(STEM, 2)), "w2 must be a torch.Tensor, got NoneType"),
        (lambda: F.googlenet_stem(X, *STEM, stride=2.0), "stride must be an integer, got 2.0"),
        (lambda: F.parallel_conv1x1_relu(X, [W, None], [B, B]), "weight must be a torch.Tensor"),
        (lambda: F.parallel_conv1x1_relu(X, W, [B]), "weights must be a list or tuple, got Tensor"),
        (lambda: F.max_pool2d(X, 3.0), "kernel_size must be an integer, got 3.0"),
        (lambda: F.max_pool2d(X, None), "kernel_size must be an integer, got None"),
        (lambda: F.max_pool2d(X, 3, (2, 2.5)), "stride must be an integer, got 2.5"),
        (lambda: F.local_response_norm(X, 5.0), "size must be an integer, got 5.0"),
        (
            lambda: F.adaptive_avg_pool2d_conv1x1_relu(X, W, B, (4, 4)),
            r"output_size must be an integer, got \(4, 4\)",
        ),
        (lambda: F.conv2d_bn_relu(X, W, B, "v", B, B), "running_vars must be a torch.Tensor, got"),
        (lambda: F.conv2d_bn_relu(X, W, B, B, B, B, stride="1"), "stride must be an integer"),
        (lambda: fi.precompile(None, X), "model must be a torch.nn.Module, got NoneType"),
        (lambda: fi.precompile(torch.nn.Identity(), "x"), "x must be a torch.Tensor, got str"),
        (lambda: fi.graphed(None, X), "model must be a torch.nn.Module, got NoneType"),
    ],
)  # fmt: skip
def test_what_is_no_tensor_and_no_number(call: Any, message: str) -> None:
    """Also behind calls that were right."""
    F.conv2d_relu(X, W, B, 1)
    F.inception(X, *MODULE)
    F.max_pool2d(X, 3)
    F.local_response_norm(X, 5)
    with pytest.raises(TypeError, match=message):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    three, one = np.int64(3), np.int32(1)
    torch.testing.assert_close(F.max_pool2d(X, three, one), F.max_pool2d(X, 3, 1))
    torch.testing.assert_close(F.conv2d_relu(X, W, B, one), F.conv2d_relu(X, W, B))
    norm = F.local_response_norm(X, three)
    torch.testing.assert_close(norm, F.local_response_norm(X, 3))


def test_sparse_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must be a dense tensor, got the layout torch.sparse"):
        F.global_avg_pool2d(X.to_sparse())


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 4, 64, 64), (3, 64, 64)])
@pytest.mark.parametrize("library", [fi, fi.reference])
def test_images_to_transform_have_three_channels(library: Any, shape: tuple[int, ...]) -> None:
    network = library.googlenet(
        "torchvision", num_classes=2, aux_logits=False, transform_input=True, init_weights=False
    )
    with pytest.raises(ValueError, match=r"x must be of shape \[N, 3, H, W\], got"):
        network(torch.rand(shape))


@pytest.mark.parametrize(
    ("variant", "train", "smallest"),
    [("paper", False, 31), ("paper", True, 47), ("torchvision", False, 15)],
)
def test_images_that_are_too_small(variant: str, train: bool, smallest: int) -> None:
    """The network says how large they have to be, unless its layers are not its own any more."""
    network = fi.googlenet(variant, num_classes=2, image_size=47, init_weights=False).train(train)
    network(torch.rand(2, 3, smallest, smallest))
    message = f"are too small: .* network takes {smallest}x{smallest} or more"
    for height, width in ((smallest - 1, smallest), (smallest, smallest - 1), (smallest, 4)):
        with pytest.raises(ValueError, match=f"^images of {height}x{width} {message}"):
            network(torch.rand(2, 3, height, width))
    network.maxpool3 = torch.nn.Identity()
    network.eval()(torch.rand(2, 3, smallest - 1, smallest - 1))
    network.maxpool3 = fi.MaxPool2d(9)
    with pytest.raises(ValueError, match=r"a window of 9 .* the map to pool is 6x8, larger images"):
        network(torch.rand(2, 3, 48, 64))


@pytest.mark.parametrize("call", [fi.fuse_, fi.unfuse_], ids=lambda call: call.__name__)
def test_no_module_to_change(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        call(3)


@pytest.mark.parametrize("call", [fi.verify, fi.explain], ids=lambda call: call.__name__)
def test_no_module_to_look_at(call: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        call(3, torch.zeros(1, 3, 8, 8))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_tangents_are_not_dropped(norm: str | None, train: bool) -> None:
    """Forward-mode differentiation of a frozen module, where no gradient is recorded."""
    module = fi.Inception(*WIDTHS, norm=norm).train(train).requires_grad_(False)
    x = torch.rand(2, 16, 4, 4)
    with fi.backend("triton"), forward_ad.dual_level():
        module(x)
        with pytest.raises(RuntimeError, match="forward-mode differentiation is not implemented"):
            module(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_of_torch_func_say_what_to_do(norm: str | None, backend: str) -> None:
    module = fi.Inception(*WIDTHS, norm=norm)

    def total(x: torch.Tensor) -> torch.Tensor:
        return module(x).sum()

    message = r"torch.func's .* are not implemented for fused_inception.*unfuse_ the model"
    with fi.backend(backend), pytest.raises(RuntimeError, match=message):
        torch.func.grad(total)(torch.rand(2, 16, 4, 4))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("what", ["nchw", "channels last", "parameters", "gradients"])
def test_vmap_says_what_to_do(norm: str | None, backend: str, what: str) -> None:
    """Wherever it meets the first thing that has no rule: a layout, an operator, a gradient."""
    module = fi.Inception(*WIDTHS, norm=norm).eval().requires_grad_(what == "gradients")
    x = torch.rand(2, 2, 4, 4, 16).movedim(4, 2)
    call: Any = torch.func.vmap(module)
    arguments: tuple[Any, ...] = (x.contiguous() if what == "nchw" else x,)
    if what == "parameters":
        call = torch.func.vmap(
            lambda p, x: torch.func.functional_call(module, p, (x,)), in_dims=(0, None)
        )
        arguments = {name: torch.stack([p, p]) for name, p in module.named_parameters()}, x[0]
    with fi.backend(backend), pytest.raises(RuntimeError, match=r"vmap.*unfuse_ the model first"):
        call(*arguments)


def test_how_large_filters_of_images_may_be_is_said() -> None:
    """9x9 of 3 channels has 243 weights and a kernel, of 4 channels 324 and none."""
    path = "PyTorch's operators: kernel 9, .* with at most 256 weights a filter"
    assert re.search(path, repr(fi.ConvBlock(4, 8, kernel_size=9)))
    assert not re.search(path, repr(fi.ConvBlock(3, 8, kernel_size=9)))


def test_errors_of_a_copy_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def contiguous(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        fi.functional.max_pool2d(torch.rand(1, 2, 4, 4), 2)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripting_says_what_to_do() -> None:
    layers = [torch.nn.Conv2d(3, 16, 1), fi.reference.Inception(*WIDTHS), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers)
    fi.fuse_(model)
    own = fi.googlenet("torchvision", num_classes=2, init_weights=False)
    for module, way in ((model, "unfuse_ the model first"), (own, "torch.compile can")):
        with pytest.raises(RuntimeError, match=f"torch.jit.script cannot compile .* {way}"):
            torch.jit.script(module)
    fi.unfuse_(model)
    torch.jit.script(model[:1])
    assert [*model] == layers


def test_tracing_by_fx_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"got Proxy: unfuse_ the model before torch.fx traces it"):
        torch.fx.symbolic_trace(fi.Inception(*WIDTHS))

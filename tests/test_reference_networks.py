"""The reference networks against the published counts, shapes and names."""

import math

import pytest
import torch
from torch import Tensor, nn

from fused_inception import reference
from fused_inception.geometry import VARIANTS
from tests.facts import FACTS, MODULES

CHILDREN = [
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b", "aux1", "aux2", "avgpool", "dropout", "fc"),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters(variant: str) -> None:
    want = FACTS["parameters"][variant]
    main = reference.googlenet(variant, aux_logits=False, device="meta")
    assert parameters(main) == want["main"]
    assert parameters(reference.googlenet(variant, device="meta")) == want["with_aux"]


def test_parameters_of_the_papers_heads() -> None:
    model = reference.googlenet(device="meta")
    heads = [parameters(model.aux1), parameters(model.aux2)]
    assert heads == FACTS["parameters"]["paper_aux"]


def run_on_meta(model: nn.Module, image_size: int) -> dict[str, tuple[Tensor, int]]:
    """Every layer's output and its multiply-adds, by name, without computing a number."""
    seen: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            weight = module.weight if isinstance(module, nn.Conv2d | nn.Linear) else None
            each = 0 if weight is None else weight[0].numel()
            seen[name] = output, output.numel() * each

        model.get_submodule(name).register_forward_hook(hook)

    for name, _ in model.named_modules():
        if name:
            watch(name)
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return seen


@pytest.mark.parametrize("variant", FACTS["multiply_adds"])
def test_multiply_adds(variant: str) -> None:
    seen = run_on_meta(reference.googlenet(variant, device="meta").eval(), 224)
    assert sum(count for _, count in seen.values()) == FACTS["multiply_adds"][variant]


@pytest.mark.parametrize(("variant", "form"), [("paper", "5x5"), ("torchvision", "3x3")])
def test_multiply_adds_of_the_modules(variant: str, form: str) -> None:
    seen = run_on_meta(reference.googlenet(variant, device="meta").eval(), 224)
    for name, fact in MODULES.items():
        inside = [n for key, (_, n) in seen.items() if key.startswith(f"inception{name}.")]
        assert sum(inside) == fact[f"multiply_adds_{form}"], name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("image_size", [224, 225, 299, 96, 64])
def test_shapes(variant: str, image_size: int) -> None:
    model = reference.googlenet(variant, num_classes=7, image_size=image_size, device="meta")
    seen = run_on_meta(model.train(), image_size)
    shapes = {name: tuple(output.shape) for name, (output, _) in seen.items()}
    sides = FACTS["sizes"][str(image_size)]
    for layer, side in zip(["conv1", *(f"maxpool{i}" for i in range(1, 5))], sides, strict=True):
        assert shapes[layer][2:] == (side, side), layer
    for name, fact in MODULES.items():
        side = sides[int(name[0]) - 1]
        assert shapes[f"inception{name}"] == (1, fact["out_channels"], side, side)
    assert shapes["avgpool"] == (1, 1024, 1, 1)
    assert shapes["aux1"] == shapes["aux2"] == shapes["fc"] == (1, 7)


@pytest.mark.parametrize("variant", ["torchvision", "torchvision5x5"])
def test_state_dict_is_torchvisions(variant: str) -> None:
    state = reference.googlenet(variant, device="meta").state_dict()
    want = dict(FACTS["torchvision_state_dict"])
    if variant == "torchvision5x5":
        for name in MODULES:
            key = f"inception{name}.branch3.1.conv.weight"
            want[key] = [*want[key][:2], 5, 5]
    assert {key: list(value.shape) for key, value in state.items()} == want
    assert list(state) == list(want)


def test_papers_state_dict_has_biases_for_batch_norm() -> None:
    want = []
    for key in FACTS["torchvision_state_dict"]:
        if ".bn." not in key:
            want.append(key)
        elif key.endswith(".bn.bias"):
            want.append(key.replace(".bn.", ".conv."))
    assert list(reference.googlenet(device="meta").state_dict()) == want


@pytest.mark.parametrize("variant", ["torchvision", "torchvision5x5"])
def test_children_are_torchvisions(variant: str) -> None:
    model = reference.googlenet(variant, device="meta")
    assert [name for name, _ in model.named_children()] == CHILDREN


def test_papers_children() -> None:
    model = reference.googlenet(device="meta")
    names = [name for name, _ in model.named_children()]
    assert [name for name in names if not name.startswith("norm")] == CHILDREN
    assert names[1:3] == ["maxpool1", "norm1"]
    assert names[4:7] == ["conv3", "norm2", "maxpool2"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs(variant: str) -> None:
    model = reference.googlenet(variant, num_classes=5, image_size=64)
    seen = {}
    for name in ("aux1", "aux2", "fc"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, i, output, name=name: seen.update({name: output}))
    x = torch.randn(2, 3, 64, 64)
    outputs = model.train()(x)
    assert isinstance(outputs, reference.GoogLeNetOutputs)
    assert outputs.logits is seen["fc"]
    assert outputs.aux_logits2 is seen["aux2"]
    assert outputs.aux_logits1 is seen["aux1"]
    assert outputs._fields == ("logits", "aux_logits2", "aux_logits1")
    assert isinstance(model.eval()(x), Tensor)
    assert isinstance(reference.googlenet(variant, aux_logits=False).train()(x), Tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant: str, dtype: torch.dtype) -> None:
    # the paper's heads need 47 pixels; training reaches every layer
    model = reference.googlenet(variant, num_classes=5, image_size=47, dtype=dtype)
    outputs = model.train()(torch.randn(2, 3, 47, 47, dtype=dtype))
    sum(output.sum() for output in outputs).backward()
    for output in outputs:
        assert output.dtype == dtype
        assert torch.isfinite(output).all()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_paper_initialisation() -> None:
    model = reference.googlenet(num_classes=100)
    classifiers = (model.fc, model.aux1.fc2, model.aux2.fc2)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            std = 0.01 if layer in classifiers else math.sqrt(2 / layer.weight[0].numel())
            # the estimate of a deviation from n numbers is off by std / sqrt(2 n)
            spread = 5 / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(std, rel=spread)
            assert not layer.bias.any()


def test_torchvision_initialisation() -> None:
    for layer in reference.googlenet("torchvision", num_classes=100).modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            spread = 5 / math.sqrt(2 * layer.weight.numel())
            assert layer.weight.std().item() == pytest.approx(0.01, rel=spread)


@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_without_initialisation_layers_keep_pytorchs(variant: str) -> None:
    torch.manual_seed(3)
    first = reference.googlenet(variant, init_weights=False, aux_logits=False).conv1.conv
    torch.manual_seed(3)
    plain = nn.Conv2d(3, 64, 7, bias=variant == "paper")
    torch.testing.assert_close(first.weight, plain.weight, rtol=0, atol=0)


def test_transform_input_changes_the_normalisation() -> None:
    pixels = torch.rand(2, 3, 64, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = reference.googlenet("torchvision", num_classes=5, transform_input=True).eval()
    transformed = model((pixels - mean) / std)
    model.transform_input = False
    torch.testing.assert_close(transformed, model((pixels - 0.5) / 0.5))


@pytest.mark.parametrize(("variant", "main"), [("paper", 0.4), ("torchvision", 0.2)])
def test_dropout(variant: str, main: float) -> None:
    model = reference.googlenet(variant, device="meta")
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (main, 0.7, 0.7)
    model = reference.googlenet(variant, dropout=0.0, dropout_aux=0.1, device="meta")
    assert (model.dropout.p, model.aux1.dropout.p, model.aux2.dropout.p) == (0.0, 0.1, 0.1)


def test_errors() -> None:
    with pytest.raises(ValueError, match="variant must be one of paper, torchvision"):
        reference.googlenet("caffe")
    with pytest.raises(ValueError, match="at least 47 with the paper's heads, got 46"):
        reference.googlenet(image_size=46)


def test_smallest_images() -> None:
    reference.googlenet(aux_logits=False, image_size=46, device="meta")
    run_on_meta(reference.googlenet(aux_logits=False, device="meta").eval(), 31)
    run_on_meta(reference.googlenet("torchvision", device="meta").eval(), 15)
    model = reference.googlenet("torchvision", num_classes=5).train()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        model(torch.randn(1, 3, 46, 46))

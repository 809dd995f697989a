"""Training: losses and weights of some dozens of steps coincide with plain PyTorch's, within noise.

The truth is the curve of the reference in fp64. Noise is how far plain PyTorch itself strays from
it in fp32 when nothing but roundings changes, here by the memory format of its filters: two runs
that are equally right. Step after step gates and arg-maxima that flip between two roundings amplify
it, so one such run alone would say too little of the next.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import reference
from tests.conftest import needs_triton
from tests.torchvision_import import import_torchvision

CLASSES = 4
SLACK = 3.0
WEIGHTS = (1.0, 0.3, 0.3)  # logits, aux_logits2, aux_logits1: the paper's objective
FORMATS = (torch.contiguous_format, torch.channels_last)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Curve:
    """What one training left behind, in fp64."""

    losses: Tensor  # [steps]
    weights: Tensor  # all parameters and running statistics behind the last step

    def distance(self, other: "Curve") -> dict[str, float]:
        """Relative L2 distances; the first losses see one update, with no noise amplified yet."""
        pairs = {
            "first losses": (self.losses[:2], other.losses[:2]),
            "losses": (self.losses, other.losses),
            "weights": (self.weights, other.weights),
        }
        return {name: ((a - b).norm() / b.norm()).item() for name, (a, b) in pairs.items()}


@dataclass(frozen=True)
class Training:
    """A fixed data set, fixed initial weights and plain SGD with momentum."""

    start: dict[str, Tensor]
    side: int
    batch: int
    steps: int
    learning_rate: float

    def run(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        device: torch.device = CPU,
    ) -> Curve:
        """Train `network` from the start."""
        network.load_state_dict(self.start)
        network.to(device, dtype, memory_format=memory_format)
        images, labels = (t.to(device) for t in self.data())
        optimiser = torch.optim.SGD(network.parameters(), self.learning_rate, momentum=0.9)
        losses = []
        for step in range(self.steps):
            # the data set is two batches, in turn
            batch = slice(step % 2 * self.batch, (step % 2 + 1) * self.batch)
            outputs = network(images[batch].to(dtype))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            loss = sum(
                weight * nn.functional.cross_entropy(logits, labels[batch])
                for weight, logits in zip(WEIGHTS, outputs, strict=False)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        state = network.state_dict().values()
        weights = [t.double().flatten() for t in state if t.is_floating_point()]
        return Curve(torch.tensor(losses, dtype=torch.float64), torch.cat(weights).cpu())

    def data(self) -> tuple[Tensor, Tensor]:
        """Two batches of images, each a coarse pattern of its class behind noise, and labels."""
        draw = torch.Generator().manual_seed(1)
        labels = torch.arange(2 * self.batch) % CLASSES
        patterns = torch.randn(CLASSES, 3, 6, 6, generator=draw)
        noise = torch.randn(2 * self.batch, 3, self.side, self.side, generator=draw)
        return nn.functional.interpolate(patterns, size=self.side)[labels] + 0.5 * noise, labels


def assert_coincides(got: Curve, want: Curve, own: list[Curve]) -> None:
    """`got` is as near to `want` as plain PyTorch's `own` curves are, times SLACK, and learns."""
    assert want.losses[-1] < want.losses[0] / 4
    found, noise = got.distance(want), [curve.distance(want) for curve in own]
    for name, distance in found.items():
        allowed = SLACK * max(n[name] for n in noise) + 4 * torch.finfo(torch.float32).eps
        assert distance <= allowed, f"{name}: {distance:.2e} from fp64, allowed {allowed:.2e}"
        # noise so large would hide an error
        assert allowed < 0.05, f"{name}: {allowed:.2e} is allowed"


def test_the_paper_network_learns_as_the_reference_does() -> None:
    """Every classifier and every parameter, through ATen."""
    options: dict[str, Any] = {
        "num_classes": CLASSES, "image_size": 48, "dropout": 0.0, "dropout_aux": 0.0,
    }  # fmt: skip
    start = reference.googlenet("paper", **options).state_dict()
    training = Training(start, side=48, batch=8, steps=24, learning_rate=0.002)

    def network(make: Callable[..., nn.Module]) -> nn.Module:
        return make("paper", init_weights=False, **options)

    want = training.run(network(reference.googlenet), torch.float64)
    own = [training.run(network(reference.googlenet), torch.float32, form) for form in FORMATS]
    with fi.backend("torch"):
        got = training.run(network(fi.googlenet), torch.float32)
    assert_coincides(got, want, own)


def with_open_gates(network: nn.Module) -> nn.Module:
    """Most of those behind BatchNorms: where half of them flip, noise of 57 layers hides all."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.bias)
    return network


def test_torchvisions_network_learns_as_before() -> None:
    """BatchNorm's batch statistics in training, behind `fuse_`, through ATen."""
    googlenet = import_torchvision("torchvision.models.googlenet").googlenet

    def network() -> nn.Module:
        options = {"num_classes": CLASSES, "dropout": 0.0, "dropout_aux": 0.0}
        return with_open_gates(googlenet(init_weights=False, **options))

    training = Training(network().state_dict(), side=48, batch=4, steps=24, learning_rate=0.005)
    want = training.run(network(), torch.float64)
    own = [training.run(network(), torch.float32, form) for form in FORMATS]
    fused = network()
    fi.fuse_(fused, strict=True)
    with fi.backend("torch"):
        got = training.run(fused, torch.float32)
    assert_coincides(got, want, own)


def small_network(library: Any, norm: str | None) -> nn.Module:
    """A convolution of images, an Inception module, the head."""
    return with_open_gates(
        nn.Sequential(
            library.ConvBlock(3, 8, kernel_size=3, stride=2, padding=1, norm=norm),
            library.Inception(8, 8, 8, 8, 8, 8, 8, norm=norm),
            library.GlobalAvgPool2d(),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )
    )


# with BatchNorm fewer steps: each launches twice as many kernels, and learns faster
CURVES: dict[str | None, tuple[int, float, dict[str, int]]] = {
    None: (24, 0.1, {"_gradients_kernel": 1}),
    "batch": (
        12, 0.05,
        {"_gradients_kernel": 1, "_batch_statistics_kernel": 2, "_normalise_kernel": 3,
         "_norm_grad_kernel": 2, "_reduce_norm_grad_kernel": 1},
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.usefixtures("few_large_tiles")
@pytest.mark.parametrize("norm", CURVES)
def test_the_kernels_learn_as_the_reference_does(norm: str | None, device: torch.device) -> None:
    """The same with the kernels: filters are packed anew behind each step of the optimiser, and
    running statistics, where there are any, follow."""
    steps, learning_rate, launched = CURVES[norm]

    def network(library: Any) -> nn.Module:
        return small_network(library, norm)

    start = network(reference).state_dict()
    training = Training(start, side=6, batch=4, steps=steps, learning_rate=learning_rate)
    want = training.run(network(reference), torch.float64)
    own = [training.run(network(reference), torch.float32, form) for form in FORMATS]
    with fi.backend("triton"), fi.record_launches() as launches:
        got = training.run(network(fi), torch.float32, device=device)
    kernels = Counter(launch.kernel for launch in launches)
    assert {name: kernels[name] for name in launched} == {
        name: steps * count for name, count in launched.items()
    }
    assert_coincides(got, want, own)

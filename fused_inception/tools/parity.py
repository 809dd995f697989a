"""The fused network beside the plain-PyTorch one: do they agree, and how fast is each?"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception import reference
from fused_inception.ops.problem import allows_tf32
from fused_inception.tools.loop import AMP_DTYPES, autocast, objective, placed
from fused_inception.tools.precompile import precompile
from fused_inception.tools.timing import now
from fused_inception.tools.verify import verify

# the fused network may differ from the plain one by this many times the plain one's own rounding
# error, plus a floor: one ReLU or arg-max that flips between two roundings moves the gradients
SLACK = 4.0
# where rounding alone moves plain PyTorch further than this, a difference may be rounding too
NOISE = 0.05
# a power of two changes no relative distance and keeps gradients in fp16 from vanishing
GRADIENT_SCALE = 1024.0
SPEED_SECONDS = 6.0
FLOORS = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Parity:
    """Relative L2 distances of logits and of all gradients together, and the yardstick for them.

    blocks_agree: whether every fused block by itself gives the gradients that it should, where that
    was asked.
    """

    images: int
    mode: str
    logits: float
    gradients: float
    own_logits: float
    own_gradients: float
    blocks_agree: bool | None = None

    @property
    def verdict(self) -> str:
        """Whether fused and plain network are as close as two roundings of one computation."""
        logits = self._of(self.logits, self.own_logits)
        gradients = self._of(self.gradients, self.own_gradients)
        if self.blocks_agree and gradients == "FAILED" and logits == "ok":
            gradients = "inconclusive, single ReLUs or maxima flip; every block by itself agrees"
        found = [logits, gradients]
        return "FAILED" if "FAILED" in found else next((of for of in found if of != "ok"), "ok")

    @property
    def gradients_alone_differ(self) -> bool:
        """One flip of a ReLU or maximum, which logits hardly show, may do that."""
        return self._of(self.logits, self.own_logits) == "ok" and self.verdict == "FAILED"

    def _of(self, distance: float, own: float) -> str:
        if distance <= SLACK * min(own, NOISE) + FLOORS[self.mode]:
            return "ok"
        if own <= NOISE:
            return "FAILED"
        return "inconclusive, rounding alone moves plain PyTorch that far"

    def __str__(self) -> str:
        return (
            f"parity in {self.mode}, fused against plain PyTorch on {self.images} test images: "
            f"logits {self.logits:.1e}, gradients {self.gradients:.1e} (relative L2; plain PyTorch "
            f"against fp64: {self.own_logits:.1e}, {self.own_gradients:.1e}): {self.verdict}"
        )


def modes(device: torch.device, amp: str) -> list[str]:
    """fp32 without TF32, where rounding blurs least, and what training with `--amp` computes in."""
    tf32 = device.type == "cuda" and allows_tf32()
    trained = amp if amp != "off" else "tf32" if tf32 else "fp32"
    return ["fp32"] if trained == "fp32" else ["fp32", trained]


def reference_of(model: nn.Module, network: dict[str, Any]) -> nn.Module:
    """The plain-PyTorch network with a copy of the weights of `model`, on its device.

    `network` holds the arguments of `googlenet` that made `model`.
    """
    twin = reference.googlenet(**network, init_weights=False)
    twin.load_state_dict(model.state_dict(), strict=True)
    return placed(twin, next(model.parameters()).device)


def compare(
    model: nn.Module, network: dict[str, Any], x: Tensor, labels: Tensor, mode: str
) -> Parity:
    """Logits and gradients of the training loss, without dropout, for one batch x [N, 3, S, S].

    `model` stays as it is: copies do the work. A float64 network on the CPU is the yardstick. Where
    gradients differ and logits do not, every block is verified by itself.
    """
    plain = reference_of(model, network)
    exact = copy.deepcopy(plain).cpu().double()
    amp = mode if mode in AMP_DTYPES else "off"
    with _tf32(mode != "fp32"):
        fused = copy.deepcopy(model).train()
        with autocast(x.device, amp):
            # few images, in types of their own: one by one their kernels would take minutes
            precompile(fused, x)
        got = _logits_and_gradients(fused, x, labels, amp)
        own = _logits_and_gradients(plain, x, labels, amp)
    want = _logits_and_gradients(exact, x.cpu().double(), labels.cpu(), "off")
    found = Parity(
        images=len(x),
        mode=mode,
        logits=_distance(got[0], own[0]),
        gradients=_distance(got[1], own[1]),
        own_logits=_distance(own[0], want[0]),
        own_gradients=_distance(own[1], want[1]),
    )
    if found.gradients_alone_differ:
        with _tf32(mode != "fp32"), autocast(x.device, amp):
            blocks = verify(fused, x).blocks
        agree = all(block.verdict != "FAILED" for block in blocks)
        found = replace(found, blocks_agree=agree)
    return found


def training_speed(
    model: nn.Module, network: dict[str, Any], x: Tensor, labels: Tensor, amp: str
) -> dict[str, float]:
    """Images per second of the fused and the plain-PyTorch network, median of training steps.

    Copies of `model` take turns for SPEED_SECONDS in all, on one batch x [N, 3, S, S].
    """
    models = {"fused": copy.deepcopy(model), "reference": reference_of(model, network)}
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=1e-4) for name, m in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model.train()
    end = 0.0
    while not end or time.perf_counter() < end or len(times["fused"]) < 2:
        for name, model in models.items():
            start = now(x.device)
            with autocast(x.device, amp):
                loss, _, _ = objective(model(x), labels)
            optimizers[name].zero_grad(set_to_none=True)
            loss.backward()
            optimizers[name].step()
            times[name].append(now(x.device) - start)
        if not end:  # the first round warms up
            times = {name: [] for name in models}
            end = time.perf_counter() + SPEED_SECONDS
    return {name: len(x) / sorted(t)[len(t) // 2] for name, t in times.items()}


def _logits_and_gradients(
    model: nn.Module, x: Tensor, labels: Tensor, amp: str
) -> tuple[Tensor, Tensor]:
    """On the CPU in float64; `model` is a copy that nobody else uses."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with autocast(x.device, amp):
        loss, _, logits = objective(model(x), labels)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(GRADIENT_SCALE * loss, parameters)
    flat = torch.cat([g.reshape(-1).cpu().double() for g in gradients])
    return logits.detach().cpu().double(), flat


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """Convolutions as they are set, or without TF32; matrix products have none by default."""
    if allowed or not allows_tf32():
        yield
        return
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]


def _distance(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()

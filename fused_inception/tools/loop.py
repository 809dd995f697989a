"""One epoch of training, and the evaluation of a network."""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_inception.tools.data import Batches, to_input
from fused_inception.tools.errors import UserError

WARM_UP = 0.05
MOMENTUM = 0.9
AUX_WEIGHT = 0.3  # of each auxiliary classifier's loss, as in the paper
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
REFRESH_SECONDS = 0.5  # reading the loss waits for the device, so not at every step

Network = TypeVar("Network", bound=nn.Module)


class DivergedError(UserError):
    """The loss is no longer finite, and would not be in a second attempt."""


@dataclass(frozen=True)
class Result:
    """Mean loss of the main classifier, its accuracy, and how long that took."""

    loss: float
    accuracy: float
    images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Loading included."""
        return self.images / self.seconds


def objective(outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's loss, the main classifier's part of it, and the main classifier's logits.

    loss = CE(logits) + 0.3 * (CE(aux_logits1) + CE(aux_logits2)), the heads where there are any.
    """
    if isinstance(outputs, Tensor):
        main = F.cross_entropy(outputs, labels)
        return main, main, outputs
    main = F.cross_entropy(outputs.logits, labels)
    aux1 = F.cross_entropy(outputs.aux_logits1, labels)
    aux2 = F.cross_entropy(outputs.aux_logits2, labels)
    return main + AUX_WEIGHT * (aux1 + aux2), main, outputs.logits


def autocast(device: torch.device, amp: str) -> AbstractContextManager[object]:
    """torch.autocast in the dtype of `--amp`, or nothing for off."""
    if amp == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp])


def placed(model: Network, device: torch.device) -> Network:
    """`model` on `device`, filters channels last."""
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def new_optimizer(
    model: nn.Module, name: str, lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum ("sgd") or AdamW ("adamw").

    Filters and matrices decay; biases and the parameters of normalisation, all 1-d, do not.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up to `peak` in the first twentieth of the run, then half a cosine down to zero.

    `progress` goes from 0 to 1 over the run. A function of nothing else: a resumed run needs no
    state of a schedule.
    """
    if progress < WARM_UP:
        return peak * progress / WARM_UP
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def train_epoch(
    model: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rates: Sequence[float],
    *,
    device: torch.device,
    amp: str,
    title: str,
) -> Result:
    """One pass over `batches`, with one of the learning rates for each.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    model.train()
    with _Meter(batches.images, device, title) as meter:
        for (images, labels), rate in zip(batches, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            labels = labels.to(device, non_blocking=True)
            with autocast(device, amp):
                loss, main, logits = objective(model(to_input(images, device)), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            meter.add(main, logits, labels)
        return meter.result()


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, *, device: torch.device, amp: str, title: str
) -> Result:
    """Loss and accuracy of `model` in eval mode."""
    model.eval()
    with _Meter(batches.images, device, title) as meter:
        for images, labels in batches:
            labels = labels.to(device, non_blocking=True)
            with autocast(device, amp):
                logits = model(to_input(images, device))
                loss = F.cross_entropy(logits, labels)
            meter.add(loss, logits, labels)
        return meter.result()


class _Meter:
    """Sums of loss and hits, kept on the device, shown in a progress bar from time to time."""

    def __init__(self, images: int, device: torch.device, title: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=images, desc=title, unit="img", leave=False)
        self.title = title
        self.loss = torch.zeros((), device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0
        self.started = self.refreshed = time.perf_counter()

    def __enter__(self) -> "_Meter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count one batch; `loss` is its mean."""
        self.loss += loss.detach().float() * len(labels)
        self.hits += (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)
        if time.perf_counter() - self.refreshed > REFRESH_SECONDS:
            result = self.result()
            self.bar.set_postfix_str(
                f"loss {result.loss:.3f}, accuracy {100 * result.accuracy:.1f} %", refresh=False
            )
            self.bar.update(self.images - self.bar.n)
            self.refreshed = time.perf_counter()

    def result(self) -> Result:
        """The means so far; waits for the device."""
        loss = self.loss.item() / self.images
        if not math.isfinite(loss):
            raise DivergedError(f"the loss became {loss} in {self.title}: try a lower --lr")
        accuracy = self.hits.item() / self.images
        return Result(loss, accuracy, self.images, time.perf_counter() - self.started)

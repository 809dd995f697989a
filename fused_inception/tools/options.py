"""The options of the train command: which there are, their defaults, which of them fit together."""

import argparse
import os
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import torch

from fused_inception.backend import ENVIRONMENT_VARIABLE, NAMES, backend, selected
from fused_inception.geometry import VARIANTS, smallest_image
from fused_inception.tools.errors import UserError

RATES = {"sgd": 0.01, "adamw": 5e-4}
DECAYS = {"sgd": 2e-4, "adamw": 1e-2}
BACKEND_DEFAULT = f"default: {ENVIRONMENT_VARIABLE}, else auto"

# a checkpoint holds the options of its run; these may be given anew, all others decide the result
CHANGEABLE = ("device", "backend", "epochs", "workers")
CHANGEABLE_IN_TESTS = (*CHANGEABLE, "data", "limit", "batch_size", "amp")

# of an image whose last maps have more than one pixel: BatchNorm trains on one such image alone
TRAINS_ALONE = 47

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Options:
    """What is trained and how; each field is named after its flag."""

    image_size: int
    epochs: int
    lr: float
    weight_decay: float
    data: str = "digits"
    variant: str = "paper"
    aux: bool = True
    batch_size: int = 32
    limit: int | None = None
    optimizer: str = "sgd"
    flip: bool = False
    amp: str = "off"
    device: str = "auto"
    backend: str | None = None
    workers: int | None = None
    seed: int = 0

    @property
    def data_name(self) -> str:
        """The last part of a folder's name, or what stands for it."""
        name, _, path = self.data.partition(":")
        return Path(path).resolve().name if path else name


def add_option_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `Options`; those not given are absent from the parsed namespace."""

    def add(flag: str, text: str, **settings: Any) -> None:
        parser.add_argument(flag, help=text, default=argparse.SUPPRESS, **settings)

    add("--data", "digits (default), imagefolder:PATH with PATH/<class>/<image>, or synthetic")
    add("--variant", "which GoogLeNet (default: paper)", choices=VARIANTS)
    add("--aux", "auxiliary classifiers, on by default", action=argparse.BooleanOptionalAction)
    add("--image-size", "side in pixels (default: 48 for digits, else 224)", type=positive)
    add("--epochs", "passes over the data (default: 12; synthetic: 1)", type=positive)
    add("--batch-size", "images in a step (default: 32)", type=positive)
    add("--limit", "at most so many images in an epoch, and to test on", type=positive)
    add("--optimizer", "default: sgd, with momentum 0.9", choices=tuple(RATES))
    add("--lr", "highest learning rate (default: sgd 0.01, adamw 0.0005)", type=_rate)
    add("--weight-decay", "not of biases (default: sgd 0.0002, adamw 0.01)", type=_rate)
    add("--flip", "mirror half of a folder's training images", action="store_true")
    add("--amp", "mixed precision (default: off)", choices=("off", "bf16", "fp16"))
    add("--device", "cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--backend", f"implementation of the fused modules ({BACKEND_DEFAULT})", choices=NAMES)
    add("--workers", "processes that read a folder (default: 0, with CUDA up to 8)", type=count)
    add("--seed", "of weights, order, crops and dropout (default: 0)", type=count)


def from_flags(
    given: dict[str, Any], saved: dict[str, Any] | None, source: str, *, testing: bool
) -> Options:
    """Options from the flags `given`, on top of those `saved` in the checkpoint `source`, if any.

    Raises:
        UserError: a flag contradicts the checkpoint, or options do not fit together.
    """
    if saved is None:
        return _checked(Options(**{**_defaults(given), **given}), testing)
    changeable = CHANGEABLE_IN_TESTS if testing else CHANGEABLE
    for name, value in given.items():
        if name not in changeable and value != saved[name]:
            was, now, flag = _told_apart(name, saved[name], value)
            raise UserError(
                f"{source} was trained {was}, not {now}: "
                f"leave out {flag}, or start a new run without the checkpoint"
            )
    return _checked(Options(**{**saved, **given}), testing)


def _told_apart(name: str, saved: Any, given: Any) -> tuple[str, str, str]:
    """What a run was trained with, and what is given for it, as one would type them; the flag."""
    flag = "--" + name.replace("_", "-")
    if name == "aux":
        was, now = (flag if value else "--no-aux" for value in (saved, given))
        return f"with {was}", now, now
    if saved is None or saved is False:
        return f"without {flag}", "with it", flag
    return f"with {flag} {saved}", str(given), flag


def pick_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).fill_(0.0).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not usable here: try --device cpu") from None
    return device


def pick_backend(name: str | None) -> backend:
    """The `backend` block for `--backend`; without the flag, whatever is in force anyway.

    Raises:
        UserError: the environment variable names no backend.
    """
    try:
        return backend(selected() if name is None else name)
    except ValueError as error:
        raise UserError(str(error)) from None


def network_arguments(options: Options, num_classes: int) -> dict[str, Any]:
    """The keyword arguments of `googlenet` for these options."""
    return {
        "variant": options.variant,
        "num_classes": num_classes,
        "aux_logits": options.aux,
        "image_size": options.image_size,
    }


def loading(options: Options, device: torch.device) -> dict[str, Any]:
    """How batches are loaded: keyword arguments of `data.train_batches` and `held_out_batches`."""
    workers, cuda = options.workers, device.type == "cuda"
    if workers is None:
        # on a CPU the training itself keeps every core busy; digits are in memory
        folder = options.data.startswith("imagefolder")
        workers = min(8, os.cpu_count() or 1) if cuda and folder else 0
    return {"workers": workers, "pin": cuda, "limit": options.limit}


def positive(text: str) -> int:
    """An integer of 1 or more, for argparse."""
    return _number(int, text, 1, "a whole number of 1 or more")


def count(text: str) -> int:
    """An integer that is a seed, or none of something, for argparse."""
    return _number(int, text, 0, f"a whole number between 0 and {2**32 - 1}", 2**32)


def _number(kind: type[_Number], text: str, least: int, words: str, below: float = inf) -> _Number:
    """`text` as a number from `least` on; argparse's own message would name a function of ours."""
    try:
        value = kind(text)
    except ValueError:
        value = kind(least - 1)
    if not least <= value < below:
        raise argparse.ArgumentTypeError(f"{text} is not {words}")
    return value


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Of the options whose default depends on another one."""
    data, optimizer = given.get("data", "digits"), given.get("optimizer", "sgd")
    return {
        "image_size": 48 if data == "digits" else 224,
        "epochs": 1 if data == "synthetic" else 12,
        "lr": RATES[optimizer],
        "weight_decay": DECAYS[optimizer],
    }


def _checked(options: Options, testing: bool) -> Options:
    side, paper = options.image_size, options.variant == "paper"
    least, with_heads = (smallest_image(options.variant, heads) for heads in (False, True))
    if side < least:
        raise UserError(
            f"--image-size {side} is too small for the {options.variant} network: "
            f"it takes {least} or more"
        )
    if options.aux and side < with_heads:
        raise UserError(
            f"--image-size {side} is too small for the auxiliary classifiers: "
            f"take {with_heads} or more, or --no-aux"
        )
    limited = options.limit == 1 and options.data != "synthetic"
    if not (paper or testing) and side < TRAINS_ALONE and (options.batch_size == 1 or limited):
        flag = "--limit" if limited else "--batch-size"
        raise UserError(f"{flag} 1 with BatchNorm needs an --image-size of {TRAINS_ALONE} or more")
    if options.flip and not options.data.startswith("imagefolder"):
        raise UserError(f"--flip is for imagefolder:PATH, not for {options.data}")
    if options.amp == "fp16" and pick_device(options.device).type != "cuda":
        raise UserError("--amp fp16 needs a CUDA device: take --amp bf16")
    return options


def _rate(text: str) -> float:
    return _number(float, text, 0, "a number of 0 or more")

"""A training run: its epochs, its files and its closing report."""

import io
import json
import platform
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_inception.nn.googlenet import googlenet
from fused_inception.tools.checkpoint import CHECKPOINT, KIND, network_of, write_atomically
from fused_inception.tools.curves import draw_curves
from fused_inception.tools.data import Data, check_images, held_out_batches, to_input, train_batches
from fused_inception.tools.errors import UserError, output_folder
from fused_inception.tools.loop import (
    DivergedError,
    autocast,
    evaluate,
    learning_rate,
    new_optimizer,
    placed,
    train_epoch,
)
from fused_inception.tools.options import TRAINS_ALONE, Options, loading, network_arguments
from fused_inception.tools.parity import compare, modes, training_speed
from fused_inception.tools.precompile import precompile
from fused_inception.tools.text import rate

PARITY_IMAGES = 16
INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


class Run:
    """What changes from epoch to epoch, and the folder that keeps it.

    The randomness of an epoch follows from the seed and the number of the epoch, so the network,
    the optimizer and the loss scale after an epoch are all that the next one needs.

    Args:
        contents: the checkpoint to go on from, if any.

    Raises:
        UserError: the checkpoint has more epochs than `options`, or there is too little to test on.
    """

    def __init__(
        self,
        options: Options,
        data: Data,
        device: torch.device,
        folder: Path,
        contents: dict[str, Any] | None,
    ) -> None:
        self.options = options
        self.data = data
        self.device = device
        self.folder = folder
        self.network = network_arguments(options, len(data.classes))
        self.history: list[dict[str, Any]] = [] if contents is None else contents["history"]
        if len(self.history) > options.epochs:
            raise UserError(
                f"the checkpoint has finished {len(self.history)} epochs: --epochs must not be less"
            )
        alone = len(data.test) == 1 and options.image_size < TRAINS_ALONE
        if alone and options.variant != "paper":  # the report takes its gradients
            raise UserError(
                "one test image with BatchNorm needs an --image-size of "
                f"{TRAINS_ALONE} or more: add another one"
            )
        torch.manual_seed(options.seed)
        model = googlenet(**self.network) if contents is None else network_of(contents)
        self.model = placed(model, device)
        self.optimizer = new_optimizer(
            self.model, options.optimizer, options.lr, options.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        if contents is not None:
            self.optimizer.load_state_dict(contents["optimizer"])
            self.scaler.load_state_dict(contents["scaler"])

    def go(self) -> int:
        """Train the epochs that are left, then report; Ctrl-C keeps those that are finished.

        Returns:
            The exit status: 0, 1 if fused and plain network disagree, 130 after Ctrl-C.
        """
        epochs = self.options.epochs
        print(headline(self.model, self.options, self.device))
        print(self._images(), flush=True)
        if len(self.history) == epochs:
            print(f"all {epochs} epochs are finished: a larger --epochs goes on", flush=True)
        with output_folder(self.folder):
            try:
                if self.history and not (self.folder / CHECKPOINT).exists():
                    self._save(self.history)  # a copy, as the run goes on from here
                if len(self.history) < epochs:
                    how = loading(self.options, self.device)
                    check_images(self.data, self.options.batch_size, **how)
                    if self.device.type == "cuda":
                        self._precompile()
                while len(self.history) < epochs:
                    self._epoch(len(self.history) + 1)
                return self._report()
            except KeyboardInterrupt:
                if not self.history:  # the state before the first step follows from the seed
                    Run(self.options, self.data, self.device, self.folder, None)._save([])
                print(
                    f"\nstopped: {len(self.history)} of {epochs} epochs are finished and saved; "
                    f"go on with: {self._resume}"
                )
                return INTERRUPTED
            except Exception as error:
                if isinstance(error, DivergedError) or not (self.folder / CHECKPOINT).exists():
                    raise
                way = f"what is saved goes on with: {self._resume}"
                if isinstance(error, UserError | OSError):
                    raise UserError(f"{error}; {way}") from error
                print(way, flush=True)
                raise

    def _images(self) -> str:
        """How many there are, and how many of them an epoch leaves out."""
        count, test = len(self.data.train), len(self.data.test)
        kept = min(count, self.options.limit or count)
        left = kept % min(self.options.batch_size, kept)
        note = f"; an epoch leaves out its incomplete training batch, of {left}" if left else ""
        return f"{count} training and {test} test images{note}"

    @property
    def _resume(self) -> str:
        """The command that goes on with what is saved."""
        return f"python -m fused_inception train --resume {shlex.quote(str(self.folder))}"

    def _precompile(self) -> None:
        """Kernels of every batch size of training and of testing, in parallel."""
        options = self.options
        train, test = (
            min(len(part), options.limit or len(part)) for part in (self.data.train, self.data.test)
        )
        for training, size in batch_sizes(options.batch_size, train, test):
            pixels = torch.zeros((size, 3, *[options.image_size] * 2), dtype=torch.uint8)
            x = to_input(pixels, self.device)
            self.model.train(training)
            with torch.set_grad_enabled(training), autocast(self.device, options.amp):
                print(precompile(self.model, x), flush=True)

    def _epoch(self, number: int) -> None:
        options = self.options
        seed = options.seed * 1_000_003 + number
        torch.manual_seed(seed)  # dropout, and crops where no worker process makes them
        how = loading(options, self.device)
        batches = train_batches(self.data.train, options.batch_size, seed=seed, **how)
        rates = [
            learning_rate((number - 1 + (step + 0.5) / batches.steps) / options.epochs, options.lr)
            for step in range(batches.steps)
        ]
        title = f"epoch {number:2d}/{options.epochs}"
        context: dict[str, Any] = {"device": self.device, "amp": options.amp}
        trained = train_epoch(
            self.model, batches, self.optimizer, self.scaler, rates, title=title, **context
        )
        held_out = held_out_batches(self.data.test, options.batch_size, **how)
        tested = evaluate(self.model, held_out, title="testing", **context)
        row = {
            "epoch": number,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            "test_images": tested.images,
            "seconds": trained.seconds + tested.seconds,
            "images_per_second": trained.images_per_second,
        }
        self._save([*self.history, row])
        self._write_metrics([*self.history, row])
        self.history.append(row)
        print(
            f"{title}  loss {trained.loss:.3f}  accuracy {100 * trained.accuracy:5.1f} %"
            f"   test: loss {tested.loss:.3f}  accuracy {100 * tested.accuracy:5.1f} %"
            f"   {rate(trained.images_per_second)} images/s",
            flush=True,
        )

    def _save(self, history: list[dict[str, Any]]) -> None:
        data = self.data
        counts = {"train": len(data.train), "test": len(data.test)}
        contents = {
            "kind": KIND,
            "network": self.network,
            "classes": list(data.classes),
            "files": None if data.names is None else counts | {"names": data.names},
            "options": asdict(self.options),
            "history": history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        # torch.save into a file hides from the caller that a disk is full
        serialised = io.BytesIO()
        torch.save(contents, serialised)
        write_atomically(self.folder / CHECKPOINT, lambda file: file.write(serialised.getbuffer()))

    def _write_metrics(self, history: list[dict[str, Any]], **report: Any) -> None:
        metrics = {
            "test_accuracy": history[-1]["test_accuracy"],
            **report,
            "epochs": history,
            "options": asdict(self.options),
            "classes": list(self.data.classes),
            "machine": machine(self.device),
        }
        write_json(self.folder / "metrics.json", metrics)

    def _report(self) -> int:
        options, last = self.options, self.history[-1]
        how = loading(options, self.device) | {"workers": 0}
        print(
            f"test accuracy {100 * last['test_accuracy']:.2f} % on {last['test_images']} held-out "
            "images"
        )
        title = f"GoogLeNet ({options.variant}) on {options.data_name}, {options.image_size} px"
        draw_curves(self.history, title, self.folder / "curves.png")

        few = how | {"limit": PARITY_IMAGES}
        pixels, labels = next(iter(held_out_batches(self.data.test, PARITY_IMAGES, **few)))
        x, labels = to_input(pixels, self.device), labels.to(self.device)
        parities = [
            compare(self.model, self.network, x, labels, mode)
            for mode in modes(self.device, options.amp)
        ]
        print(*parities, sep="\n")

        batches = train_batches(self.data.train, options.batch_size, seed=options.seed, **how)
        pixels, labels = next(iter(batches))
        x, labels = to_input(pixels, self.device), labels.to(self.device)
        speed = training_speed(self.model, self.network, x, labels, options.amp)
        print(speed_line(speed, len(x)))

        self._write_metrics(
            self.history,
            parity=[asdict(parity) | {"verdict": parity.verdict} for parity in parities],
            images_per_second=speed,
        )
        print(f"wrote {CHECKPOINT}, metrics.json and curves.png in {self.folder}")
        return int(any(parity.verdict == "FAILED" for parity in parities))


def batch_sizes(largest: int, train: int, test: int) -> list[tuple[bool, int]]:
    """(training, images) of each size that an epoch has: training leaves out what would not fill a
    batch, testing takes it as a short one."""
    sizes = [(True, min(largest, train)), (False, min(largest, test))]
    if test > largest and test % largest:
        sizes.append((False, test % largest))
    return sizes


def headline(model: nn.Module, options: Options, device: torch.device) -> str:
    """What is trained, and on what."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    heads = "with" if options.aux else "without"
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    return (
        f"GoogLeNet ({options.variant}, {heads} auxiliary classifiers, {parameters:.1f} M "
        f"parameters) on {options.data}, {options.image_size} px, {device}{threads}"
    )


def speed_line(speed: dict[str, float], batch_size: int) -> str:
    """One line about the result of `training_speed`."""
    return (
        f"training steps of {batch_size} images: fused {rate(speed['fused'])} images/s, "
        f"plain PyTorch {rate(speed['reference'])} images/s"
    )


def machine(device: torch.device) -> dict[str, str | int]:
    """Where a result was measured."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` in one piece."""
    text = json.dumps(contents, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))

"""A model and a batch for it, by flags: what `verify`, `explain`, `bench` and `tune` look at."""

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.backend import NAMES, BackendError
from fused_inception.geometry import VARIANTS
from fused_inception.nn.googlenet import googlenet
from fused_inception.tools.errors import UserError, out_of_memory, without_advice
from fused_inception.tools.loop import autocast, placed
from fused_inception.tools.options import (
    BACKEND_DEFAULT,
    count,
    pick_backend,
    pick_device,
    positive,
)

TORCHVISION = "torchvision"
DTYPES = ("float32", "float16", "bfloat16", "float64")


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    model: str | None = None,
    batch_size: int = 2,
    dtype: str = "float32",
) -> None:
    """The flags of a model and one batch, with these defaults; `--model` must be given where it has
    none."""
    add_model_arguments(parser, model=model, dtype=dtype)
    add = parser.add_argument
    images = f"images, random (default: {batch_size})"
    add("--batch-size", type=positive, default=batch_size, help=images)
    add("--eval", action="store_true", help="in eval mode (default: training)")


def add_model_arguments(
    parser: argparse.ArgumentParser, *, model: str | None = None, dtype: str = "float32"
) -> None:
    """The flags of a model, in any mode, for batches of any size."""
    add = parser.add_argument
    add(
        "--model",
        required=model is None,
        default=model,
        metavar="MODEL",
        help=f"torchvision:googlenet, one of ours ({', '.join(VARIANTS)}), or MODULE:CALLABLE, "
        "called without arguments, for a model of your own"
        + (f" (default: {model})" if model else ""),
    )
    add("--image-size", type=positive, default=224, help="side in pixels (default: 224)")
    add("--dtype", choices=DTYPES, default=dtype, help=f"of model and images (default: {dtype})")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast (default: off)")
    add("--device", default="auto", help="cpu, cuda ... (default: cuda, else cpu)")
    add("--backend", default=None, choices=NAMES, help=BACKEND_DEFAULT)
    add("--seed", type=count, default=0, help="of weights and images (default: 0)")


def sizes(text: str) -> list[int]:
    """Batch sizes with commas between them, each once, for argparse."""
    return list(dict.fromkeys(positive(part) for part in text.split(",")))


@contextmanager
def prepared(
    arguments: argparse.Namespace, batch_size: int | None = None
) -> Iterator[tuple[nn.Module, Tensor]]:
    """The model, and a batch of random images; backend and autocast hold inside the block.

    `batch_size` stands for the flag of that name, and then the model is in training mode.

    Raises:
        UserError: no such model, or flags that do not fit it.
    """
    device, dtype = pick_device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    model = placed(model_of(arguments.model, arguments.image_size), device)
    if batch_size is None:
        model.train(not arguments.eval)
        batch_size = arguments.batch_size
    model = model.to(dtype)
    side = arguments.image_size
    x = torch.randn(batch_size, 3, side, side).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    with pick_backend(arguments.backend), autocast(device, arguments.amp):
        try:
            yield model, x
        except BackendError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise UserError(f"--model {arguments.model}: {error}") from None


def model_of(name: str, image_size: int) -> nn.Module:
    """The model that `--model` names, with random weights.

    Raises:
        UserError: there is none, or making it failed.
    """
    module, _, attribute = name.partition(":")
    try:
        if name in VARIANTS:
            return googlenet(name, image_size=image_size)
        if not attribute:
            raise UserError(
                f"--model {name}: take torchvision:googlenet, {', '.join(VARIANTS)} or "
                "MODULE:CALLABLE"
            )
        if module == TORCHVISION:
            return _torchvision_model(attribute)
        return _own_model(module, attribute)
    except UserError:
        raise
    except (ImportError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        what = without_advice(error) if name in VARIANTS else error
        raise UserError(f"--model {name}: {what}") from None


def import_torchvision(module: str) -> ModuleType:
    """The module named, such as "torchvision.models", also beside a torch that torchvision's wheel
    was not built for: its compiled library does not load there, and its networks need none.

    Raises:
        ImportError, RuntimeError: there is no torchvision, or it does not load for another reason.
    """
    try:
        return importlib.import_module(module)
    except RuntimeError as error:
        if _definitions or "torchvision::" not in str(error):
            raise
    # torchvision registers the shapes of these operators when it is imported, and stops where
    # nothing defines them; a definition is enough
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _definitions.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module(module)


_definitions: list[torch.library.Library] = []


def _torchvision_model(name: str) -> nn.Module:
    models = import_torchvision("torchvision.models")
    options: dict[str, Any] = {"init_weights": True} if name == "googlenet" else {}
    return getattr(models, name)(**options)


def _own_model(module: str, attribute: str) -> nn.Module:
    # as `python script.py` would find it
    if "" not in sys.path:
        sys.path.insert(0, "")
    model = getattr(importlib.import_module(module), attribute)()
    if not isinstance(model, nn.Module):
        found = f"{type(model).__name__}, not a torch.nn.Module"
        raise UserError(f"--model {module}:{attribute} returned an object of class {found}")
    return model

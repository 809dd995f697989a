"""Checkpoints of the train command: one file with the network and all that a run needs to go on."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fused_inception.nn.googlenet import GoogLeNet, googlenet
from fused_inception.tools.errors import UserError

CHECKPOINT = "checkpoint.pt"  # its name in the folder of a run
KIND = "fused_inception checkpoint 1"


def load_checkpoint(path: str | Path) -> GoogLeNet:
    """The network of a checkpoint of `python -m fused_inception train`, on the CPU, in eval mode.

    Its input is float32 [N, 3, S, S] from -1 to 1 (pixel / 127.5 - 1), S as in training.
    `path` may also be the folder of the run. Only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: no file at `path`.
        ValueError: the file is not such a checkpoint.
    """
    return network_of(read_checkpoint(path)).eval()


def read_checkpoint(path: str | Path, *parts: str) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU; path and errors as in `load_checkpoint`.

    `parts` beside the network must be there too: of a checkpoint that is handed on somebody may
    have taken away what only training needs.
    """
    path = checkpoint_file(Path(path))
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):  # what could not be read may well be one
        raise
    except Exception:  # unpickling bytes that are no pickle raises nearly anything
        contents = None
    named = isinstance(contents, dict) and contents.get("kind") == KIND
    if not named or not {"network", "model"} <= contents.keys():
        raise UserError(f"{path} is not a checkpoint of fused_inception's train command")
    missing = [part for part in parts if part not in contents]
    if missing:
        raise UserError(f"{path} holds a network, but not what this needs too: {missing[0]}")
    return contents


def checkpoint_file(path: Path) -> Path:
    """`path` itself, or the checkpoint in the folder `path`."""
    return path / CHECKPOINT if path.is_dir() else path


def network_of(contents: dict[str, Any]) -> GoogLeNet:
    """The network that `contents` of a checkpoint describe, with its weights.

    Raises:
        ValueError: they do not fit each other, or this version of the package.
    """
    try:
        model = googlenet(**contents["network"], init_weights=False)
        model.load_state_dict(contents["model"], strict=True)
    except (RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"the checkpoint's weights do not fit its network: {what}") from error
    return model


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file that takes the place of `path` only when it is complete."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)

"""Errors that a command prints in one line, without a traceback."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch


class UserError(ValueError):
    """A wrong argument or file; the message is one line that says what to do.

    Raised in a worker process of a DataLoader it arrives wrapped in the text of a traceback, whose
    last line is the message; that line is kept.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.UserError: "))


def writable_folder(folder: Path) -> None:
    """Make `folder`, and see that files can be written there: better now than after the work.

    Raises:
        UserError: it is a file, or may not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to {folder}: {error}") from error


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """A `writable_folder`, which goes again if the block made it and wrote nothing there."""
    is_new = not folder.exists()
    try:
        writable_folder(folder)
        yield
    finally:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left; for a CPU's PyTorch has no class of its own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def without_advice(error: Exception) -> str:
    """The message for a command, which has no argument aux_logits to advise."""
    return str(error).partition("; aux_logits=")[0]


def require(*modules: str) -> None:
    """Raise a UserError naming the extra if one of `modules` is not installed."""
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    missing = [names.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing here: pip install 'fused-inception[train]'"
        )

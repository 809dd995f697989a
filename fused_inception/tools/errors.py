"""Errors that a command prints in one line, without a traceback."""

from importlib.util import find_spec


class UserError(ValueError):
    """A wrong argument or file; the message is one line that says what to do.

    Raised in a worker process of a DataLoader it arrives wrapped in the text of a traceback, whose
    last line is the message; that line is kept.
    """

    def __init__(self, message: str) -> None:
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.UserError: "))


def require(*modules: str) -> None:
    """Raise a UserError naming the extra if one of `modules` is not installed."""
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    missing = [names.get(module, module) for module in modules if find_spec(module) is None]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing here: pip install 'fused-inception[train]'"
        )

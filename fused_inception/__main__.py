"""The commands: `python -m fused_inception` with one of COMMANDS."""

import argparse
import io
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from fused_inception.backend import BackendError
from fused_inception.tools import bench, explain, info, predict, train, tune, verify
from fused_inception.tools.errors import UserError, out_of_memory

COMMANDS = {
    "train": (train, "train GoogLeNet on real images, or measure its speed"),
    "predict": (predict, "the most probable classes of image files"),
    "verify": (verify, "compare a fused model with plain PyTorch and float64, block by block"),
    "explain": (explain, "how a fused model runs, block by block, and why"),
    "bench": (bench, "time a fused model beside plain PyTorch and torch.compile"),
    "tune": (tune, "measure the launches of a model on this GPU, and keep the winners"),
    "info": (info, "versions, devices, and what runs fused on them"),
}
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage; --help shows that."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: what the command says, 2 with one line on stderr for wrong arguments or
        files, 2 with a traceback for what nobody expected.
    """
    _escape_what_has_no_code()
    parser = _Parser(prog="fused-inception", description="GoogLeNet with fused Inception modules.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (tool, text) in COMMANDS.items():
        tool.add_arguments(commands.add_parser(name, help=text, description=text))
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    tool, _ = COMMANDS[parsed.command]
    try:
        return tool.run(parsed)
    except (UserError, BackendError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if not out_of_memory(error):
            traceback.print_exc()
            return 2  # 1 says that fused and plain PyTorch disagree
        message = "not enough device memory: lower --batch-size or --image-size"
    print(f"{commands.choices[parsed.command].prog}: error: {message}", file=sys.stderr)
    return 2


def _escape_what_has_no_code() -> None:
    """Names of files and classes may hold what stdout cannot encode, in Latin-1 for example, or a
    byte that is no UTF-8; stderr escapes that by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())

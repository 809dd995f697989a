"""Says which of the named modules this Python lacks, and how to get them; exit status 1 then."""

import platform
import sys
from importlib.util import find_spec

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "xdist": "pytest-xdist"}


def main() -> None:
    """Check the modules named on the command line."""
    if sys.version_info < (3, 10):  # noqa: UP036, an older Python runs this file
        sys.exit(f"fused_inception needs Python 3.10 or newer, {sys.executable} is older")
    wanted = [name for name in sys.argv[1:] if name != "triton" or platform.system() == "Linux"]
    missing = [PACKAGES.get(name, name) for name in wanted if find_spec(name) is None]
    if missing:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}. Either install them there:\n"
            f"    {sys.executable} -m pip install -c constraints.txt {' '.join(missing)}\n"
            "or leave VENV at its default, and make sets up an environment with all of them."
        )


if __name__ == "__main__":
    main()

"""Which code something was measured with, also where there is no git, or files were changed; which
versions of others."""

import hashlib
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# what decides which kernels are launched, how, and what they compute
LAUNCHES = ("kernels", "ops", "tuning")


def digest(*folders: Path) -> str:
    """Of the names and contents of all Python files below `folders`."""
    found = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(folder.parent).as_posix()
            found.update(f"{name}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:16]


def launches_digest() -> str:
    """Of what decides a launch."""
    return digest(*(PACKAGE / name for name in LAUNCHES))


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def answer_of(*command: str) -> str | None:
    """The first line that a program prints, run in the package's folder; None where there is none,
    or it fails."""
    try:
        done = subprocess.run(
            command, cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)

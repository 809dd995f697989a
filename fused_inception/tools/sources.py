"""Which code something was measured with, also where there is no git, or files were changed."""

import hashlib
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

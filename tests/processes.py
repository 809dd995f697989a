"""Python in processes of its own, where kernels are compiled and not interpreted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments and variables of the environment, in the checkout's root."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def output_of(*arguments: str, **variables: str) -> str:
    """What it prints; it may not fail."""
    done = run_python(*arguments, **variables)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout

"""`info`: versions, devices, which implementation runs on each, and which layers are fused."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fused_inception.backend import BackendError, choose
from fused_inception.nn.googlenet import VARIANTS, googlenet
from fused_inception.tools.options import pick_backend

LIBRARIES = ("torch", "triton", "numpy", "pillow", "scikit-learn", "matplotlib", "tqdm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the facts; the exit status is 0.

    Raises:
        UserError: the environment variable names no backend.
    """
    name = pick_backend(None).name
    own = _version("fused-inception", absent="in a checkout, not installed")
    print(f"fused_inception {own}, Python {platform.python_version()}")
    print(", ".join(f"{library} {_version(library)}" for library in LIBRARIES))
    print(f"backend {name}:")
    print(f"  cpu ({torch.get_num_threads()} threads): {_implementation(name, 'cpu')}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}): {_implementation(name, 'cuda')}"
        )
    print("googlenet:")
    for variant in VARIANTS:
        model = googlenet(variant, init_weights=False, device="meta")
        print(f"  {model.extra_repr()}")
    return 0


def _implementation(name: str, device_type: str) -> str:
    """What `choose` takes for float32 tensors on such a device, or why nothing can run."""
    try:
        chosen = choose(name, device_type, torch.float32)
    except BackendError as error:
        return f"not usable, {error}"
    return {"torch": "PyTorch's own operators (ATen)", "triton": "fused Triton kernels"}[chosen]


def _version(library: str, absent: str = "missing") -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return absent

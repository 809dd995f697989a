"""`info`: versions, devices, which implementation runs on each, and which layers are fused; or,
with `--network`, what a network costs."""

import argparse
import platform
import textwrap
from typing import Any

import torch

from fused_inception.backend import TRITON_INSTALLED, BackendError, choose
from fused_inception.cost import H200, ITEMSIZE
from fused_inception.geometry import VARIANTS
from fused_inception.nn.googlenet import googlenet
from fused_inception.ops import replay
from fused_inception.tools.errors import UserError, without_advice
from fused_inception.tools.network_table import report
from fused_inception.tools.options import pick_backend, positive
from fused_inception.tools.sources import version_of

LIBRARIES = ("torch", "triton", "numpy", "pillow", "scikit-learn", "matplotlib", "tqdm")
NETWORK_DEFAULTS: dict[str, Any] = {"batch_size": 32, "image_size": 224, "dtype": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the table; the other facts need none."""
    parser.add_argument(
        "--network", choices=VARIANTS, help="print what this GoogLeNet costs, counted and predicted"
    )
    add = parser.add_argument_group("of the network").add_argument
    for flag, text in (
        ("--batch-size", "images (default: 32)"),
        ("--image-size", "side (default: 224)"),
    ):
        add(flag, type=positive, default=argparse.SUPPRESS, help=text)
    add("--dtype", choices=tuple(ITEMSIZE), default=argparse.SUPPRESS, help="default: bfloat16")


def run(arguments: argparse.Namespace) -> int:
    """Print the facts; the exit status is 0.

    Raises:
        UserError: the environment variable names no backend; flags of a network without one, or
            images that are too small for it.
    """
    sizes = {k: v for k, v in vars(arguments).items() if k in NETWORK_DEFAULTS}
    if arguments.network is not None:
        try:
            settings = {**NETWORK_DEFAULTS, **sizes}
            batch = settings.pop("batch_size")
            lines = report(arguments.network, batch=batch, **settings, device=H200)
        except ValueError as error:
            raise UserError(without_advice(error)) from None
        print("\n".join(lines))
        return 0
    if sizes:
        raise UserError("--batch-size, --image-size and --dtype describe a network: add --network")
    name = pick_backend(None).name
    own = version_of("fused-inception") or "in a checkout, not installed"
    print(f"fused_inception {own}, Python {platform.python_version()}")
    print(", ".join(f"{library} {version_of(library) or 'missing'}" for library in LIBRARIES))
    print(f"backend {name}:")
    print(f"  cpu ({torch.get_num_threads()} threads): {_implementation(name, 'cpu')}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(
            f"  cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}): {_implementation(name, f'cuda:{index}')}"
        )
    launches = name != "torch" and torch.cuda.is_available() and TRITON_INSTALLED
    if launches and (reason := replay.why_not()):
        print(f"  launches are not replayed, each takes 20 us or more on the CPU: {reason}")
    print("googlenet:")
    for variant in VARIANTS:
        model = googlenet(variant, init_weights=False, device="meta")
        print(textwrap.indent(model.extra_repr(), "    ").replace("    ", "  ", 1))
    return 0


def _implementation(name: str, device: str) -> str:
    """What `choose` takes for float32 tensors on such a device, or why nothing can run."""
    try:
        chosen = choose(name, torch.device(device), torch.float32)
    except BackendError as error:
        return f"not usable, {error}"
    return {"torch": "PyTorch's own operators (ATen)", "triton": "fused Triton kernels"}[chosen]

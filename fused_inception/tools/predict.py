"""`predict`: the most probable classes of image files, by a checkpoint of `train`."""

import argparse
from pathlib import Path

import torch

from fused_inception.backend import NAMES
from fused_inception.tools.checkpoint import network_of, read_checkpoint
from fused_inception.tools.data import read_image, to_input
from fused_inception.tools.errors import require
from fused_inception.tools.loop import placed
from fused_inception.tools.options import BACKEND_DEFAULT, pick_backend, pick_device, positive

BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("checkpoint", type=Path, help="written by train, or its folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="image", help="image files")
    parser.add_argument("--top", type=positive, default=3, help="classes per image (default: 3)")
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: cuda, else cpu)")
    parser.add_argument("--backend", default=None, choices=NAMES, help=BACKEND_DEFAULT)


def run(arguments: argparse.Namespace) -> int:
    """Print a table; the exit status is 0.

    Raises:
        UserError, OSError: no such checkpoint, or an image that cannot be read.
    """
    require("PIL")
    contents = read_checkpoint(arguments.checkpoint, "classes")
    size, classes = contents["network"]["image_size"], contents["classes"]
    device = pick_device(arguments.device)
    model = placed(network_of(contents), device).eval()
    pixels = torch.stack([read_image(path, size) for path in arguments.images])
    with torch.inference_mode(), pick_backend(arguments.backend):
        logits = torch.cat([model(to_input(part, device)) for part in pixels.split(BATCH)])
    top = logits.softmax(1).topk(min(arguments.top, len(classes)))

    width = max(len("image"), *(len(str(path)) for path in arguments.images))
    print(f"{'image':{width}}  probability  class")
    for path, values, indices in zip(
        arguments.images, top.values.tolist(), top.indices.tolist(), strict=True
    ):
        label = str(path)  # on the first of the image's lines only
        for value, index in zip(values, indices, strict=True):
            print(f"{label:{width}}  {100 * value:9.1f} %  {classes[index]}")
            label = ""
    return 0

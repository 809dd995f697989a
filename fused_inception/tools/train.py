"""`train`: a GoogLeNet of fused Inception modules on real images, or its speed on random ones."""

import argparse
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fused_inception.nn.googlenet import googlenet
from fused_inception.tools.checkpoint import (
    CHECKPOINT,
    checkpoint_file,
    network_of,
    read_checkpoint,
)
from fused_inception.tools.data import (
    Data,
    absolute,
    held_out_batches,
    open_data,
    synthetic_batches,
    to_input,
)
from fused_inception.tools.errors import UserError, output_folder, require
from fused_inception.tools.loop import evaluate, new_optimizer, placed, train_epoch
from fused_inception.tools.options import (
    Options,
    add_option_flags,
    from_flags,
    loading,
    network_arguments,
    pick_backend,
    pick_device,
)
from fused_inception.tools.parity import training_speed
from fused_inception.tools.run import Run, headline, machine, speed_line, write_json
from fused_inception.tools.text import rate

SYNTHETIC_CLASSES = 1000
# parts of a checkpoint that are needed beside its network
TESTED = ("classes", "options")
RESUMED = (*TESTED, "history", "optimizer", "scaler")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_option_flags(parser)
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: a new one in runs)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on with a stopped run: its checkpoint or its folder (default: --out)",
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="CHECKPOINT",
        help="train nothing: test a checkpoint on the held-out images",
    )


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say.

    Returns:
        The exit status: 0, 1 if fused and plain network disagree, 130 after Ctrl-C.

    Raises:
        UserError, OSError: the message says what is wrong with the flags or files.
    """
    given = {name: v for name, v in vars(arguments).items() if name in Options.__dataclass_fields__}
    testing = arguments.evaluate is not None
    if testing and (arguments.resume is not None or arguments.out is not None):
        raise UserError("--evaluate writes nothing: leave out --resume and --out")
    if testing and given.get("data") == "synthetic":
        raise UserError("--evaluate needs real images: --data digits or imagefolder:PATH")
    source = _checkpoint(arguments)
    parts = TESTED if testing else RESUMED
    contents = None if source is None else read_checkpoint(source, *parts)
    saved = None if contents is None else _saved_options(contents, given)
    options = from_flags(given, saved, str(source), testing=testing)
    device = pick_device(options.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # worth it: every batch has the same shape
    with pick_backend(options.backend):
        require("tqdm")
        if options.data == "synthetic":
            return _measure(options, device, arguments.out)
        data = open_data(options.data, options.image_size, flip=options.flip)
        if contents is not None and contents["classes"] != list(data.classes):
            raise UserError(f"{source} was trained on other classes than those of {options.data}")
        if contents is not None and testing:
            return _test(contents, data, options, device)
        if contents is not None:
            _check_files(contents.get("files"), data, options, source)
        require("matplotlib")
        folder = _folder(arguments.out, source, options)
        # to be found from another working directory, too
        options = replace(options, data=absolute(options.data))
        return Run(options, data, device, folder, contents).go()


def _checkpoint(arguments: argparse.Namespace) -> Path | None:
    """The file to start from, if any."""
    path = arguments.evaluate or arguments.resume
    if path is True:  # --resume without a value
        if arguments.out is None:
            raise UserError("--resume needs a checkpoint or a folder, or --out")
        path = arguments.out
    return None if path is None else checkpoint_file(path)


def _saved_options(contents: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Options of a checkpoint; images whose names it knows may have moved to where `given` says."""
    saved = contents["options"]
    data = given.get("data", saved["data"])
    moved = contents.get("files") is not None and data.startswith("imagefolder:")
    same = moved or absolute(data) == absolute(saved["data"])
    return saved | {"data": data} if same else saved


def _check_files(
    files: dict[str, Any] | None, data: Data, options: Options, source: Path | None
) -> None:
    """Other files are split in another way: images held out before would be trained on."""
    if files is not None and files["names"] != data.names:
        raise UserError(
            f"{source} was trained on {files['train']} images and tested on {files['test']}; "
            f"{options.data} has {len(data.train)} and {len(data.test)}, not all of them the same "
            "files: undo what was added, removed or renamed, give their folder by --data, or start "
            "a new run without the checkpoint"
        )


def _folder(out: Path | None, source: Path | None, options: Options) -> Path:
    """The folder to write to, which holds no run but that of `source`; made at the first file."""
    if out is None:
        out = _new_folder(options) if source is None else source.parent
    _refuse_other_run(out, source)
    return out


def _refuse_other_run(out: Path, source: Path | None) -> None:
    held = out / CHECKPOINT
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file, not a folder")
    if not held.exists() or (source is not None and held.samefile(source)):
        return
    if source is None:
        way = f"go on with it by --resume {shlex.quote(str(out))}, or take another --out"
        raise UserError(f"--out {out} holds a run: {way}")
    raise UserError(f"{out} holds another run than {source}: take another --out")


def _new_folder(options: Options) -> Path:
    """A folder in runs that is not there yet."""
    first = Path("runs") / f"{options.data_name}-{options.variant}-{options.image_size}px"
    folder, number = first, 2
    while folder.exists():
        folder, number = first.with_name(f"{first.name}-{number}"), number + 1
    return folder


def _test(contents: dict[str, Any], data: Data, options: Options, device: torch.device) -> int:
    model = placed(network_of(contents), device)
    batches = held_out_batches(data.test, options.batch_size, **loading(options, device))
    tested = evaluate(model, batches, device=device, amp=options.amp, title="testing")
    print(f"test accuracy {100 * tested.accuracy:.2f} % on {tested.images} held-out images")
    return 0


def _measure(options: Options, device: torch.device, out: Path | None) -> int:
    """Images per second on a random batch that stays on the device."""
    if out is None:
        _measured(options, device)
        return 0
    _refuse_other_run(out, None)
    with output_folder(out):
        speed = _measured(options, device)
        metrics = {"images_per_second": speed, "options": asdict(options)}
        write_json(out / "metrics.json", metrics | {"machine": machine(device)})
    return 0


def _measured(options: Options, device: torch.device) -> dict[str, float]:
    network = network_arguments(options, SYNTHETIC_CLASSES)
    torch.manual_seed(options.seed)
    model = placed(googlenet(**network), device)
    print(headline(model, options, device))
    batches = synthetic_batches(
        options.batch_size, options.image_size, SYNTHETIC_CLASSES, device, options.limit
    )
    optimizer = new_optimizer(model, options.optimizer, options.lr, options.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    for number in range(1, options.epochs + 1):
        title = f"epoch {number:2d}/{options.epochs}"
        # the weights must not run away on random labels
        rates = [0.0] * batches.steps
        result = train_epoch(
            model, batches, optimizer, scaler, rates, device=device, amp=options.amp, title=title
        )
        print(f"{title}  {rate(result.images_per_second)} images/s")
    pixels, labels = next(iter(batches))
    speed = training_speed(model, network, to_input(pixels, device), labels, options.amp)
    print(speed_line(speed, options.batch_size))
    return speed

"""`bench`: a fused model beside plain PyTorch and torch.compile, in inference and in training."""

import argparse
import copy
import csv
import json
import math
import platform
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_inception.adapters.fuse import fuse_
from fused_inception.adapters.plain import plain_twin
from fused_inception.tools import sample
from fused_inception.tools.bench_blocks import block_names, block_table, measure_blocks
from fused_inception.tools.bench_pictures import draw_models, draw_rates, draw_speed_ups
from fused_inception.tools.bench_rows import BLOCK_MODES, BlockResult, Result
from fused_inception.tools.blocks import tensors_of
from fused_inception.tools.checkpoint import write_atomically
from fused_inception.tools.errors import UserError, require, writable_folder
from fused_inception.tools.precompile import precompile
from fused_inception.tools.sources import version_of
from fused_inception.tools.text import aligned
from fused_inception.tools.timing import (
    Spread,
    Work,
    calls_per_round,
    cudnn_search,
    in_turn,
    now,
    peak_bytes,
)
from fused_inception.tools.verify import verify

MODES = ("inference", "step")
COMPILE = ("off", "default", "max-autotune")
# on a CPU, where a batch size changes nothing about how it is computed
CPU_VERIFIED = 2
MIN_ROUNDS = 5
RESULTS, TABLE, PICTURE = "bench.json", "bench.csv", "bench.png"
BLOCK_TABLE, SPEED_UPS, RATES = "blocks.csv", "speedup.png", "roofline.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the model, and what is timed."""
    sample.add_model_arguments(parser)
    add = parser.add_argument
    add(
        "--batch-size",
        type=sample.sizes,
        default=[1, 8, 32],
        help="one or more, images in a batch (default: 1,8,32)",
        metavar="N,N",
    )
    add("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    add("--compile", choices=COMPILE, help="torch.compile's mode (default: default, on a CPU off)")
    add("--seconds", type=_seconds, default=1.0, help="time of each measurement (default: 1)")
    add("--blocks", action="store_true", help="each fused block beside plain PyTorch's, too")
    files = f"{RESULTS}, {TABLE}, {PICTURE}; of blocks {BLOCK_TABLE}, {SPEED_UPS}, {RATES}"
    add("--out", type=Path, metavar="FOLDER", help=f"where to write {files}")


def run(arguments: argparse.Namespace) -> int:
    """Print the table; write results where `--out` says, also those before Ctrl-C or an error.

    Raises:
        UserError: no such model, one that `verify` finds wrong, a missing package, or `--out` is
            no folder that can be written to.
    """
    require("tqdm", *(["matplotlib"] if arguments.out else []))
    if arguments.out:
        writable_folder(arguments.out)
    results: list[Result] = []
    blocks: list[BlockResult] = []
    where: dict[str, Any] = {}
    try:
        _measure(arguments, results, blocks, where)
    except BaseException:
        try:
            if results:
                _report(arguments, results, blocks, where)
        except Exception as error:  # the first one says more
            print(f"results could not be written: {error}", file=sys.stderr)
        raise
    _report(arguments, results, blocks, where)
    return 0


def _measure(
    arguments: argparse.Namespace,
    results: list[Result],
    blocks: list[BlockResult],
    where: dict[str, Any],
) -> None:
    """Fill the last three."""
    from tqdm import tqdm

    modes = MODES if arguments.mode == "both" else (arguments.mode,)
    steps = len(arguments.batch_size) * (len(modes) + 1)
    replays = {"compile"} if arguments.compile == "max-autotune" else set()
    with tqdm(total=steps, leave=False) as bar, cudnn_search():
        for batch in arguments.batch_size:
            with sample.prepared(arguments, batch) as (model, x):
                where.update(_where(x.device))
                bar.set_description(f"batch {batch}, compile and verify")
                models = _models(model, x, arguments.compile)
                if arguments.blocks and not results:
                    # of all batches, before anything is counted: a bar never runs backwards
                    bar.total += len(arguments.batch_size) * len(block_names(models["fused"]))
                if x.is_cuda or not results:
                    for mode in modes:
                        _verified(model, x if x.is_cuda else x[:CPU_VERIFIED], mode)
                bar.update()
                for mode in modes:
                    bar.set_description(f"batch {batch}, {mode}")
                    results += measure(models, x, mode, arguments.seconds, replays)
                    bar.update()
                if arguments.blocks:
                    blocks += _blocks(models, x, arguments.seconds, modes, bar)


def _report(
    arguments: argparse.Namespace,
    results: list[Result],
    blocks: list[BlockResult],
    where: dict[str, Any],
) -> None:
    title = f"{arguments.model}, {arguments.dtype}, autocast {arguments.amp}, {where['device']}"
    print(f"{title}, torch {where['torch']}")
    print("\n".join(table(results)))
    if blocks:
        print("\n".join(["", *block_table(blocks)]))
    if arguments.out:
        options = {k: v for k, v in vars(arguments).items() if k not in ("command", "out")}
        head = {"options": options, "environment": where}
        write_json(arguments.out / RESULTS, head, results, blocks)
        write_csv(arguments.out / TABLE, results)
        draw_models(arguments.out / PICTURE, title, results)
        files = [RESULTS, TABLE, PICTURE]
        if blocks:
            write_csv(arguments.out / BLOCK_TABLE, blocks)
            draw_speed_ups(arguments.out / SPEED_UPS, title, blocks)
            draw_rates(arguments.out / RATES, title, blocks)
            files += [BLOCK_TABLE, SPEED_UPS, RATES]
        print(f"written: {', '.join(files)} in {arguments.out}")


def _blocks(
    models: dict[str, nn.Module], x: Tensor, seconds: float, modes: Sequence[str], bar: Any
) -> list[BlockResult]:
    """Those of the fused model in the same modes, each for a quarter of the time of a model."""
    batch = x.shape[0]

    def done(name: str) -> None:
        bar.set_description(f"batch {batch}, block {name}")
        bar.update()

    timed = [BLOCK_MODES[mode] for mode in modes]
    return measure_blocks(models["fused"], models["eager"], x, seconds / 4, timed, done)


def measure(
    models: dict[str, nn.Module],
    x: Tensor,
    mode: str,
    seconds: float,
    replays: Collection[str] = (),
) -> list[Result]:
    """All of `models` in turn, "eager" among them; in `MODES` a step is forward, the mean square of
    the outputs, and backward, without an optimiser. Those of `replays` run CUDA graphs, whose
    memory is not allocated in a call, so that its peak cannot be read."""
    device = x.device
    pieces, first = {}, {}
    for name, model in models.items():
        pieces[name] = _work(model.train(mode == "step"), x, mode, allocates=name not in replays)
        start = now(device)
        pieces[name].run(None)
        first[name] = now(device) - start
    calls = {name: calls_per_round(piece, device) for name, piece in pieces.items()}
    samples = in_turn(pieces, calls, device, seconds, MIN_ROUNDS)
    spreads = {name: Spread.of(found) for name, found in samples.items()}
    return [
        Result(
            batch=x.shape[0],
            mode=mode,
            provider=name,
            milliseconds=spread.median * 1e3,
            p20=spread.p20 * 1e3,
            p80=spread.p80 * 1e3,
            images_per_second=x.shape[0] / spread.median,
            times_as_fast=spreads["eager"].median / spread.median,
            peak_bytes=peak_bytes(pieces[name], device),
            first_call_seconds=first[name],
        )
        for name, spread in spreads.items()
    ]


def _work(model: nn.Module, x: Tensor, mode: str, *, allocates: bool) -> Work:
    def inference(_: None) -> None:
        with torch.no_grad():
            model(x)

    def step(_: None) -> None:
        loss = sum(
            (y.float().square().mean() for _, y in tensors_of(model(x))),
            start=torch.zeros((), device=x.device),
        )
        leaves = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, leaves, allow_unused=True)

    return Work(None, inference if mode == "inference" else step, allocates)


def _verified(model: nn.Module, x: Tensor, mode: str) -> None:
    """As it is timed: a GPU's launches depend on the batch size, and inference has its own."""
    before, step = model.training, mode == "step"
    report = verify(model.train(step), x, gradients=step)
    model.train(before)
    if not report.ok:
        raise UserError(
            f"the fused model is not as near to float64 as PyTorch's own in {mode}, batch "
            f"{len(x)}, so it is not timed: python -m fused_inception verify shows where"
        )


def _models(model: nn.Module, x: Tensor, mode: str | None) -> dict[str, nn.Module]:
    """Fused, plain, and plain compiled; each has parameters of its own."""
    plain = plain_twin(model)
    fused = copy.deepcopy(model)
    fuse_(fused)
    models: dict[str, nn.Module] = {"fused": fused, "eager": plain}
    cuda = x.device.type == "cuda"
    if (mode or ("default" if cuda else "off")) != "off":
        torch.compiler.reset()
        models["compile"] = copy.deepcopy(plain)
        models["compile"].compile(mode=mode)
    if cuda:
        precompile(fused.train(), x)
        with torch.no_grad():
            precompile(fused.eval(), x)
    return models


def table(results: Sequence[Result]) -> list[str]:
    """A line each."""
    rows = [["mode", "provider", "batch", "ms", "20-80 %", "images/s", "times as fast", "peak MB",
             "first call s"]]  # fmt: skip
    for r in results:
        peak = "-" if r.peak_bytes is None else f"{r.peak_bytes / 1e6:.0f}"
        rows.append(
            [
                r.mode, r.provider, str(r.batch), f"{r.milliseconds:.3f}",
                f"{r.p20:.3f}-{r.p80:.3f}", f"{r.images_per_second:,.0f}",
                f"{r.times_as_fast:.2f}", peak, f"{r.first_call_seconds:.1f}",
            ]
        )  # fmt: skip
    return aligned(rows, names=2)


def write_json(
    path: Path, head: dict[str, Any], results: Sequence[Result], blocks: Sequence[BlockResult]
) -> None:
    """With what a reader has to know of them."""
    found = {"results": [asdict(r) for r in results], "blocks": [asdict(r) for r in blocks]}
    text = json.dumps({**head, **found}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, results: Sequence[Result] | Sequence[BlockResult]) -> None:
    """A line each, with a head."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(results[0])])
        writer.writeheader()
        writer.writerows(asdict(r) for r in results)


def _where(device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device)
        if cuda
        else f"{device.type}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "fused_inception": version_of("fused-inception"),
    }


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value

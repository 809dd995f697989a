"""Every kernel on small shapes, forward and backward: what compute-sanitizer watches.

python -m benchmarks.gpu.small_shapes kernels modules stem

With --compile their kernels are compiled, in parallel, and none is run.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fused_inception as fi
from benchmarks.problems import CASES, Case, tensors
from fused_inception import geometry
from fused_inception.geometry import Window
from fused_inception.nn.inception import parameters_of
from fused_inception.tools.precompile import processors
from fused_inception.tuning import dispatch
from fused_inception.tuning.targets import target_of

HEIGHT, WIDTH = 9, 7
IMAGE_SIDE = 35
DTYPES = (torch.bfloat16, torch.float32)


def cases(group: str) -> dict[str, Case]:
    """Those of the benchmarks; of the modules that share all kernels one, and one of odd widths."""
    if group != "modules":
        return CASES[group]
    odd = Case(lambda library: library.Inception(13, 7, 5, 11, 3, 17, 19), (13, 0, 0))
    trunk = Case(lambda library: _Trunk(), (16, 0, 0))
    some = {name: CASES[group][name] for name in ("3a", "3a-bn", "5b-bn")}
    return {**some, "odd": odd, "trunk": trunk}


class _Trunk(nn.Module):
    """Two modules as one operator, a pool between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fi.Inception(16, 8, 16, 24, 8, 16, 8)
        self.second = fi.Inception(56, 8, 8, 8, 8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        modules = [parameters_of(self.first), parameters_of(self.second)]
        pools = {0: Window(3, 2, 0, True)}
        y, _ = fi.functional.inception_trunk(x, modules, pools=pools, global_pool=True)
        return y


def exercise(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Training forward and backward, the gradient of an image too; then inference. As it is, and
    with the library's convolutions wherever there is a choice and sums in stages."""
    for choice in _choices():
        with choice:
            _pass(case, dtype, device)


def _choices() -> tuple[AbstractContextManager[None], ...]:
    return contextlib.nullcontext(), _as_for_large_maps()


@contextlib.contextmanager
def _as_for_large_maps() -> Iterator[None]:
    """The library's convolutions wherever there is a choice, and partial sums in stages."""
    with dispatch.forced(dispatch.PARTS), mock.patch.object(geometry, "MANY_PIXELS", 0):
        yield


def compile_kernels(groups: Sequence[str], device: torch.device) -> str:
    """All kernels of the groups in parallel; what came of it. Under a sanitizer, one by one, they
    take many minutes."""
    # here, as it loads Triton
    from fused_inception.ops import ahead, ahead_triton

    specs: dict[Any, None] = {}
    for choice in _choices():
        with choice:
            for case in (case for group in groups for case in cases(group).values()):
                for dtype in DTYPES:
                    module, x = _module_and_input(case, dtype, device)
                    for training in (True, False):
                        calls = ahead.calls_of(module.train(training), x, training=training)
                        found = ahead_triton.kernels_of(calls, target_of(device))
                        specs |= dict.fromkeys(found)
    compiled, errors = ahead_triton.compile_kernels([*specs], processors())
    failed = "".join(f"\n{kernel} does not compile: {error}" for kernel, error in errors.items())
    return f"{len(specs)} kernels, {len(compiled)} compiled{failed}"


def _pass(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    module, x = _module_and_input(case, dtype, device)
    outputs = tensors(module(x))
    gradients = [torch.randn_like(y) for y in outputs]
    torch.autograd.grad(outputs, [x, *module.parameters()], gradients)
    with torch.no_grad():
        module.eval()(x)


def _module_and_input(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = case.make(fi).to(device, dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)
    sides = (IMAGE_SIDE, IMAGE_SIDE) if case.image else (HEIGHT, WIDTH)
    x = torch.randn(2, case.input[0], *sides, device=device).to(dtype)
    return module, x.contiguous(memory_format=torch.channels_last).requires_grad_()


def main(arguments: Sequence[str]) -> int:
    """Run the groups on the GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_shapes")
    parser.add_argument("groups", nargs="+", choices=[g for g in CASES if g != "network"])
    parser.add_argument("--compile", action="store_true", help="and run nothing")
    options, device = parser.parse_args(arguments), torch.device("cuda")
    if options.compile:
        print(compile_kernels(options.groups, device))
        return 0
    for group in options.groups:
        for name, case in cases(group).items():
            for dtype in DTYPES:
                print(group, name, dtype, flush=True)
                exercise(case, dtype, device)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

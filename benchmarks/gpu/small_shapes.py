"""Every kernel on small shapes, forward and backward: what compute-sanitizer watches.

python -m benchmarks.gpu.small_shapes kernels modules stem
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

import fused_inception as fi
from benchmarks.problems import CASES, Case, tensors
from fused_inception.tuning import dispatch

HEIGHT, WIDTH = 9, 7
IMAGE_SIDE = 35
DTYPES = (torch.bfloat16, torch.float32)


def cases(group: str) -> dict[str, Case]:
    """Those of the benchmarks; of the modules that share all kernels one, and one of odd widths."""
    if group != "modules":
        return CASES[group]
    odd = Case(lambda library: library.Inception(13, 7, 5, 11, 3, 17, 19), (13, 0, 0))
    return {**{name: CASES[group][name] for name in ("3a", "3a-bn", "5b-bn")}, "odd": odd}


def exercise(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    """Training forward and backward, the gradient of an image too; then inference. As it is, and
    with the library's convolutions wherever there is a choice."""
    for choice in (contextlib.nullcontext(), dispatch.forced(dispatch.PARTS)):
        with choice:
            _pass(case, dtype, device)


def _pass(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    module = case.make(fi).to(device, dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.1)
    sides = (IMAGE_SIDE, IMAGE_SIDE) if case.image else (HEIGHT, WIDTH)
    x = torch.randn(2, case.input[0], *sides, device=device).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    outputs = tensors(module(x))
    gradients = [torch.randn_like(y) for y in outputs]
    torch.autograd.grad(outputs, [x, *module.parameters()], gradients)
    with torch.no_grad():
        module.eval()(x)


def main(groups: Sequence[str]) -> int:
    """Run the groups on the GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.small_shapes")
    parser.add_argument("groups", nargs="+", choices=[g for g in CASES if g != "network"])
    device = torch.device("cuda")
    for group in parser.parse_args(groups).groups:
        for name, case in cases(group).items():
            for dtype in DTYPES:
                print(group, name, dtype, flush=True)
                exercise(case, dtype, device)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Which lines of a module's kernels waste sectors of global memory or passes over shared memory:

python -m tests.emulator sm_90 3b --batch 32
"""

import argparse

import torch

from fused_inception import backend, functional
from fused_inception.geometry import GOOGLENET
from fused_inception.tuning.targets import TARGETS
from tests.emulator.launch import emulated
from tests.emulator.traffic import Traffic

SIDES = {"3": 28, "4": 14, "5": 7}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__)
    parser.add_argument("target", choices=[t for t in TARGETS if t in ("sm_80", "sm_89", "sm_90")])
    parser.add_argument("layer", choices=GOOGLENET)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--programs", type=int, default=5, help="of each launch, evenly spread")
    options = parser.parse_args()
    traffic = Traffic()
    with emulated(options.target, traffic, options.programs), backend("triton"):
        _step(options.layer, options.batch, DTYPES[options.dtype])
    print(traffic.table())


def _step(layer: str, batch: int, dtype: torch.dtype) -> None:
    """Forward and all gradients."""
    dims, side = GOOGLENET[layer], SIDES[layer[0]]
    x = torch.zeros(batch, dims.in_channels, side, side, dtype=dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    parameters = []
    for shape in dims.filter_shapes:
        parameters += [torch.zeros(shape), torch.zeros(shape[0])]
    y = functional.inception(x, *(p.to(dtype).requires_grad_() for p in parameters))
    y.backward(torch.zeros_like(y))


if __name__ == "__main__":
    main()

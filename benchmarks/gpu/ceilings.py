"""What the device can do at most: the figures that every share of a roofline is a share of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.parts import Item
from benchmarks.providers import captured
from fused_inception.tools.timing import Spread, Work, calls_per_round, in_turn
from fused_inception.tuning.configs import Tile
from fused_inception.tuning.heuristic import Operands, stages
from fused_inception.tuning.targets import target_of

GEMM_TILE = dict(BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, GROUP=8)
BF16 = Operands(2, "tf32")
GRAPH_LAUNCHES = 1000
MIN_ROUNDS = 10


@dataclass(frozen=True)
class Sizes:
    """Of the measurements; a test takes small ones."""

    copied: int = 2**30  # bytes
    gemm: int = 8192
    streamed: int = 2**24  # bytes, a third of a large L2 cache
    stream_block: int = 4096  # int32
    programs: int = 1056  # 8 for each of 132 processors
    tile: dict[str, int] | None = None


def items(options: dict[str, Any], device: torch.device) -> list[Item]:
    """One for each figure."""
    return [
        Item(name, lambda turn, run=run: run(device, options["seconds"]))
        for name, run in CEILINGS.items()
    ]


def copy(device: torch.device, seconds: float, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Bytes read and written by a copy inside the device."""
    source = torch.randn(sizes.copied // 4, device=device)
    target = torch.empty_like(source)
    piece = Work(None, lambda _: target.copy_(source))
    return measured(piece, device, seconds, 2 * sizes.copied, "bytes/s")


def library_gemm(device: torch.device, seconds: float, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """A square product of bf16 matrices by PyTorch's library."""
    a, b = _matrices(device, sizes.gemm)
    c = torch.empty_like(a)
    piece = Work(None, lambda _: torch.mm(a, b, out=c))
    return measured(piece, device, seconds, 2 * sizes.gemm**3, "FLOP/s")


def triton_gemm(device: torch.device, seconds: float, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """The same in Triton, in tiles of 128 x 256."""
    from benchmarks.gpu.ceiling_kernels import _gemm_kernel

    a, b = _matrices(device, sizes.gemm)
    c, n, tile = torch.empty_like(a), sizes.gemm, sizes.tile or GEMM_TILE
    grid = (n // tile["BLOCK_M"] * (n // tile["BLOCK_N"]),)
    depth = stages(
        [Tile(tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"])], BF16, target_of(device)
    )

    def run(_: None) -> None:
        _gemm_kernel[grid](a, b, c, n, N=n, K=n, **tile, num_warps=8, num_stages=depth)

    run(None)
    close(c, a.float() @ b.float())
    return measured(Work(None, run), device, seconds, 2 * n**3, "FLOP/s")


def stream(device: torch.device, seconds: float, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """Bytes that all processors together read of what lies in the L2 cache."""
    from benchmarks.gpu.ceiling_kernels import _stream_kernel

    x = torch.arange(sizes.streamed // 4, dtype=torch.int32, device=device)
    y = torch.zeros(sizes.programs, dtype=torch.int32, device=device)
    blocks = x.numel() // sizes.stream_block

    def run(_: None) -> None:
        _stream_kernel[(sizes.programs,)](x, y, blocks, BLOCK=sizes.stream_block, num_warps=8)

    run(None)
    assert (y == x.max()).all(), "a program has not read everything"
    amount = sizes.programs * sizes.streamed
    return measured(Work(None, run), device, seconds, amount, "bytes/s")


def launch(device: torch.device, seconds: float) -> dict[str, Any]:
    """Seconds of a kernel that does next to nothing, among many in a CUDA graph."""
    from benchmarks.gpu.ceiling_kernels import _one_kernel

    y = torch.zeros(1, dtype=torch.int32, device=device)

    def run(_: None) -> Tensor:
        for _i in range(GRAPH_LAUNCHES):
            _one_kernel[(1,)](y, num_warps=1)
        return y

    piece, _ = captured(Work(None, run))
    facts = measured(piece, device, seconds, GRAPH_LAUNCHES, "1/s")
    # of seconds the low ones are those of high rates
    rates = {"value": "value", "p20": "p80", "p80": "p20"}
    inverse = {name: float(f"{1 / facts[rate]:.4g}") for name, rate in rates.items()}
    return facts | inverse | {"unit": "s"}


CEILINGS: dict[str, Callable[[torch.device, float], dict[str, Any]]] = {
    "copy": copy,
    "bf16 GEMM, library": library_gemm,
    "bf16 GEMM, Triton 128x256": triton_gemm,
    "L2 stream": stream,
    "launch in a graph": launch,
}


def _matrices(device: torch.device, n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=draw, device=device) for _ in range(2))
    return a.bfloat16(), b.bfloat16()


def close(got: Tensor, want: Tensor) -> None:
    """A result of bf16 products; what is wrong is not timed."""
    error = ((got.float() - want).norm() / want.norm()).item()
    assert error < 0.01, f"relative error {error:.3g}"


def measured(
    piece: Work, device: torch.device, seconds: float, amount: float, unit: str
) -> dict[str, Any]:
    """`amount` by the median time of a call."""
    calls = {"it": calls_per_round(piece, device)}
    samples = in_turn({"it": piece}, calls, device, seconds, MIN_ROUNDS)["it"]
    spread = Spread.of(samples)
    value, low, high = (amount / s for s in (spread.median, spread.p80, spread.p20))
    return {
        "value": float(f"{value:.4g}"),
        "p20": float(f"{low:.4g}"),
        "p80": float(f"{high:.4g}"),
        "unit": unit,
        "calls_per_round": calls["it"],
        "samples_s": [float(f"{s:.4g}") for s in samples],
    }

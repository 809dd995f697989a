"""The ceilings' kernels: right in the interpreter, compiled with tensor cores and wide loads."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import ceilings
from benchmarks.gpu.parts import Turn
from tests.conftest import INTERPRETED

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SMALL = ceilings.Sizes(
    copied=2**12, gemm=32, streamed=2**9, stream_block=32, programs=3, conv_batch=1,
    tile=dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=1),
)  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="gpu_check measures them at their true size")
@pytest.mark.parametrize("name", ["copy", "library_gemm", "triton_gemm", "stream", "library_conv"])
def test_ceilings_on_tiny_shapes(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "MIN_ROUNDS", 2)
    facts = getattr(ceilings, name)(device, 0.0, SMALL)
    assert 0 < facts["p20"] <= facts["value"] <= facts["p80"]
    assert facts["unit"] == ("bytes/s" if name in ("copy", "stream") else "FLOP/s")
    assert len(facts["samples_s"]) >= 2
    amounts = {"copy": 2**13, "library_gemm": 2**16, "triton_gemm": 2**16, "stream": 3 * 2**9}
    if name in amounts:
        seconds = sorted(facts["samples_s"])
        assert seconds[0] <= amounts[name] / facts["value"] * 1.01
        assert amounts[name] / facts["value"] <= seconds[-1] * 1.01


def test_a_launch_is_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spread too; the graph is a stub that takes what its rounds say."""
    from benchmarks.gpu import ceiling_kernels

    samples = [0.001, 0.002, 0.004, 0.008, 0.016]
    monkeypatch.setattr(ceiling_kernels, "_one_kernel", None)
    monkeypatch.setattr(ceilings, "captured", lambda work: (work, None))
    monkeypatch.setattr(ceilings, "calls_per_round", lambda *_: 1)
    monkeypatch.setattr(ceilings, "in_turn", lambda *_: {"it": samples})
    facts = ceilings.launch(torch.device("cpu"), 0.0)
    assert facts["unit"] == "s"
    spread = [facts[name] * ceilings.GRAPH_LAUNCHES for name in ("p20", "value", "p80")]
    assert spread == pytest.approx([0.0018, 0.004, 0.0096], rel=1e-3)


def test_wrong_results_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import ceiling_kernels

    class Idle:
        def __getitem__(self, grid: object) -> object:
            return lambda *args, **constants: None

    monkeypatch.setattr(ceiling_kernels, "_stream_kernel", Idle())
    with pytest.raises(AssertionError, match="has not read everything"):
        ceilings.stream(torch.device("cpu"), 0.0, SMALL)
    with pytest.raises(AssertionError, match="relative error"):
        ceilings._close(torch.ones(2, 2), 1.1 * torch.ones(2, 2))


def test_every_ceiling_is_an_item(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []
    for name in ceilings.CEILINGS:
        monkeypatch.setitem(
            ceilings.CEILINGS, name, lambda device, seconds: measured.append(seconds)
        )
    items = ceilings.items({"seconds": 0.25}, torch.device("cpu"))
    assert [item.key for item in items] == list(ceilings.CEILINGS)
    for item in items:
        item.run(Turn(time.time(), lambda facts: None))
    assert measured == [0.25] * 7


COMPILE = """
import json
from benchmarks.gpu.ceilings import GEMM_TILE, Sizes
from tests.compiled.build import build
from tests.compiled.collect import Specialisation

def spec(name, types, constants, aligned):
    return Specialisation(
        "benchmarks.gpu.ceiling_kernels", name, "sm_90", tuple(types.items()),
        tuple(constants.items()), tuple((i, (("tt.divisibility", 16),)) for i in aligned), 8,
    )

n = Sizes().gemm
constants = dict(N=n, K=n, **GEMM_TILE)
types = dict(a_ptr="*bf16", b_ptr="*bf16", c_ptr="*bf16", k_size="i32")
gemm = spec("_gemm_kernel", types | dict.fromkeys(constants, "constexpr"), constants, range(4))
types = dict(x_ptr="*i32", y_ptr="*i32", n_blocks="i32", BLOCK="constexpr")
stream = spec("_stream_kernel", types, {"BLOCK": Sizes().stream_block}, range(3))
one = spec("_one_kernel", {"y_ptr": "*i32"}, {}, range(1))
for s in (gemm, stream, one):
    b = build(s)
    assert not b.error, b.error
    code = b.code
    print(json.dumps({"kernel": s.kernel, "stack": code.stack, "registers": code.registers,
                      "tensor_cores": code.tensor_cores, "shared": b.shared,
                      "loads": [load.narrowest for load in code.loads]}))
"""


def test_ceiling_kernels_compile_for_sm_90() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gemm, stream, one = map(json.loads, done.stdout.splitlines())
    assert gemm["stack"] == stream["stack"] == one["stack"] == 0
    assert set(gemm["tensor_cores"]) == {"HGMMA"}
    assert gemm["shared"] <= 232448
    assert set(gemm["loads"]) == set(stream["loads"]) == {16}

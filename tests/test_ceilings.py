"""The ceilings' kernels: right in the interpreter, compiled with tensor cores and wide loads."""

import json
import time
from typing import Any

import pytest
import torch

from benchmarks.gpu import ceilings, forms
from benchmarks.gpu.parts import Turn
from benchmarks.gpu.table import PARTS
from fused_inception.tools.timing import Work
from fused_inception.tuning.configs import Tile
from tests.conftest import INTERPRETED
from tests.processes import output_of

pytest.importorskip("triton")

from fused_inception.kernels import conv2d

SMALL = ceilings.Sizes(
    copied=2**12, gemm=32, streamed=2**9, stream_block=32, programs=3,
    tile=dict(BLOCK_M=16, BLOCK_N=32, BLOCK_K=16, GROUP=1),
)  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="gpu_check measures them at their true size")
@pytest.mark.parametrize("name", ["copy", "library_gemm", "triton_gemm", "stream"])
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
        ceilings.close(torch.ones(2, 2), 1.1 * torch.ones(2, 2))


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
    assert measured == [0.25] * 5


TINY = forms.Shape(5, 32, 24, (Tile(32, 32, 16),))


@pytest.mark.skipif(not INTERPRETED, reason="gpu_check measures them at their true size")
def test_forms_of_a_3x3_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compared with fp32 before it is timed; the last tile of pixels is not full."""
    monkeypatch.setattr(ceilings, "MIN_ROUNDS", 2)
    conv = forms.Convolution.draw(TINY, 3, torch.float16, device)
    for form in forms.forms_of(TINY).values():
        facts = forms.speed(conv, form, device, 0.0)
        seconds = sorted(facts["samples_s"])
        flops = 2 * 3 * 25 * 9 * 32 * 24
        assert facts["unit"] == "FLOP/s"
        assert seconds[0] <= flops / facts["value"] * 1.01
        assert flops / facts["value"] <= seconds[-1] * 1.01

    pack = conv2d.pack_filter

    def backwards(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        w, b = pack(*arguments)
        return w.flip(1).contiguous(), b

    monkeypatch.setattr(conv2d, "pack_filter", backwards)
    with pytest.raises(AssertionError, match="relative error"):
        conv.by_pointers()
    with pytest.raises(AssertionError, match="relative error"):
        conv.by_descriptors(TINY.tiles[0])


def test_forms_on_a_gpu_are_calls_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    conv = forms.Convolution.draw(TINY, 1, torch.float32, torch.device("cpu"))
    once = Work(None, lambda _: calls.append(1))
    monkeypatch.setattr(forms, "captured", lambda work: (work, None))
    monkeypatch.setattr(forms, "measured", lambda piece, *rest: (piece.run(None), rest))
    _, (_, seconds, flops, unit) = forms.speed(conv, lambda _: once, torch.device("cuda"), 0.5)
    assert (seconds, flops, unit) == (0.5, len(calls) * conv.flops, "FLOP/s")
    assert len(calls) == forms.GRAPH_CALLS


def test_every_form_is_an_item() -> None:
    items = PARTS["ceilings"].items({"seconds": 0.25}, torch.device("cpu"))
    keys = [item.key for item in items[len(ceilings.CEILINGS) :]]
    assert len(set(keys)) == 2 * 2 * 4
    assert keys[3] == "3x3 14x14 96 to 208, N = 256, descriptors 256x128x32"


COMPILE = """
import json
import torch
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor
from benchmarks.gpu.ceiling_kernels import _descriptor_conv_kernel
from benchmarks.gpu.forms import SHAPES, tile_constants
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS
from tests.compiled.collect import StubDriver
from tests.compiled.machine_code import read_nvidia
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

def compiled(shape, tile, target):
    driver.set_active(StubDriver(target))
    x, w, y = (torch.empty(a, b, dtype=torch.bfloat16) for a, b in (
        ((shape.side + 1) ** 2, shape.c_in), (shape.c_out, 9 * shape.c_in),
        (shape.side**2, shape.c_out),
    ))
    return _descriptor_conv_kernel.warmup(
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(w, [tile.block_n, tile.block_k]),
        torch.empty(shape.c_out), y, x.shape[0], shape.side, shape.side,
        9 * shape.c_in // tile.block_k, C_IN=shape.c_in, C_OUT=shape.c_out,
        **tile_constants(tile, Operands(2, "tf32"), TARGETS[target]), grid=(1,),
    )

for shape in SHAPES:
    for tile in shape.tiles:
        kernel = compiled(shape, tile, "sm_90")
        code = read_nvidia(kernel.asm["cubin"], kernel.asm["ptx"])
        (loop,) = code.loops
        print(json.dumps({"kernel": f"{shape.side} {tile}", "stack": code.stack,
                          "registers": code.registers, "tensor_cores": code.tensor_cores,
                          "shared": kernel.metadata.shared, "issue_ratio": loop.issue_ratio}))
for name, target in TARGETS.items():
    for shape in SHAPES:
        assert compiled(shape, shape.tiles[-1], name).metadata.shared <= target.shared_bytes, name
"""


def test_ceiling_kernels_compile_for_sm_90() -> None:
    gemm, stream, one, *convs = map(json.loads, output_of("-c", COMPILE).splitlines())
    assert gemm["stack"] == stream["stack"] == one["stack"] == 0
    assert set(gemm["tensor_cores"]) == {"HGMMA"}
    assert gemm["shared"] <= 232448
    assert set(gemm["loads"]) == set(stream["loads"]) == {16}
    assert len(convs) == 4
    for conv in convs:
        assert conv["stack"] == 0
        assert set(conv["tensor_cores"]) == {"HGMMA"}
        assert conv["shared"] <= 232448
        assert conv["issue_ratio"] < 0.45

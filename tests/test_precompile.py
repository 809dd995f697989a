"""`precompile` finds what a step launches without running it, and leaves it in Triton's cache."""

import copy
import dataclasses
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_inception as fi
from fused_inception.ops import ahead
from fused_inception.ops.problem import allows_tf32
from fused_inception.tools import parity, run
from fused_inception.tools.data import Data
from fused_inception.tools.options import from_flags
from fused_inception.tuning.targets import standing_for, target_of
from tests.conftest import needs_triton
from tests.processes import output_of


def small_model() -> nn.Sequential:
    """A module with biases, one with BatchNorm, a pool; a gradient for the input of each."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1),
        fi.Inception(8, 8, 8, 8, 8, 8, 8),
        fi.MaxPool2d(3, 2),
        fi.Inception(32, 8, 8, 8, 8, 8, 8, norm="batch"),
    )


def images(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, device=device).to(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize("training", [True, False])
def test_traced_launches_are_those_of_a_step(device: torch.device, training: bool) -> None:
    """Kernel by kernel, with grids and constants, in a step that really runs."""
    model, x = small_model().to(device).train(training), images(device)
    with fi.backend("triton"):
        calls = ahead.calls_of(model, x, training=training)
        # tensors without data are no GPU's: they stand for the one that runs
        with standing_for(target_of(device)), fi.record_launches() as traced:
            for call in calls:
                call.run()
        with fi.record_launches() as launched, torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.backward(torch.ones_like(y))

    def told(launches: list[fi.Launch]) -> list[str]:
        return sorted(map(str, launches))

    assert len(launched) > 5
    assert told(traced) == told(launched)


@needs_triton
def test_tracing_changes_nothing(device: torch.device) -> None:
    model, x = small_model().to(device).train(), images(device)
    model.append(nn.Dropout(0.5))
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    pointers = [p.data_ptr() for p in model.parameters()]
    with fi.backend("triton"):
        assert len(ahead.calls_of(model, x, training=True)) == 6
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.grad is None for p in model.parameters())


@needs_triton
def test_autocast_decides_the_dtype(device: torch.device) -> None:
    model, x = small_model().to(device).eval(), images(device)
    with fi.backend("triton"), torch.autocast(device.type, torch.bfloat16):
        first, *_ = ahead.calls_of(model, x, training=False)
    assert first.args[0].dtype == torch.bfloat16
    assert first.args[1][0].dtype == torch.float32


def test_values_that_decide_are_an_error() -> None:
    class Deciding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(RuntimeError, match="Deciding"):
        ahead.calls_of(Deciding(), images(), training=True)


def test_on_a_cpu_nothing_is_compiled_and_the_report_says_so() -> None:
    report = fi.precompile(small_model(), images())
    assert (report.kernels, report.compiled) == (0, 0)
    assert str(report) == "precompile: nothing to do, cpu tensors launch no compiled kernel"


PROBE = """
import json
import sys

import torch
from triton import knobs
from triton.runtime import driver

import fused_inception as fi
from fused_inception.backend import assume_triton
from fused_inception.ops import ahead
from fused_inception.ops.ahead_triton import compile_kernels, kernels_of
from fused_inception.tuning.targets import TARGETS
from tests.compiled.collect import StubDriver

driver.set_active(StubDriver("sm_90"))


def calls_of(model, x, training=False):
    with assume_triton():
        return ahead.calls_of(model.train(training), x, training=training)


sm_90 = TARGETS["sm_90"]
calls = calls_of(fi.Inception(8, 8, 8, 8, 8, 8, 8).half(), torch.randn(1, 8, 4, 4).half())
specs = kernels_of(calls, sm_90)
"""


def run_compiling(code: str, folder: Path, *arguments: str) -> Any:
    """What `code` prints as JSON, in a process whose kernels are compiled, for a GPU that is not
    there."""
    words = ("-W", "error", "-c", PROBE + code, *arguments)
    return json.loads(output_of(*words, TRITON_CACHE_DIR=str(folder)).splitlines()[-1])


@needs_triton
@pytest.mark.parametrize(("version", "built"), [("3.6.0", True), ("3.7.1", False)])
def test_launchers_of_triton_3_6_are_built_too(
    monkeypatch: pytest.MonkeyPatch, version: str, built: bool
) -> None:
    """A C program for each signature, which a first launch would wait for."""
    import triton
    from triton.backends.nvidia import driver

    from fused_inception.kernels.ahead import Specialisation

    found: list[Any] = []
    kernel = types.SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(driver, "CudaLauncher", lambda *facts: found.append(facts))
    monkeypatch.setattr(Specialisation, "compile", lambda self: kernel)
    target = ("cuda", 90, 32)
    spec = Specialisation("module", "kernel", target, (), (), (), ())
    spec.compile_for_launch()
    dataclasses.replace(spec, target=("hip", "gfx942", 64)).compile_for_launch()
    assert found == ([("source", "metadata")] if built else [])


COMPILE = """
import dataclasses

from fused_inception.kernels.ahead import compile_all

missing, errors = compile_kernels(specs, 1)
again, _ = compile_kernels(specs, 1)

# what a launch does, up to the launch
found = []
knobs.compilation.listener = lambda **facts: found.append(facts["cache_hit"])
for call in calls:
    call.run()

broken = dataclasses.replace(specs[0], constants=())
answers = []
compile_all([broken, specs[0]], 1, lambda spec, error: answers.append(error))
print(json.dumps([len(specs), len(missing), errors, len(again), found, answers]))
"""


@needs_triton
def test_compiled_kernels_are_found_by_the_launches(tmp_path: Path) -> None:
    """Same key in Triton's cache: three kernels, the packing one included. One that does not
    compile is told, and the process goes on."""
    specs, missing, errors, again, found, answers = run_compiling(COMPILE, tmp_path)
    assert (specs, missing, errors, again) == (3, 3, {}, 0)
    assert found == [True, True, True]
    assert "Error" in answers[0]
    assert answers[1] is None


BATCHES = """
network = fi.googlenet("paper", num_classes=10, init_weights=False).to(torch.bfloat16)


def kernels(batch, training):
    x = torch.empty(batch, 3, 224, 224, dtype=torch.bfloat16)
    return set(kernels_of(calls_of(network, x, training), sm_90))


trained = {batch: kernels(batch, True) for batch in (32, 33, 48, 64)}
tested = {batch: kernels(batch, False) for batch in (48, 64)}
print(json.dumps([
    len(trained[33] - trained[32]), len(trained[48] - trained[64]),
    len(tested[48] - tested[64]), len(trained[64] - trained[32]),
]))
"""


@needs_triton
def test_another_batch_size_of_the_same_bucket_compiles_nothing(tmp_path: Path) -> None:
    """Sizes and strides that change with the batch are not specialised on, and configurations go by
    powers of two; the next power of two takes other tiles for a part of the kernels."""
    *same_bucket, next_bucket = run_compiling(BATCHES, tmp_path)
    assert same_bucket == [0, 0, 0]
    assert 0 < next_bucket < 40


def test_training_run_precompiles_both_modes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[tuple[bool, bool, tuple[int, ...]]] = []

    def note(model: nn.Module, x: torch.Tensor) -> str:
        seen.append((model.training, torch.is_grad_enabled(), tuple(x.shape)))
        return "noted"

    monkeypatch.setattr(run, "precompile", note)
    given = {"image_size": 48, "batch_size": 3, "epochs": 1}
    options = from_flags(given, None, "", testing=False)
    data: Any = Data(("one", "two"), [None] * 7, [None] * 5)
    run.Run(options, data, torch.device("cpu"), tmp_path, None)._precompile()
    assert seen == [
        (True, True, (3, 3, 48, 48)),
        (False, False, (3, 3, 48, 48)),
        (False, False, (2, 3, 48, 48)),
    ]


@pytest.mark.parametrize("mode", ["fp32", "tf32", "bf16"])
def test_the_parity_check_compiles_its_kernels_first(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of its batch, in training, in the types that it compares in."""
    asked: list[tuple[Any, ...]] = []

    def note(model: nn.Module, x: torch.Tensor) -> None:
        amp = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        asked.append((model.training, len(x), amp, allows_tf32()))

    monkeypatch.setattr(parity, "precompile", note)
    network = {"variant": "paper", "num_classes": 3, "aux_logits": False, "image_size": 32}
    model = fi.googlenet(**network).eval()
    parity.compare(model, network, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), mode)
    amp = torch.bfloat16 if mode == "bf16" else None
    assert asked == [(True, 2, amp, mode != "fp32")]
    assert not model.training
    assert allows_tf32()

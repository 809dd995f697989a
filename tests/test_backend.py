"""Which implementation runs, and why."""

import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_inception as fi
from fused_inception.backend import ENVIRONMENT_VARIABLE, choose, resolve, selected
from tests.cases import SMALL, InceptionCase
from tests.conftest import INTERPRETED, needs_triton

ROOT = Path(__file__).resolve().parent.parent
X = torch.zeros(1)
BACKEND = sys.modules["fused_inception.backend"]


@pytest.fixture(autouse=True)
def _no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(BACKEND, "_warned", set())


def test_the_context_manager_and_its_module_share_a_name() -> None:
    assert fi.backend is BACKEND.backend


@pytest.mark.parametrize(
    ("device_type", "dtype", "expected"),
    [
        ("cpu", torch.float32, "torch"),
        ("mps", torch.float32, "torch"),
        ("meta", torch.float32, "torch"),
        ("cuda", torch.float64, "torch"),
        ("cuda", torch.float32, "triton"),
        ("cuda", torch.bfloat16, "triton"),
    ],
)
def test_auto(
    device_type: str, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKEND, "TRITON_INSTALLED", True)
    assert choose("auto", torch.device(device_type), dtype) == expected


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_torch(device_type: str, dtype: torch.dtype) -> None:
    assert choose("torch", torch.device(device_type), dtype) == "torch"


def test_cuda_without_triton_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND, "TRITON_INSTALLED", False)
    with pytest.warns(RuntimeWarning, match="Triton is not installed"):
        assert choose("auto", torch.device("cuda"), torch.float32) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", torch.device("cuda"), torch.float32) == "torch"


@needs_triton
def test_old_gpus_take_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for them, without tensor cores, and bf16 in software."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(BACKEND, "_capability", lambda index: (7, 5))
    monkeypatch.setattr(BACKEND, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"compute capability 8\.0 or newer, got 7\.5"):
        assert choose("auto", device, torch.float16) == "torch"
    with pytest.raises(fi.BackendError, match=r"cannot run on cuda:0: .* got 7\.5"):
        choose("triton", device, torch.float16)
    assert choose("torch", device, torch.float16) == "torch"
    monkeypatch.setattr(BACKEND, "_capability", lambda index: (8, 0))
    assert choose("auto", device, torch.float16) == "triton"


@needs_triton
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_triton_with_interpreter(device_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", torch.device(device_type), torch.float16) == "triton"


@needs_triton
def test_triton_on_cpu_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose("triton", torch.device("cuda"), torch.float32) == "triton"
    with pytest.raises(fi.BackendError, match="TRITON_INTERPRET=1"):
        choose("triton", torch.device("cpu"), torch.float32)


@needs_triton
def test_triton_on_another_device() -> None:
    with pytest.raises(fi.BackendError, match="got mps"):
        choose("triton", torch.device("mps"), torch.float32)


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BACKEND, "TRITON_INSTALLED", False)
    with pytest.raises(fi.BackendError, match="install triton"):
        choose("triton", torch.device("cuda"), torch.float32)


def test_triton_in_float64() -> None:
    with pytest.raises(TypeError, match="got float64"):
        choose("triton", torch.device("cuda"), torch.float64)


def test_backend_error_is_a_runtime_error() -> None:
    assert issubclass(fi.BackendError, RuntimeError)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="auto, triton, torch, got 'cudnn'"):
        fi.backend("cudnn")


def test_unknown_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match=r"FUSED_INCEPTION_BACKEND must be .* got 'cudnn'"):
        resolve(X)


def test_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selected() == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert selected() == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    assert selected() == "auto"


def test_block_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    with fi.backend("torch"):
        assert selected() == "torch"
    assert selected() == "triton"


def test_blocks_nest_and_leave_by_errors() -> None:
    with fi.backend("torch"):
        with pytest.raises(KeyError), fi.backend("triton"):
            raise KeyError
        assert selected() == "torch"
    assert selected() == "auto"


def test_one_object_may_be_entered_twice() -> None:
    chosen = fi.backend("torch")
    with chosen:
        with fi.backend("triton"), chosen:
            assert selected() == "torch"
        assert selected() == "torch"
    assert selected() == "auto"


def test_a_block_holds_for_its_thread() -> None:
    seen: list[str] = []
    with fi.backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(selected()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need Triton's interpreter")
def test_backward_uses_what_forward_chose() -> None:
    data = InceptionCase("", SMALL, 1, 2, 2).tensors(torch.float32)
    data.x.requires_grad_()
    parameters = [t for pair in zip(data.filters, data.biases, strict=True) for t in pair]
    with fi.backend("triton"):
        y = fi.functional.inception(data.x, *parameters)
    with fi.backend("torch"), fi.record_launches() as launches:
        y.backward(data.dy)
    assert launches
    with fi.record_launches() as launches:
        with fi.backend("torch"):
            y = fi.functional.inception(data.x, *parameters)
        with fi.backend("triton"):
            y.backward(data.dy)
    assert launches == []


def test_compiled_code_follows_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo guards on the block and on the environment, set or not, and recompiles."""
    torch._dynamo.reset()
    monkeypatch.setattr(BACKEND, "TRITON_INSTALLED", True)
    monkeypatch.setattr(BACKEND, "_interpreter_is_on", lambda: True)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        return x + (1 if resolve(x) == "triton" else 0)

    def run() -> str:
        return "triton" if compiled(X).item() else "torch"

    assert run() == "torch"
    with fi.backend("triton"):
        assert run() == "triton"
    assert run() == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    assert run() == "triton"
    with fi.backend("torch"):
        assert run() == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert run() == "torch"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    seen: list[str] = []
    thread = threading.Thread(target=lambda: seen.append(run()))
    with fi.backend("torch"):
        thread.start()
        thread.join()
    assert seen == ["triton"]
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert run() == "torch"


def test_a_block_inside_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(BACKEND, "TRITON_INSTALLED", True)
    monkeypatch.setattr(BACKEND, "_interpreter_is_on", lambda: True)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        with fi.backend("triton"):
            inside = x + (1 if resolve(x) == "triton" else 0)
        return inside + (10 if resolve(x) == "triton" else 0)

    assert compiled(X).item() == 1
    assert selected() == "auto"


def test_public_call_without_interpreter_is_a_clear_error() -> None:
    """In a process of its own: this one may have the interpreter on."""
    code = (
        "import torch, fused_inception as fi\n"
        "with fi.backend('triton'):\n"
        "    try:\n"
        "        fi.functional.global_avg_pool2d(torch.ones(1, 1, 2, 2))\n"
        "    except fi.BackendError as error:\n"
        "        print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={}, capture_output=True, text=True, check=True
    )
    assert "interpreter" in run.stdout or "install triton" in run.stdout


@needs_triton
def test_more_pixels_than_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of as many elements in fewer pixels they take care."""

    def on_a_gpu(name: str, device: torch.device, dtype: torch.dtype) -> str:
        return choose(name, torch.device("cuda") if name == "auto" else device, dtype)

    monkeypatch.setattr(BACKEND, "choose", on_a_gpu)
    monkeypatch.setattr(BACKEND, "_is_cpu", lambda x: False)
    monkeypatch.setattr(BACKEND, "_interpreter_is_on", lambda: True)
    one = torch.zeros(1, 1, 1, 1)
    few, many = one.expand(2**24, 8, 4, 4), one.expand(2**27, 8, 4, 4)
    for name in ("auto", "triton"):
        with fi.backend(name):
            assert resolve(few) == "triton"
    assert resolve(many) == "torch"
    with fi.backend("triton"), pytest.raises(fi.BackendError, match="2147483648 pixels"):
        fi.functional.max_pool2d(many, 2)

"""The benchmarks' own promises: nothing wrong is timed, every run leaves its numbers behind."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from benchmarks import problems, results
from benchmarks.harness import LineUp, Subject, Yardstick, plain
from benchmarks.problems import CASES, Problem
from benchmarks.providers import PROVIDERS, contenders
from fused_inception.tools.timing import Work, in_turn, peak_bytes, timed
from fused_inception.tuning import dispatch
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.targets import TARGETS
from tests import tf32
from tests.torchvision_import import import_torchvision

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
PROBLEM = Problem("modules", "5b", 1, "fp32", CPU)
NORM = Problem("modules", "5b-bn", 2, "fp32", CPU)


class Wrong(nn.Module):
    """A module that is wrong by a thousandth, in training, inference, a gradient or a statistic."""

    def __init__(self, module: nn.Module, where: str) -> None:
        super().__init__()
        self.module = module
        self.where = where
        if where == "gradient":
            module.get_parameter("branch3.1.conv.bias").register_hook(lambda g: g * 1.001)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        now = "training" if torch.is_grad_enabled() else "inference"
        if self.where == "statistic" and now == "training":
            self.module.get_buffer("branch1.bn.running_var").mul_(1.001)
        return y * 1.001 if self.where == now else y

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_buffers(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.load_state_dict(*args, **kwargs)


def break_fused(where: str, case: str | None = None) -> None:
    """From now on the providers' fused modules are wrong, those of `case` or all."""
    right = Problem.module

    def module(self: Problem, library: Any) -> nn.Module:
        made = right(self, library)
        return Wrong(made, where) if library is fi and case in (None, self.case) else made

    Problem.module = module


@pytest.fixture
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Problem, "module", Problem.module)
    break_fused(request.param)


@pytest.mark.parametrize("name", ["fused", "eager", "eager-nchw"])
@pytest.mark.parametrize("problem", [PROBLEM, NORM], ids=lambda p: p.case)
def test_gate_admits_what_is_right(name: str, problem: Problem) -> None:
    line_up = LineUp(problem)
    for direction in ("step", "forward"):
        admitted = line_up.admit(name, direction)
        assert admitted.startup.compile_s >= 0
        assert admitted.subject.provider.name == name


@pytest.mark.parametrize(
    ("broken", "problem", "message"),
    [
        ("training", PROBLEM, "fused, training output: max error"),
        ("inference", PROBLEM, "fused, inference output: max error"),
        ("gradient", PROBLEM, r"fused, gradient of branch3\.1\.conv\.bias: max error"),
        ("statistic", NORM, r"fused, branch1\.bn\.running_var: max error"),
    ],
    indirect=["broken"],
)
@pytest.mark.usefixtures("broken")
def test_gate_rejects_what_is_wrong(problem: Problem, message: str) -> None:
    line_up = LineUp(problem)
    right = "step" if "inference" in message else "forward"
    for direction in {"forward", "backward", "step"} - {right, right.replace("step", "backward")}:
        for _ in range(2):
            with pytest.raises(AssertionError, match=message):
                line_up.admit("fused", direction)
        rows = line_up.timings(direction, ["fused", "eager"], 0.0, 2)
        assert list(rows) == ["eager"]
    line_up.admit("fused", right)


@pytest.mark.parametrize("case", CASES["kernels"])
def test_every_kernel_case_passes_the_gate(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a small map; the counts come from the same tables."""
    whole = CASES["kernels"][case]
    c, side = whole.input[0], 16 if whole.image else 8
    small = problems.Case(whole.make, (c, side, side), whole.image)
    monkeypatch.setitem(CASES["kernels"], case, small)
    problem = Problem("kernels", case, 1, "bf16", CPU)
    for provider in ("fused", "eager"):
        for direction in ("forward", "step"):
            LineUp(problem).admit(provider, direction)
    assert problem.bytes("step") > problem.bytes("forward") > 0
    assert (problem.flops("forward") > 0) == ("conv" in case or "naive" in case)


def test_the_yardstick_does_not_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying cuDNN's algorithms in fp64 takes longer than all timings; PyTorch's own in the dtype
    that is timed do what is timed."""
    searches: dict[torch.dtype, set[bool]] = {}
    right = Subject.results

    def results(self: Subject, direction: str) -> dict[str, Tensor]:
        dtype = self.x.dtype
        searches.setdefault(dtype, set()).add(torch.backends.cudnn.benchmark)
        return right(self, direction)

    monkeypatch.setattr(Subject, "results", results)
    LineUp(PROBLEM).admit("fused", "step")
    assert searches == {torch.float32: {True}, torch.float64: {False}}


def rounded(x: Tensor) -> Tensor:
    """To TF32, to the nearest; `tf32.cut` cuts."""
    bits = x.contiguous().view(torch.int32) + (1 << tf32.DROPPED - 1)
    return (bits & -(1 << tf32.DROPPED)).view(torch.float32).view_as(x)


def summed_otherwise(x: Tensor, cut: Callable[[Tensor], Tensor] = tf32.cut) -> Tensor:
    """Cut to TF32, and channels last: a convolution adds in another order."""
    return cut(x).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("group", "case", "operands"),
    [
        ("modules", "5b", rounded),
        # behind BatchNorm over few pixels whoever rounds flips a ReLU more, which a maximum shows
        ("modules", "5b-bn", summed_otherwise),
        ("network", "paper", rounded),
    ],
)
def test_gate_admits_tf32_where_the_library_computes_in_ieee(
    group: str, case: str, operands: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on a CPU, and on a GPU for a convolution of which that is faster."""
    monkeypatch.setattr(problems, "IMAGE_SIZE", 48)
    monkeypatch.setitem(CASES["network"], "paper", problems._network("paper"))
    yardsticks = [Yardstick(Problem(group, case, 2, dtype, CPU)) for dtype in ("tf32", "fp32")]
    monkeypatch.setattr(tf32, "cut", operands)
    with tf32.Products():
        found = [plain(yardsticks[0].problem).results(d) for d in ("forward", "step")]
    for got in found:
        yardsticks[0].check("TF32", got)
        with pytest.raises(AssertionError, match=r"TF32, .* error .*, allowed"):
            yardsticks[1].check("TF32", got)
        wrong = {name: 1.05 * result for name, result in got.items()}
        with pytest.raises(AssertionError, match=r"wrong, .* error .*, allowed"):
            yardsticks[0].check("wrong", wrong)


def test_gate_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are held together: one filter's alone may differ where a maximum flips."""
    monkeypatch.setattr(problems, "IMAGE_SIZE", 48)
    monkeypatch.setitem(CASES["network"], "paper", problems._network("paper"))
    problem = Problem("network", "paper", 2, "fp32", CPU)
    assert problem.directions == ("step", "forward")
    line_up = LineUp(problem)
    for direction in problem.directions:
        line_up.admit("fused", direction)
    got = dict(line_up.yardstick.baselines[0])
    line_up.yardstick.check("itself", got)
    name = "gradient of inception3a.branch1.conv.weight"
    got[name] = got[name] * 1.1
    with pytest.raises(AssertionError, match="broken, gradients: relative L2"):
        line_up.yardstick.check("broken", got)


def test_graphs_of_batch_norm_pass_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind training steps, which move the running statistics. A call stands for a graph."""

    def captured(piece: Work) -> tuple[Work, Any]:
        outputs = piece.run(None)
        return Work(None, lambda _: outputs, allocates=False), outputs

    monkeypatch.setattr("benchmarks.harness.captured", captured)
    line_up = LineUp(NORM)
    for name in ("eager", "fused"):
        line_up.work("forward", name)
        line_up.work("step", f"{name}-graph")
        line_up.work("forward", f"{name}-graph")


def test_graphs_hold_whole_calls_of_networks_and_of_small_batches() -> None:
    gpu = torch.device("cuda")
    for batch, direction in ((1, "forward"), (8, "step"), (256, "step"), (256, "forward")):
        every = contenders("network", batch, direction, gpu)
        assert set(every) == set(PROVIDERS)
    modules = set(every) - {"max-autotune-cudagraphs"}
    assert set(contenders("modules", 1, "forward", gpu)) == modules
    for group, batch, direction in (("modules", 1, "backward"), ("kernels", 32, "step")):
        names = contenders(group, batch, direction, gpu)
        assert names
        assert not any(name.endswith("-graph") for name in names)
    for name in every:
        assert PROVIDERS[PROVIDERS[name].plain].graph is False


class _Asks(torch.autograd.Function):
    """Notes in forward and in backward whether the library is to compute."""

    asked: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        _Asks.note()
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        _Asks.note()
        return dy * 2

    @staticmethod
    def note() -> None:
        plan = dispatch.conv_plan(8, 8, 3, 1, 1, Operands(2, "tf32"), TARGETS["sm_90"])
        _Asks.asked.append(plan.library("conv.forward"))


def test_a_provider_of_the_librarys_convolutions_is_in_force_both_ways() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return _Asks.apply(x)

    class Given:
        whole = False
        x = staticmethod(lambda: torch.ones(1, 1, 1, 1, requires_grad=True))
        labels = staticmethod(lambda: None)
        gradients = staticmethod(lambda outputs: outputs)

    for name, library in (("fused", False), ("fused-library", True)):
        _Asks.asked.clear()
        subject = Subject(Given(), PROVIDERS[name], Module())  # type: ignore[arg-type]
        for direction in ("forward", "step", "backward"):
            work = subject.work(direction)
            work.run(work.prepare() if work.prepare else None)
        assert _Asks.asked == [library] * 5


def test_compiled_provider_tells_compilation_from_running(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is a stub on a clock of its own: what is asked of it, what is booked as what."""
    from torch._dynamo.utils import compilation_time_metrics

    asked: list[dict[str, Any]] = []
    work = {True: 0.1, False: 0.2}
    clock = [0.0]
    spans = {
        "stub_template_autotuning": 0.02,
        "CachingAutotuner.coordinate_descent_tuning": 0.02,
        "PyCodeCache.load": 0.01,
    }

    def compiling(module: nn.Module, args: Any) -> None:
        if module.training in work:
            clock[0] += work.pop(module.training)
            for name, seconds in spans.items():
                compilation_time_metrics.setdefault(name, []).append(seconds)

    def compile(self: nn.Module, **options: Any) -> None:
        asked.append(options)
        self.register_forward_pre_hook(compiling)

    monkeypatch.setattr(nn.Module, "compile", compile)
    monkeypatch.setattr("benchmarks.harness.now", lambda device: clock[0])
    problem = Problem("kernels", "global_avg_pool2d", 1, "fp32", CPU)
    line_up = LineUp(problem)
    for direction, compile_s in (("step", 0.06), ("forward", 0.16), ("backward", 0.06)):
        startup = line_up.admit("max-autotune-layout", direction).startup
        assert startup.tuning_s == pytest.approx(0.04)
        assert startup.compile_s == pytest.approx(compile_s)
    assert asked[0]["fullgraph"] is True
    assert asked[0]["options"]["force_layout_optimization"] is True
    assert asked[0]["options"]["max_autotune"] is True
    import torch._inductor.config as inductor

    options = {name for p in PROVIDERS.values() if p.inductor for name in p.inductor}
    assert all(hasattr(inductor, name.split(".")[0]) for name in options)


def test_providers_take_turns() -> None:
    """In both orders, each until the slowest has had its time and its rounds."""
    log: list[str] = []
    pieces = {
        "a": Work(None, lambda _: log.append("a")),
        "b": Work(lambda: log.append("prepare"), lambda _: (log.append("b"), time.sleep(0.001))),
    }
    samples = in_turn(pieces, {"a": 2, "b": 1}, CPU, seconds=0.0, min_rounds=3)
    turn = ["prepare", "b"]
    assert log == ["a", "a", *turn, *turn, "a", "a", "a", "a", *turn]
    assert {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}
    assert min(samples["b"]) >= 0.001


def test_work_and_traffic_from_geometry() -> None:
    p = Problem("modules", "3a", 2, "bf16", CPU)
    # 28x28: the module's multiply-adds of one image are 128,049,152
    assert p.flops("forward") == 2 * 2 * 128_049_152
    assert p.flops("step") == p.flops("forward") + p.flops("backward")
    x, y, weights, biases = 2 * 784 * 192, 2 * 784 * 256, 163_328, 368
    assert p.bytes("forward") == 2 * (x + y + weights + biases)
    assert p.bytes("backward") == 2 * (2 * x + y + 2 * weights + biases)


# a provider that is wrong stands beside those that are right
RUN = """
import sys
import pytest
from tests.test_benchmarks import break_fused
break_fused("inference", "5a")
sys.exit(pytest.main(sys.argv[1:]))
"""


def test_pytest_run_leaves_numbers_of_what_is_right(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "run.json"
    which = ["-k", "5b-forward or 5b-gpu or 5a-forward", "--batches=1", "--dtype=fp32"]
    options = ["-q", "-rs", "--benchmark-max-time=0.01", f"--benchmark-json={out}", *which]
    done = python("-c", RUN, "benchmarks/bench_googlenet.py", *options)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert "1 failed, 3 passed, 1 skipped" in done.stdout
    assert "AssertionError: fused, inference output: max error" in done.stdout
    assert "needs a CUDA GPU" in done.stdout
    assert "(--compile-cases=3a,5b, or all)" in done.stdout
    everything = json.loads(out.read_text())["benchmarks"]
    assert [b["name"] for b in everything if "5a" in b["name"]] == [
        "test_modules[5a-forward-1-fp32-eager]"
    ]
    ran = [b for b in everything if "5b" in b["name"]]
    assert [b["extra_info"]["provider"] for b in ran] == ["fused", "eager"]
    for b in ran:
        info = b["extra_info"]
        assert b["group"] == "modules: 5b forward, batch 1, fp32"
        assert b["stats"]["median"] == pytest.approx(info["median_s"], rel=1e-3) != 0
        assert b["stats"]["rounds"] >= 5
        assert info["flops"] == PROBLEM.flops("forward")
        assert info["bytes"] == PROBLEM.bytes("forward")
        assert (info["dtype"], info["layout"], info["batch"]) == ("fp32", "channels_last", 1)
        assert info["environment"]["torch"] == torch.__version__
        assert info["environment"]["threads"] >= 1
    trimmed = tmp_path / "trimmed.json"
    results.main([str(out), "--out", str(trimmed), "--note", "a test"])
    head, rows = results.read(trimmed)
    assert head["note"] == "a test"
    assert head["environment"]["torch"] == torch.__version__
    assert [row.provider for row in rows] == ["eager", "fused", "eager"]
    assert rows[1].median_s == pytest.approx(ran[0]["stats"]["median"], rel=1e-3)
    assert rows[1].beside == ["fused", "eager"]


def row(**given: Any) -> results.Row:
    facts: dict[str, Any] = dict.fromkeys(results.Row.__dataclass_fields__, 0)
    facts |= {"group": "modules", "case": "3a", "batch": 2, "direction": "step", "dtype": "bf16"}
    return results.Row(**facts | {"beside": ["fused", "eager"], "peak_bytes": None} | given)


def test_table_compares_with_the_fused_one() -> None:
    rows = [
        row(provider="fused", median_s=0.002),
        row(provider="eager", median_s=0.005, peak_bytes=3_000_000, compile_s=1.5),
        row(provider="eager", median_s=0.004, direction="forward"),
    ]
    step, fused, eager, forward, alone = (line.split() for line in results.table(rows).splitlines())
    assert " ".join(step) == "modules 3a, step, batch 2, bf16"
    assert fused[:4] == ["fused", "2.000", "ms", "1.00x"]
    assert eager[:6] == ["eager", "5.000", "ms", "2.50x", "3.0", "MB"]
    assert eager[6:9] == ["1.5", "s", "compile"]
    assert forward[2] == "forward,"
    assert alone[:3] == ["eager", "4.000", "ms"]
    assert "x" not in " ".join(alone[3:4])


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [row(provider="fused", median_s=0.002, samples_s=[0.00123456, 2.0])]
    path = tmp_path / "deep" / "rows.json"
    results.write(path, {"note": "a test", "rows": [results.json_of(r) for r in rows]})
    head, back = results.read(path)
    assert head == {"note": "a test"}
    assert back[0].samples_s == [0.001235, 2.0]
    path.write_text('{"else": 1}')
    with pytest.raises(ValueError, match="holds no results"):
        results.read(path)


def test_torchvision_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run, on a small image; a fused network that is wrong is not timed."""
    pytest.importorskip("pytest_benchmark")
    from benchmarks import bench_torchvision

    import_torchvision("torchvision.models.googlenet")
    monkeypatch.setattr(bench_torchvision, "IMAGE_SIZE", 40)
    pair = bench_torchvision.pair(2, "fp32")
    pieces = {name: pair.work("inference", name) for name in bench_torchvision.PROVIDERS}
    assert peak_bytes(pieces["fused"], CPU) is None
    samples = in_turn(pieces, dict.fromkeys(pieces, 1), CPU, 0.0, 2)
    assert bench_torchvision.speedup(samples, "eager") > 0
    for name in bench_torchvision.PROVIDERS:
        assert timed(pair.work("step", name), 1, CPU) > 0
    right = fi.MaxPool2d.forward
    for grad in (True, False):
        # inference has launches of its own
        wrong = lambda self, x: (1 + (torch.is_grad_enabled() is grad)) * right(self, x)  # noqa: B023, E731
        monkeypatch.setattr(fi.MaxPool2d, "forward", wrong)
        with pytest.raises(AssertionError, match="FAILED"):
            bench_torchvision.pair(2, "fp32")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    # a worker of pytest-xdist says so in the environment
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip

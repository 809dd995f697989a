"""`verify`: what it finds, what it leaves as it was; the commands `verify` and `explain`."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception import reference
from fused_inception.__main__ import main
from fused_inception.adapters.ours import FUSED
from fused_inception.adapters.plain import _PLAIN, plain_twin
from fused_inception.nn.adoption import origin_of
from fused_inception.tools import precompile as precompile_tool
from fused_inception.tools import verify as verify_tool
from fused_inception.tools.side_by_side import Error

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (16, 8, 16, 24, 8, 16, 8)


@pytest.fixture
def theirs(tv: ModuleType) -> nn.Module:
    return nn.Sequential(tv.BasicConv2d(3, 16, kernel_size=3, padding=1), tv.Inception(*WIDTHS))


def biased() -> nn.Module:
    """Blocks with biases, which are fused operators on every path."""
    return nn.Sequential(
        reference.ConvBlock(3, 16, kernel_size=3, padding=1), reference.Inception(*WIDTHS)
    )


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (2, 3, 6, 6)), dtype=dtype)


def state_of(model: nn.Module) -> list[Any]:
    modules = [(n, id(m), type(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
    tensors = {n: (id(t), t.detach().clone()) for n, t in model.state_dict(keep_vars=True).items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [modules, tensors, grads, torch.get_rng_state(), torch.is_grad_enabled()]


def assert_equal_states(got: list[Any], want: list[Any]) -> None:
    assert got[0] == want[0]
    for name, (number, value) in want[1].items():
        assert got[1][name][0] == number
        assert torch.equal(got[1][name][1], value), name
    for a, b in zip(got[2], want[2], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(got[3], want[3])
    assert got[4] == want[4]


class TestVerify:
    @pytest.mark.parametrize("fuse", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    def test_agreement(self, theirs: nn.Module, fuse: bool, training: bool) -> None:
        theirs.train(training)
        if fuse:
            fi.fuse_(theirs)
        report = fi.verify(theirs, images())
        assert report.ok
        assert [block.name for block in report.blocks] == ["0", "1"]
        for check in (*report.blocks, report.model):
            assert check.gradient is not None
            assert check.statistics is not None
        assert report.blocks[1].gradient_of in {"input", *dict(theirs[1].named_parameters())}
        mode = "training" if training else "eval"
        assert report.setting == f"Sequential, {mode}, float32 [2, 3, 6, 6], cpu"
        assert str(report).endswith("verdict: every check holds")
        assert "end to end" in str(report)

    @pytest.mark.parametrize("look", [fi.verify, fi.explain])
    def test_leaves_everything_as_it_was(self, theirs: nn.Module, look: Callable) -> None:
        theirs.append(nn.Dropout(0.5))
        theirs[1].branch2.eval()
        theirs(images()).sum().backward()
        before = state_of(theirs)
        with torch.no_grad():
            look(theirs, images(2, 3, 5, 5))
        torch.set_rng_state(before[3])  # the images
        assert_equal_states(state_of(theirs), before)
        look(theirs, torch.zeros(2, 3, 5, 5))
        assert_equal_states(state_of(theirs), before)

    @pytest.mark.parametrize("make", [biased, lambda: fi.Inception(*WIDTHS)])
    def test_inference_mode(self, make: Callable[[], nn.Module]) -> None:
        model = make()
        x = images() if isinstance(model, nn.Sequential) else images(2, 16, 4, 4)
        with torch.inference_mode():
            assert fi.verify(model, x).ok

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        report = fi.verify(biased().to(dtype), images(2, 3, 8, 8, dtype=dtype))
        assert report.ok
        assert (report.model.output.pytorch > 1e-4) == (dtype == torch.bfloat16)
        assert (report.model.output.pytorch == 0) == (dtype == torch.float64)

    def test_autocast(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            report = fi.verify(biased(), images())
        assert report.ok
        assert "float32 (autocast bfloat16)" in report.setting
        assert report.model.output.pytorch > 1e-4

    def test_frozen_parameters(self, theirs: nn.Module) -> None:
        report = fi.verify(theirs.requires_grad_(False), images())
        assert [check.gradient_of for check in report.blocks] == ["input", "input"]

    def test_what_does_not_run_or_cannot_be_fused(self, tv: ModuleType) -> None:
        model = tv.GoogLeNet(num_classes=3, init_weights=False).eval()
        model.inception3b.branch1.bn.register_forward_hook(lambda *a: None)
        report = fi.verify(model, images(1, 3, 33, 33))
        assert report.ok
        assert report.not_reached == ["aux1", "aux2"]
        assert report.skipped == {"inception3b": "branch1.bn has a hook"}
        assert len(report.blocks) == 16
        assert "not fused: inception3b branch1.bn has a hook" in str(report)

    def test_outputs_in_containers(self) -> None:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = biased()

            def forward(self, x: Tensor) -> dict[str, Any]:
                y = self.block(x)
                return {"a": y, "b": [y.mean(), y.argmax(), None]}

        report = fi.verify(Two(), images())
        assert report.ok
        assert len(report.blocks) == 2

    @pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
    def test_wrappers_are_looked_through(self, wrap: Callable) -> None:
        for look in (fi.verify, fi.explain):
            report = look(wrap(biased()), images())
            assert [block.name for block in report.blocks] == ["0", "1"]

    def test_model_that_is_a_block(self) -> None:
        report = fi.verify(fi.Inception(*WIDTHS), images(2, 16, 3, 3))
        assert [block.name for block in report.blocks] == [""]
        assert "(the model)" in str(report)

    def test_dropout_is_off(self) -> None:
        report = fi.verify(biased().append(nn.Dropout(1.0)), images())
        assert report.model.output.pytorch > 0

    def test_nothing_to_verify(self) -> None:
        with pytest.raises(ValueError, match="no block of this Linear can be fused"):
            fi.verify(nn.Linear(3, 3), images(2, 3))


class Scaled(torch.autograd.Function):
    """The identity forward, 1.2 backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 1.2 * dy


class TestVerifyFinds:
    """Each kind of error, in the block that has it and end to end."""

    @staticmethod
    def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Tensor], Tensor]) -> None:
        right = fi.Inception.forward
        monkeypatch.setattr(fi.Inception, "forward", lambda self, x: change(self, right(self, x)))

    def check(self, what: str) -> fi.VerifyReport:
        report = fi.verify(nn.Sequential(biased(), nn.Flatten()), images(2, 3, 8, 8))
        assert not report.ok
        assert [check.verdict for check in report.blocks] == ["ok", "FAILED"]
        assert report.model.verdict == "FAILED"
        assert getattr(report.blocks[1], what).verdict == "FAILED"
        assert str(report).endswith("verdict: FAILED: fused and plain PyTorch disagree")
        return report

    def test_a_wrong_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken(monkeypatch, lambda _, y: y * 1.01)
        self.check("output")

    def test_a_wrong_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken(monkeypatch, lambda _, y: Scaled.apply(y))
        assert self.check("gradient").blocks[1].output.verdict == "ok"

    def test_not_a_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken(monkeypatch, lambda _, y: y * float("nan"))
        self.check("output")

    def test_a_missing_gradient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken(monkeypatch, lambda _, y: y.detach() + 0 * y[:, :8].sum().relu())
        self.check("gradient")

    def test_wrong_statistics(self, monkeypatch: pytest.MonkeyPatch, theirs: nn.Module) -> None:
        def spoil(block: Any, y: Tensor) -> Tensor:
            block.branch1.bn.running_mean.data.mul_(1.001)
            return y

        self.broken(monkeypatch, spoil)
        block = fi.verify(theirs, images()).blocks[1]
        assert block.statistics is not None
        assert block.statistics.verdict == "FAILED"
        assert block.output.verdict == "ok"

    def test_only_the_block_that_is_wrong(
        self, monkeypatch: pytest.MonkeyPatch, tv: ModuleType
    ) -> None:
        """What follows it starts from the statistics of the model, not from those of its pass."""
        right = fi.MaxPool2d.forward
        monkeypatch.setattr(fi.MaxPool2d, "forward", lambda self, x: right(self, x) + 1)
        report = fi.verify(
            nn.Sequential(fi.MaxPool2d(2), tv.Inception(*WIDTHS)), images(2, 16, 6, 6)
        )
        assert [check.verdict for check in report.blocks] == ["FAILED", "ok"]

    def test_a_batch_that_is_not_counted(
        self, monkeypatch: pytest.MonkeyPatch, theirs: nn.Module
    ) -> None:
        def spoil(block: Any, y: Tensor) -> Tensor:
            block.branch3[1].bn.num_batches_tracked.add_(1)
            return y

        self.broken(monkeypatch, spoil)
        assert not fi.verify(theirs, images()).ok


@pytest.mark.parametrize(
    ("fused", "pytorch", "verdict"),
    [
        (1e-6, 1e-6, "ok"),
        (2e-3, 1e-6, "unclear"),
        (2e-2, 1e-6, "FAILED"),
        (0.5, 0.4, "unclear"),
        (float("nan"), 1e-6, "FAILED"),
        (float("nan"), float("nan"), "unclear"),
    ],
)
def test_verdicts(fused: float, pytorch: float, verdict: str) -> None:
    assert Error(fused, pytorch, limit=1e-3, noise=1e-2).verdict == verdict


class TestPlainTwin:
    def test_knows_every_fused_class(self) -> None:
        assert {*FUSED} <= _PLAIN.keys()

    @pytest.mark.parametrize("variant", ["paper", "torchvision"])
    def test_of_the_network(self, variant: str) -> None:
        model = fi.googlenet(variant, num_classes=3, image_size=64).double().eval()
        twin = plain_twin(model)
        assert type(twin) is reference.GoogLeNet
        assert not any(type(m) in FUSED for m in twin.modules())
        assert isinstance(model.inception3a, fi.Inception)
        x = images(1, 3, 64, 64, dtype=torch.float64)
        torch.testing.assert_close(twin(x), model(x))

    def test_of_the_naive_module(self) -> None:
        model = fi.InceptionNaive(8, 4, 4, 4).double()
        x = images(1, 8, 3, 3, dtype=torch.float64)
        torch.testing.assert_close(plain_twin(model)(x), model(x))
        assert fi.verify(model, x).ok

    def test_of_pairs(self) -> None:
        model = nn.Sequential(
            fi.LRNMaxPool2d(5, 3, 2, ceil_mode=True), fi.MaxPoolLRN2d(3, 2, 1, k=2.0)
        ).double()
        x = images(1, 8, 9, 9, dtype=torch.float64)
        twin = plain_twin(model)
        torch.testing.assert_close(twin(x), model(x))
        assert not any(type(m) in FUSED for m in twin.modules())
        assert fi.verify(model, x).ok

    def test_of_what_fuse_did(self, theirs: nn.Module, tv: ModuleType) -> None:
        fi.fuse_(theirs)
        twin = plain_twin(theirs)
        assert type(twin[1]) is tv.Inception
        assert all(origin_of(m) is None for m in twin.modules())
        assert type(theirs[1]) is fi.Inception


def make_biased() -> nn.Module:
    return biased()


def make_number() -> int:
    return 3


class TestCommands:
    def test_verify(self, capsys: pytest.CaptureFixture) -> None:
        command = ["verify", "--model", "tests.test_verify:make_biased", "--image-size", "8"]
        assert main(command) == 0
        output = capsys.readouterr().out
        assert output.startswith("verify: Sequential, training, float32 [2, 3, 8, 8], cpu")
        assert output.endswith("verdict: every check holds\n")

    def test_verify_finds_a_difference(
        self, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = fi.Inception.forward
        monkeypatch.setattr(fi.Inception, "forward", lambda self, x: 2 * right(self, x))
        command = ["verify", "--model", "tests.test_verify:make_biased", "--image-size", "8"]
        assert main(command) == 1
        assert "FAILED" in capsys.readouterr().out

    def test_torchvision_in_a_process_of_its_own(self, tv: ModuleType) -> None:
        """Also where its wheel was built for another torch."""
        command = ["explain", "--model", "torchvision:googlenet", "--image-size", "33", "--eval"]
        done = subprocess.run(
            [sys.executable, "-m", "fused_inception", *command],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "inception5b  Inception" in done.stdout

    def test_torchvision(self, tv: ModuleType, capsys: pytest.CaptureFixture) -> None:
        command = [
            "--model",
            "torchvision:googlenet",
            "--image-size",
            "33",
            "--batch-size",
            "1",
            "--eval",
        ]
        assert main(["verify", *command]) == 0
        assert "not run by this input in this mode: aux1, aux2" in capsys.readouterr().out
        assert main(["explain", *command]) == 0
        assert "inception5b  Inception" in capsys.readouterr().out

    def test_explain(self, capsys: pytest.CaptureFixture) -> None:
        command = ["explain", "--model", "tests.test_verify:make_biased", "--image-size", "8"]
        assert main([*command, "--amp", "bf16", "--batch-size", "3"]) == 0
        output = capsys.readouterr().out
        assert "float32 (autocast bfloat16) [3, 3, 8, 8]" in output
        assert "ATen: cpu tensors [0, 1]" in output
        assert main([*command, "--unfused"]) == 0
        assert "layers: fuse_ would fuse it [0, 1]" in capsys.readouterr().out

    @pytest.mark.parametrize("tool", ["verify", "explain"])
    def test_kernels_are_compiled_first(
        self, tool: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those of the fused model; a model that cannot be traced is left to its own pass."""
        asked = []

        def compiled(model: nn.Sequential, x: Tensor) -> fi.PrecompileReport:
            asked.append(isinstance(model[1], fi.Inception) and len(x) == 2)
            if len(asked) == 2:
                raise RuntimeError("values decide")
            return fi.PrecompileReport(kernels=7, compiled=5, workers=2)

        monkeypatch.setattr(precompile_tool, "precompile", compiled)
        command = [tool, "--model", "tests.test_verify:make_biased", "--image-size", "8"]
        assert main(command) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith("precompile: 7 kernels, 5 compiled by 2 processes, 2 from")
        assert second.startswith(tool)
        assert main(command) == 0
        assert asked == [True, True]
        assert capsys.readouterr().out.startswith(tool)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("resnet", "--model resnet: take torchvision:googlenet, paper"),
            ("no_such:thing", "--model no_such:thing: No module named 'no_such'"),
            ("tests.test_verify:missing", "has no attribute 'missing'"),
            (
                "tests.test_verify:make_number",
                "returned an object of class int, not a torch.nn.Module",
            ),
            ("torch.nn:ReLU", "no block of this ReLU can be fused"),
            ("paper", "image_size must be at least 47"),
        ],
    )
    def test_one_line_errors(self, capsys: pytest.CaptureFixture, model: str, message: str) -> None:
        assert main(["verify", "--model", model, "--image-size", "32"]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_the_module_is_not_hidden_by_the_function() -> None:
    assert verify_tool.verify is fi.verify


def test_inference_has_launches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong without gradients alone is found without them alone."""
    model = biased().eval()
    right = fi.Inception.forward
    monkeypatch.setattr(
        fi.Inception,
        "forward",
        lambda self, x: (1.0 + 0.1 * (not torch.is_grad_enabled())) * right(self, x),
    )
    assert fi.verify(model, images()).ok
    report = fi.verify(model, images(), gradients=False)
    assert not report.ok
    assert all(check.gradient is None for check in [*report.blocks, report.model])
    assert torch.is_grad_enabled()

"""`explain`: paths, reasons, launches and predicted costs of the blocks of a model."""

import copy
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fused_inception as fi
from fused_inception.backend import assume_triton
from fused_inception.cost import H200
from fused_inception.geometry import InceptionDims
from fused_inception.tools.explain import Launches
from fused_inception.tuning import dispatch
from tests.conftest import INTERPRETED
from tests.test_verify import WIDTHS, biased, images


class TestExplain:
    def test_before_and_after(self) -> None:
        model, x = biased(), images()
        before = fi.explain(model, x)
        assert {(b.path.name, b.path.reason) for b in before.blocks} == {
            ("layers", "fuse_ would fuse it")
        }
        fi.fuse_(model)
        report = fi.explain(model, x)
        assert {(b.path.name, b.path.reason) for b in report.blocks} == {("ATen", "cpu tensors")}
        block = report.blocks[1]
        assert (block.name, block.kind, block.input) == ("1", "Inception", "[2, 16, 6, 6] float32")
        assert block.launches is None
        assert report.launches is None
        # forward, and both gradients of every product
        forward = InceptionDims(*WIDTHS).weights * 6 * 6 * 2 * 2
        assert block.flops == 3 * forward
        # the ATen path is what the layers were
        assert block.predicted_seconds == block.eager.seconds(H200)
        assert block.bytes == before.blocks[1].bytes
        assert block.fused.read_bytes + block.fused.write_bytes < block.bytes
        assert fi.explain(model.eval(), x).blocks[1].flops == forward

    def test_table(self) -> None:
        model = biased()
        fi.fuse_(model)
        lines = str(fi.explain(model, images())).splitlines()
        assert lines[0] == "explain: Sequential, training, float32 [2, 3, 6, 6], cpu"
        assert lines[4].split()[:4] == ["1", "Inception", "ATen", "[2,"]
        assert "~2+4 (2)" in lines[4]
        assert lines[5] == "ATen: cpu tensors [0, 1]"
        assert "predicted for one NVIDIA H200" in lines[-1]

    def test_obstacles_and_refusals(self, tv: ModuleType) -> None:
        model = nn.Sequential(*(tv.Inception(16, 4, 4, 4, 4, 4, 4) for _ in range(3)))
        model[0].branch1.conv.register_forward_hook(lambda *a: None)
        fi.fuse_(model)
        model[1].branch2[0].conv.register_forward_hook(lambda *a: None)
        reasons = [block.path.reason for block in fi.explain(model, images(2, 16, 4, 4)).blocks]
        assert reasons[0] == "branch1.conv has a hook"
        assert reasons[1] == "plain PyTorch: branch2.0.conv has a hook"

    def test_copied_input(self) -> None:
        model = fi.Inception(*WIDTHS)
        x = images(2, 16, 4, 4)
        report = fi.explain(model, x)
        assert report.blocks[0].copied == "channels are not last"
        assert "input copied: channels are not last [(the model)]" in str(report)
        x = x.contiguous(memory_format=torch.channels_last)
        assert fi.explain(model, x).blocks[0].copied is None

    def test_reasons_of_the_path(self) -> None:
        model, x = fi.Inception(*WIDTHS), images(2, 16, 4, 4)
        with fi.backend("torch"):
            assert fi.explain(model, x).blocks[0].path.reason == "backend torch"
        assert fi.explain(model.double(), x.double()).blocks[0].path.reason == "float64"
        assert fi.explain(model, x.double()).blocks[0].fused is None

    def test_whole_network(self, tv: ModuleType) -> None:
        model = tv.GoogLeNet(num_classes=3, init_weights=False)
        fi.fuse_(model)
        report = fi.explain(model, images(2, 3, 48, 48))
        assert len(report.blocks) == 19
        assert all(block.fused is not None for block in report.blocks)
        assert fi.explain(model.eval(), images(1, 3, 48, 48)).not_reached == ["aux1", "aux2"]


@pytest.mark.skipif(not INTERPRETED, reason="CUDA tensors take Triton by themselves")
class TestTritonPath:
    """Through the interpreter."""

    model = nn.Sequential(
        fi.ConvBlock(3, 8, kernel_size=3, padding=1), fi.MaxPool2d(2), fi.Inception(*[8] * 7)
    )
    x = torch.randn(1, 3, 4, 4)

    def test_verify(self) -> None:
        with fi.backend("triton"):
            report = fi.verify(self.model, self.x)
        assert report.ok
        assert {block.path.name for block in report.blocks} == {"Triton"}
        assert report.blocks[2].output.fused != report.blocks[2].output.pytorch

    def test_explain(self) -> None:
        with fi.backend("triton"):
            report = fi.explain(self.model, self.x)
        # the images need no gradient
        assert [block.launches for block in report.blocks] == [
            Launches(1, 3, 0),
            Launches(1, 1, 0),
            Launches(2, 4, 2),
        ]
        assert report.launches == Launches(4, 8, 2)
        assert "4 Triton launches forward, 8 backward, and 2 that pack filters" in str(report)
        assert report.blocks[0].copied is None

    @pytest.mark.usefixtures("own_tables")
    def test_who_computes_the_convolutions(self) -> None:
        ours = dispatch.Choice(False, "no measurement")
        with fi.backend("triton"):
            report = fi.explain(self.model, self.x)
        # the images need no gradient
        assert report.blocks[0].parts == {"conv.forward": ours, "conv.wgrad": ours}
        assert report.blocks[1].parts == {}
        assert report.blocks[2].parts == dict.fromkeys(dispatch.MODULE_PARTS, ours)
        assert "convolutions by triton: no measurement [0, 2]" in str(report)
        with fi.backend("triton"), dispatch.forced(["conv3.forward", "conv5.wgrad"]):
            report = fi.explain(self.model, self.x)
        lines = str(report).splitlines()
        assert "convolutions by library: forced [2 conv3.forward conv5.wgrad]" in lines
        rest = "2 conv5.forward conv3.dgrad conv5.dgrad conv3.wgrad"
        assert f"convolutions by triton: forced [0, {rest}]" in lines

    def test_explain_in_eval(self) -> None:
        with fi.backend("triton"):
            report = fi.explain(copy.deepcopy(self.model).eval(), self.x)
        assert set(report.blocks[2].parts) == {"conv3.forward", "conv5.forward"}
        assert report.launches is not None
        assert (report.launches.forward, report.launches.backward) == (4, 0)

    def test_nothing_to_differentiate(self) -> None:
        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = fi.MaxPool2d(2)

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"y": self.block(x)}

        with fi.backend("triton"):
            report = fi.explain(Wrapped(), self.x)
        assert report.launches == Launches(1, 0, 0)

    def test_no_kernel(self) -> None:
        model = fi.ConvBlock(16, 8, kernel_size=3, stride=2)
        assert fi.explain(model, images(2, 16, 5, 5)).blocks[0].path.reason == "cpu tensors"
        with fi.backend("triton"), pytest.raises(fi.BackendError, match="no kernel for this"):
            fi.explain(model, images(2, 16, 5, 5))
        reasons = {
            fi.MaxPool2d(5): "kernel_size 5: kernels exist up to 3",
            fi.MaxPoolLRN2d(3, 4, 2): "kernel_size 4: kernels exist up to 3",
            fi.LocalResponseNorm(33): "size 33: kernels exist up to 32",
            fi.LRNMaxPool2d(40, 3, 2): "size 40: kernels exist up to 32",
            fi.ConvBlock(16, 8, kernel_size=7, padding=3): "kernel 7, stride 1, padding 3",
        }
        for block, reason in reasons.items():
            assert f"PyTorch's operators: {reason}" in repr(block)
            with assume_triton():
                (row,) = fi.explain(block, images(2, 16, 9, 9)).blocks
            assert row.path.name == "ATen"
            assert row.path.reason.startswith(reason)
            assert row.launches is None
            assert "+" not in str(fi.explain(block, images(2, 16, 9, 9))).split("ATen: ")[0]

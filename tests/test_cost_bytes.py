"""The bytes that the cost model says a launch reads and writes, against those that interpreted
kernels touch."""

import pytest
import torch

from fused_inception import cost
from fused_inception.backend import backend
from fused_inception.cost import fused
from fused_inception.functional import googlenet_stem, inception
from fused_inception.geometry import InceptionDims
from tests.cases import InceptionCase
from tests.conftest import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED), reason="only the interpreter sees what a kernel touches"
)

if HAS_TRITON:
    from tests.interpreter_memory import Traffic, traffic

# multiples of 16: of narrower filters the model counts the padding, which no kernel need read
DIMS = InceptionDims(32, 16, 16, 32, 16, 16, 48)
# what the model leaves out: biases
BIASES = 0.03
# and the column sums that give their gradients, 4 bytes for 32 pixels of 2 each
SUMS = 0.1
WRITE_SUMS = (
    *("_relu_mask_kernel", "_dgrad_kernel"),
    *("_conv2d_dgrad_kernel", "_stem_wgrad_kernel"),
)
READ_SUMS = ("_finish_kernel", "_stem_finish_kernel")
# the last pixels of a packed image's border; of a packed filter all rows but 148 of 256
UNREAD = {"_stem_conv_fwd_kernel": 0.01, "_stem_finish_kernel": 0.06}


def assert_touches(found: "list[Traffic]", ops: list[cost.Op]) -> None:
    """What is touched is what the model counts, but for the shares above."""
    ours = [op for op in ops if op.source in ("triton", "packing")]
    assert [launch.kernel for launch in found] == [op.kernel for op in ours]
    for launch, op in zip(found, ours, strict=True):
        # what is read twice is one memory; what is written are slices of one
        read = sum({t.name: t.bytes for t in op.reads}.values())
        least = (1 - UNREAD.get(op.kernel, 0)) * read
        most = (1 + (SUMS if op.kernel in READ_SUMS else BIASES)) * read
        assert least <= launch.read <= most, f"{op.name}: {launch.read} read, not {read}"
        most = (1 + (SUMS if op.kernel in WRITE_SUMS else BIASES)) * op.write_bytes
        assert op.write_bytes <= launch.written <= most, (
            f"{op.name}: {launch.written} written, not {op.write_bytes}"
        )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("apart", [False, True])
def test_module(
    training: bool, apart: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small maps, whose pool branch and gradients are in launches with others, and as if large."""
    if apart:
        request.getfixturevalue("few_large_tiles")
        monkeypatch.setattr(fused, "APART_PIXELS", 0)
    data = InceptionCase("bytes", DIMS, 2, 12, 13).tensors(torch.bfloat16)
    pairs = zip(data.filters, data.biases, strict=True)
    parameters = [t.requires_grad_(training) for pair in pairs for t in pair]
    x = data.x.requires_grad_(training)
    with backend("triton"), torch.set_grad_enabled(training):
        if not training:
            inception(x, *parameters)  # from the second call on the packed filters are there
        with traffic() as found:
            y = inception(x, *parameters)
            if training:
                y.backward(data.dy)
    total = cost.inception(DIMS, batch=2, height=12, width=13, training=training)
    assert_touches(found, list(total.ops))
    assert len(found) == (2 if not training else 10 if apart else 8)


@pytest.mark.usefixtures("few_large_tiles")
def test_stem() -> None:
    shapes = (64, 3, 7, 7), (64,), (64, 64, 1, 1), (64,), (192, 64, 3, 3), (192,)
    parameters = [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    x = torch.randn(1, 3, 47, 47, dtype=torch.bfloat16)
    with backend("triton"), traffic() as found:
        googlenet_stem(x, *parameters).sum().backward()
    total = cost.network("paper", image_size=47)
    stem = total.layers[: total.layers.index("3a")]
    assert_touches(found, [op for op in total.ops if op.layer in stem])

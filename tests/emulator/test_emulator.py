"""The emulator sees what it should, and the kernels pass in it as they are compiled."""

import re

import numpy as np
import pytest
import torch

from tests.conftest import EMULATED, HAS_TRITON
from tests.emulator.machine import Machine
from tests.emulator.memory import EmulatorError, Global
from tests.emulator.ptx import parse
from tests.processes import output_of

own_process = pytest.mark.skipif(
    not HAS_TRITON or EMULATED != "", reason="compiles kernels, in processes of its own"
)

HEADER = """
.visible .entry _test_kernel(
	.param .u64 .ptr .global .align 1 _test_kernel_param_0
)
.reqntid 128
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<40>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [_test_kernel_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 16;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r2, %r1, 2;
	mov.b32 	%r3, global_smem;
	add.s32 	%r4, %r3, %r2;
	shl.b32 	%r5, %r1, 4;
	add.s32 	%r6, %r3, %r5;
{}
	ret;
}}
"""
# another thread's word, through shared memory
EXCHANGE = """
	st.shared.b32 [ %r4 + 0 ], %r1;
	bar.sync 	0;
	xor.b32 	%r7, %r4, 128;
	ld.shared.b32 	%r8, [%r7];
	bar.sync 	0;
	st.shared.b32 [ %r4 + 0 ], %r1;
	st.global.b32 [ %rd3 + 0 ], { %r8 };
"""
COPY = """
	cp.async.cg.shared.global [ %r6 + 0 ], [ %rd3 + 0 ], 0x10, 16;
	cp.async.commit_group;
	cp.async.wait_group 	0;
	bar.sync 	0;
	xor.b32 	%r7, %r5, 1024;
	add.s32 	%r7, %r7, %r3;
	ld.shared.v4.b32 	{%r8, %r9, %r10, %r11}, [%r7];
	st.global.v4.b32 [ %rd3 + 0 ], { %r8, %r9, %r10, %r11 };
"""
# 64 x 16 ones times 16 x 8 ones
PRODUCT = """
	setp.lt.s32 	%p1, %r1, 64;
	mov.b32 	%r7, 1065369472;
	@%p1 st.shared.b32 [ %r4 + 0 ], %r7;
	fence.proxy.async.shared::cta;
	bar.sync 	0;
	bfe.u32 	%r8, %r3, 4, 14;
	cvt.u64.u32 	%rd4, %r8;
	or.b64 	%rd6, %rd4, 34360262656;
	mov.pred 	%p2, 0;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
		{%r10,%r11,%r12,%r13}, {%r7,%r7,%r7,%r7}, %rd6, %p2, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	bar.sync 	0;
	st.shared.b32 [ %r4 + 0 ], %r7;
	st.global.v4.b32 [ %rd3 + 0 ], { %r10, %r11, %r12, %r13 };
"""
# threads part ways and meet again
BRANCHES = """
	mov.b32 	%r7, 5;
	setp.lt.s32 	%p1, %r1, 40;
	@%p1 bra 	$L_other;
	mov.b32 	%r7, 6;
$L_other:
	bar.sync 	0;
	st.global.b32 [ %rd3 + 0 ], { %r7 };
"""


def run(body: str, memory: torch.Tensor) -> torch.Tensor:
    """One program of 128 threads with 2 KB of shared memory."""
    machine = Machine(parse(HEADER.format(body)), 2048)
    machine.launch((1,), [memory.data_ptr()], Global([memory]))
    return memory


def first_words(body: str) -> list[int]:
    memory = torch.zeros(128, 4, dtype=torch.int32)
    return run(body, memory)[:, 0].tolist()


def test_what_programs_give() -> None:
    threads = np.arange(128)
    assert first_words(EXCHANGE) == (threads ^ 32).tolist()
    assert first_words(BRANCHES) == np.where(threads < 40, 5, 6).tolist()
    given = torch.arange(512, dtype=torch.int32).view(128, 4)
    assert torch.equal(run(COPY, given.clone()), given.view(2, 64, 4).flip(0).reshape(128, 4))
    sums = run(PRODUCT, torch.zeros(128, 4, dtype=torch.int32)).view(torch.float32)
    assert torch.equal(sums, torch.full((128, 4), 16.0))


@pytest.mark.parametrize(
    ("body", "old", "new", "message"),
    [
        (EXCHANGE, "bar.sync 	0;\n	xor", "xor", "reads what another warp has written"),
        (EXCHANGE, "bar.sync 	0;\n	st", "st", "writes what another warp has read"),
        (COPY, "wait_group 	0", "wait_group 	1", "reads what a copy is still bringing"),
        (COPY, "bar.sync 	0;", "", "reads what another warp has written"),
        (PRODUCT, "fence.proxy.async.shared::cta;", "", "no fence has followed"),
        (PRODUCT, "aligned 0;\n	bar", "aligned 1;\n	bar", "a product is still reading"),
        (BRANCHES, "@%p1 bra", "@%p1 ret;\n	bra", "some of the threads only"),
        (EXCHANGE, "%rd3 + 0 ], { %r8", "%rd3 + 4096 ], { %r8", "in no tensor"),
        (EXCHANGE, "%rd3 + 0 ], { %r8", "%rd3 + 2 ], { %r8", "an address that they do not divide"),
        (EXCHANGE, "[%r7]", "[%r7+2048]", "of 2048 of shared memory"),
    ],
    ids=str,
)
def test_what_is_missing_is_seen(body: str, old: str, new: str, message: str) -> None:
    assert body.count(old) == 1
    with pytest.raises(EmulatorError, match=message):
        first_words(body.replace(old, new))


MODULE = "tests/test_inception_kernels.py::test_output_and_all_gradients[prime-widths-{}]"
# each kernel at least once, forward and each gradient
KERNELS = [
    MODULE.format("torch.bfloat16"),
    "tests/test_inception_naive.py::"
    "test_output_and_all_gradients[one-over-a-tile-torch.bfloat16-triton]",
    "tests/test_inception_kernels.py::test_pooling_follows_torch_with_ties_nan_and_infinity",
    "tests/test_conv2d.py::test_output_and_gradients[3x3-33-filters-torch.float16]",
    "tests/test_conv2d.py::test_output_and_gradients[first-layer-torch.bfloat16]",
    "tests/test_batch_norm_kernels.py::test_module_and_all_gradients[torch.bfloat16-prime-widths]",
    "tests/test_batch_norm_kernels.py::test_sums_in_stages[conv1-torch.bfloat16]",
    "tests/test_stem_kernels.py::test_output_and_gradients[15x15-torch.bfloat16]",
    "tests/test_auxiliary_kernels.py::test_output_and_gradients[adaptive-uneven-torch.bfloat16]",
    "tests/test_trunk_kernels.py::test_outputs_and_gradients[as-in-googlenet-torch.bfloat16]",
    "tests/test_library.py::test_module[batch-one-torch.bfloat16]",
    "tests/test_head.py::test_kernels[odd-torch.bfloat16-dropout]",
    *(
        f"tests/test_pooling_kernels.py::test_output_and_gradient[odd-map-torch.bfloat16-{op}]"
        for op in ("max_pool2d", "local_response_norm", "lrn_max_pool2d", "max_pool2d_lrn")
    ),
]


@own_process
@pytest.mark.parametrize(
    ("target", "tests"),
    [("sm_90", KERNELS), ("sm_80", [MODULE.format("torch.float16")])],
    ids=["sm_90", "sm_80"],
)
def test_kernels_as_they_are_compiled(target: str, tests: list[str]) -> None:
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)
    output = output_of(*arguments, EMULATE=target)
    assert re.search(rf"^{len(tests)} passed", output, re.MULTILINE), output
    ran = set(re.findall(r"^emulated: (\w+)$", output, re.MULTILINE))
    if tests is KERNELS:
        from tests.compiled.test_compiled import every_kernel

        assert every_kernel() - ran == set()


# lines that reach into more sectors than they must, with how many times as many they may
SCATTERED = {
    "pack.py": 12.0,  # filters in torch's order, a tap apart
    "tiles.py": 16.0,  # ReLU bits, few bytes of a pixel
    "relu_mask.py": 3.0,  # likewise
    "input_grad.py": 2.0,  # the pool's winners of 16 channels are one vector of a thread
}


@own_process
@pytest.mark.parametrize("layer", ["3b", "4b"])
def test_requests_reach_into_as_few_sectors_as_they_can(layer: str) -> None:
    """A step of a module in bf16 at N = 32 on sm_90, a few programs of each launch."""
    output = output_of("-m", "tests.emulator", "sm_90", layer, "--batch", "32")
    row = r"^(\w+) +(\w+\.py):\d+ +(\w+\.\w+) +(\d+) of at least +(\d+)"
    rows = [
        (kernel, file, what, int(units) / int(least))
        for kernel, file, what, units, least in re.findall(row, output, re.MULTILINE)
    ]
    in_global = [row for row in rows if row[2].endswith(".global")]
    assert len({kernel for kernel, *_ in in_global}) >= 6, output
    assert [row for row in in_global if row[3] > SCATTERED.get(row[1], 1.3)] == [], output
    # operands of products reach shared memory without conflicts between its banks
    copied = [ratio for *_, what, ratio in rows if what == "cp.shared"]
    assert max(copied) == 1, output

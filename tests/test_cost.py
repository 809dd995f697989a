"""The cost model against the reference network: counts, saved memory, ATen's calls, time."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from fused_inception import cost, reference
from fused_inception.__main__ import main
from fused_inception.cost import H200, Network
from fused_inception.geometry import GOOGLENET, InceptionDims
from tests.facts import FACTS, MODULES
from tests.tracing import AtenCalls, SavedMemory, count_multiply_adds, layers_of

SMALL = InceptionDims(16, 8, 16, 24, 8, 16, 8)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def reference_pass(variant, *, device="cpu", dtype=torch.float32, batch, image_size):
    """A network in training and images for it, channels last."""
    options = {"image_size": image_size, "init_weights": False, "device": device, "dtype": dtype}
    network = reference.googlenet(variant, **options).train()
    x = torch.randn(batch, 3, image_size, image_size, device=device, dtype=dtype)
    last = torch.channels_last
    return network.to(memory_format=last), x.to(memory_format=last)


def on_cpu(saved: tuple[cost.Saved, ...], itemsize: int) -> int:
    """Bytes of `saved` where dropout keeps its mask as the CPU does, in the type of its input."""
    return sum(
        kept.bytes * (itemsize if kept.name.endswith("dropout mask") else 1) for kept in saved
    )


# counts


def test_table_1_is_the_papers():
    printed = {row.layers[-1]: [row.parameters, row.multiply_adds] for row in cost.PAPER_TABLE_1}
    assert printed == FACTS["paper_table_1_params_Ki_ops_M"]


def test_table_1_agrees_with_exact_counts_where_it_is_right():
    network = Network("paper", aux_logits=False)
    for row in cost.PAPER_TABLE_1:
        weights, products = network.weights(*row.layers), network.multiply_adds(*row.layers)
        if row.layers[0] not in ("conv1", "4c", "5a"):
            assert weights / 1024 == pytest.approx(row.parameters, rel=0.02)
        if row.layers[0] not in ("conv1", "5a"):
            assert products / 1e6 == pytest.approx(row.multiply_adds, rel=0.01, abs=0.5)
    assert network.weights("conv1") == 9408
    assert network.multiply_adds("conv1") == 118_013_952


@pytest.mark.parametrize("variant", cost.VARIANTS)
@pytest.mark.parametrize("aux_logits", [False, True])
def test_parameters_are_those_of_the_reference(variant, aux_logits):
    network = Network(variant, aux_logits=aux_logits, num_classes=37)
    model = reference.googlenet(variant, aux_logits=aux_logits, num_classes=37, device="meta")
    assert network.parameters() == sum(p.numel() for p in model.parameters())
    for name, layer in layers_of(model, tuple(network.layers)).items():
        if name in network.layers and name != "head":
            assert network.parameters(name) == sum(p.numel() for p in layer.parameters()), name


def test_parameters_and_products_are_the_known_ones():
    for variant, known in FACTS["parameters"].items():
        if variant in cost.VARIANTS:
            assert Network(variant).parameters() == known["with_aux"]
            assert Network(variant, aux_logits=False).parameters() == known["main"]
    heads = [Network("paper").parameters(name) for name in ("aux1", "aux2")]
    assert heads == FACTS["parameters"]["paper_aux"]
    for variant, known in FACTS["multiply_adds"].items():
        assert Network(variant).inference_multiply_adds() == known
    for name, row in MODULES.items():
        assert Network("paper").weights(name) == row["weights_5x5"]
        assert Network("torchvision").multiply_adds(name) == row["multiply_adds_3x3"]


@pytest.mark.parametrize("variant", cost.VARIANTS)
@pytest.mark.parametrize("image_size", [64, 224, 225, 299])
def test_multiply_adds_are_those_that_the_reference_does(variant, image_size):
    model, x = reference_pass(variant, device="meta", batch=2, image_size=image_size)
    counted = count_multiply_adds(model, lambda: model(x))
    network = Network(variant, image_size=image_size)
    for name, layer in layers_of(model, tuple(network.layers)).items():
        inside = {child for child in layer.modules() if child is not layer}
        names = [n for n, m in model.named_modules() if m in inside and n in counted]
        if name == "head":
            names = ["fc"]
        if name in network.layers:
            assert 2 * network.multiply_adds(name) == sum(counted[n] for n in names), name
    assert 2 * network.multiply_adds() == sum(counted.values())
    for plan in cost.PLANS:
        forward = cost.network(variant, batch=2, image_size=image_size, plan=plan).part(
            phase=cost.FORWARD
        )
        assert forward.multiply_adds == sum(counted.values())


@pytest.mark.parametrize("plan", cost.PLANS)
@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_backward_is_twice_forward_but_for_the_images(plan, variant):
    network = Network(variant)
    total = cost.network(variant, batch=4, plan=plan)
    assert total.multiply_adds == 4 * (3 * network.multiply_adds() - network.multiply_adds("conv1"))
    assert total.flops == 2 * total.multiply_adds
    inference = cost.network(variant, batch=4, plan=plan, training=False)
    assert inference.multiply_adds == 4 * network.inference_multiply_adds()
    assert inference.saved_bytes == 0


# eager and compiled


@pytest.mark.parametrize("variant", cost.VARIANTS)
@pytest.mark.parametrize("image_size", [64, 96])  # the paper's heads pool to 1x1, to 2x2
def test_eager_saves_what_pytorch_saves(variant, image_size):
    model, x = reference_pass(variant, batch=1, image_size=image_size)
    memory = SavedMemory(model)
    with memory.watch():
        model(x)
    options = {"batch": 1, "image_size": image_size, "dtype": "float32", "plan": "eager"}
    assert on_cpu(cost.network(variant, **options).saved, 4) == memory.bytes


@pytest.mark.parametrize("variant", cost.VARIANTS)
def test_eager_saves_what_pytorch_saves_at_full_size(variant):
    """bfloat16 on the meta device, where the normalisation is not computed in fp32 as on a CPU."""
    model, x = reference_pass(
        variant, device="meta", dtype=torch.bfloat16, batch=256, image_size=224
    )
    memory = SavedMemory(model)
    with memory.watch():
        model(x)
    saved = cost.network(variant, batch=256, plan="eager").saved
    # there the map before the first linear layer is not channels last: flattening is no copy
    saved = tuple(kept for kept in saved if not kept.name.endswith(" flat"))
    assert on_cpu(saved, 2) == memory.bytes


def test_eager_saves_what_pytorch_saves_in_a_module():
    module = reference.Inception(*SMALL.widths, dtype=torch.bfloat16)
    x = torch.randn(2, 16, 5, 7, dtype=torch.bfloat16, requires_grad=True)
    memory = SavedMemory(module)
    with memory.watch():
        module(x.to(memory_format=torch.channels_last))
    want = cost.inception(SMALL, batch=2, height=5, width=7, plan="eager").saved_bytes
    assert want == memory.bytes


# operators whose arguments are more or less than what a kernel reads: only their calls are compared
OPERANDS_DIFFER = {
    "avg_pool2d_backward": "takes its input for the shape",
    "_adaptive_avg_pool2d_backward": "takes its input for the shape",
    "avg_pool3d_backward": "takes its input for the shape",
    "max_pool2d_with_indices_backward": "takes its input for the shape; fills before it scatters",
    "native_batch_norm": "reads its input twice",
    "native_batch_norm_backward": "reads its operands twice",
    "add_": "counts batches, 8 bytes",
    "new_zeros": "takes a tensor for its type",
    "copy_": "takes its output too",
    "div": "the gradient of the mean is expanded, not read so often",
}


@pytest.mark.parametrize("variant", ["paper", "torchvision"])
def test_eager_calls_the_operators_that_pytorch_calls(variant):
    model, x = reference_pass(variant, batch=2, image_size=96)
    total = cost.network(variant, batch=2, image_size=96, dtype="float32", plan="eager")
    with AtenCalls() as forward:
        outputs = model(x)
    ones = [torch.ones_like(output) for output in outputs]
    with AtenCalls() as backward:
        torch.autograd.backward(outputs, ones)
    for phase, trace in ((cost.FORWARD, forward), (cost.BACKWARD, backward)):
        calls, read, written = Counter(), Counter(), Counter()
        for op in total.part(phase=phase).ops:
            calls[op.name] += 1
            read[op.name] += op.read_bytes
            written[op.name] += op.write_bytes
        # a GPU has one operator for what dropout on a CPU does in steps
        drops = calls.pop("native_dropout", 0) + calls.pop("native_dropout_backward", 0)
        assert drops == 3
        for name in ("bernoulli_", "div_"):
            assert trace.calls.pop(name, 0) in (0, drops)
        trace.calls["mul"] -= drops
        bytes_of_a_drop = 2 * 1024 * 4
        trace.read["mul"] -= drops * 2 * bytes_of_a_drop
        trace.written["mul"] -= drops * bytes_of_a_drop
        assert calls == +trace.calls
        for name in calls:
            if name not in OPERANDS_DIFFER:
                assert read[name] == trace.read[name], name
                assert written[name] == trace.written[name], name


@pytest.mark.skipif(TORCH < (2, 13), reason="the partitioner of torch 2.13 is described")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
class TestCompiledSavesWhatThePartitionerKeeps:
    @staticmethod
    def saved_bytes(module: torch.nn.Module, x: torch.Tensor) -> int:
        memory = SavedMemory(module)
        compiled = torch.compile(module, backend="aot_eager_decomp_partition")
        leaf = x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
        with memory.watch():
            compiled(leaf)
        return memory.bytes

    @pytest.mark.parametrize("norm", [None, "batch"])
    def test_in_a_module(self, norm):
        module = reference.Inception(*SMALL.widths, norm=norm)
        module.to(memory_format=torch.channels_last)
        x = torch.randn(2, 16, 6, 5, requires_grad=True)
        sizes = {"batch": 2, "height": 6, "width": 5, "dtype": "float32"}
        total = cost.inception(SMALL, plan="compiled", norm=norm is not None, **sizes)
        assert total.saved_bytes == self.saved_bytes(module, x)

    @pytest.mark.parametrize("variant", ["paper", "torchvision"])
    def test_in_the_stem(self, variant):
        network, x = reference_pass(variant, batch=2, image_size=64)
        total = cost.network(
            variant, batch=2, image_size=64, dtype="float32", plan="compiled", aux_logits=False
        )
        stem = total.layers[: total.layers.index("3a")]
        parts = [network.get_submodule(part) for layer in stem for part in layer.split()]
        kept = sum(total.part(layer=layer).saved_bytes for layer in stem)
        assert kept == self.saved_bytes(torch.nn.Sequential(*parts), x)


# time


@pytest.mark.parametrize("variant", cost.VARIANTS)
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("training", [False, True])
def test_fusing_saves_time_launches_and_memory(variant, batch, training):
    plans = {
        plan: cost.network(variant, batch=batch, plan=plan, training=training)
        for plan in cost.PLANS
    }
    seconds = [total.seconds(H200) for total in plans.values()]
    assert seconds[2] < min(seconds[:2])
    shares = [name for name in H200.figures() if name.endswith("_share")]
    ideal = dataclasses.replace(H200, **dict.fromkeys(shares, cost.Figure(1.0, False, "roofline")))
    moved = [total.read_bytes + total.write_bytes for total in plans.values()]
    # one image is less than the filters, which a training step packs twice
    assert moved[1] < moved[0]
    assert moved[2] < moved[1] or (training and batch == 1)
    assert plans["fused"].launches() < min(plans[p].launches() for p in ("eager", "compiled"))
    for total in plans.values():
        assert total.seconds(ideal) <= total.seconds(H200) <= total.eager_seconds(H200)


def test_without_a_graph_our_launches_cost_what_the_host_was_measured_to_take():
    device = dataclasses.replace(
        H200,
        host_seconds=cost.Figure(1.0, True, ""),
        compiled_host_seconds=cost.Figure(2.0, True, ""),
        our_host_seconds=cost.Figure(10.0, True, ""),
        our_host_norm_seconds=cost.Figure(20.0, True, ""),
        our_host_training_seconds=cost.Figure(100.0, True, ""),
    )
    inference = cost.network(batch=1, plan="fused", training=False)
    assert inference.eager_seconds(device) == 9 * 26 + inference.launches()
    assert inference.eager_seconds(device, norm=True) == 19 * 26 + inference.launches()
    ours, eager, compiled = (
        cost.network(batch=1, plan=plan) for plan in ("fused", "eager", "compiled")
    )
    launches = ours.launches("triton", "packing")
    assert 0 < launches < ours.launches()
    for norm in (False, True):
        assert ours.eager_seconds(device, norm=norm) == 99 * launches + ours.launches()
    assert eager.eager_seconds(device) == eager.launches()
    assert compiled.eager_seconds(device) == 2 * compiled.launches()
    # never less than the kernels themselves
    large = cost.network(batch=512, plan="fused")
    assert large.eager_seconds(H200) == large.seconds(H200)


def test_paper_network_keeps_a_quarter_of_what_eager_keeps():
    eager, fused = (cost.network(plan=plan).saved_bytes for plan in ("eager", "fused"))
    assert fused <= eager / 4


def test_time_is_bounded_by_memory_products_and_launches():
    total = cost.network("paper", batch=32, plan="fused")
    for op, seconds in total.timeline(H200):
        assert seconds >= op.launches * H200.launch_seconds.value
        assert seconds >= op.write_bytes / H200.memory_rate.value
        assert seconds >= op.flops / H200.tensor_flops.value
    assert total.seconds(H200) == pytest.approx(sum(s for _, s in total.timeline(H200)))
    by_layer = dict.fromkeys(total.layers, 0.0)
    for op, seconds in total.timeline(H200):
        by_layer[op.layer] += seconds
    assert min(by_layer.values()) > 0


def test_cache_holds_what_was_touched_last():
    op = {"layer": "l", "phase": cost.FORWARD, "source": "library"}
    small, large = cost.Tensor("small", 20_000_000), cost.Tensor("large", 40_000_000)

    def seconds(*reads: cost.Tensor) -> float:
        ops = tuple(cost.Op(name="o", reads=(t,), writes=(), **op) for t in reads)
        return cost.Cost(ops, ()).timeline(H200)[-1][1]

    assert seconds(small, small) < seconds(small)
    assert seconds(small, large, small) == seconds(small)
    assert seconds(large, large) == seconds(large)


def test_memory_bounds_the_eager_network():
    slower = dataclasses.replace(H200, memory_rate=cost.Figure(2e12, True, "copy of 1 GiB"))
    total = cost.network("paper", batch=256, plan="eager")
    assert total.seconds(slower) > 1.5 * total.seconds(H200)
    assert not H200.stream_rate.measured
    assert all(math.isfinite(f.value) and f.value > 0 for f in H200.figures().values())
    assert len(H200.figures()) == len(dataclasses.fields(H200)) - 1


# arguments


def test_unknown_names_and_small_images_are_refused():
    with pytest.raises(ValueError, match="variant must be one of paper, torchvision"):
        cost.network("inception_v3")
    with pytest.raises(ValueError, match="plan must be one of eager, compiled, fused, got 'fast'"):
        cost.network("paper", plan="fast")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'float64'"):
        cost.inception(SMALL, batch=1, height=1, width=1, dtype="float64")
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        cost.network("paper", batch=0)
    with pytest.raises(ValueError, match="at least 47"):
        cost.network("paper", image_size=46)
    with pytest.raises(ValueError, match="at least 31 for the paper network, got 30"):
        cost.network("paper", image_size=30, aux_logits=False)
    assert cost.network("paper", image_size=31, aux_logits=False).flops > 0
    assert cost.network("torchvision", image_size=15).flops > 0


def test_module_of_the_network_costs_what_it_costs_alone():
    for plan in cost.PLANS:
        alone = cost.inception(GOOGLENET["4b"], batch=8, height=14, width=14, plan=plan)
        inside = cost.network("paper", batch=8, plan=plan, aux_logits=False).part(layer="4b")
        assert alone.saved_bytes == inside.saved_bytes
        names = [Counter(op.name for op in total.ops) for total in (alone, inside)]
        assert not names[1] - names[0]
        # in our network the gradient of its output comes masked, and a stage is packed at once
        apart = {"M": 1, "pack": 2, "F": 1} if plan == "fused" else {}
        assert names[0] - names[1] == apart
        assert alone.flops == inside.flops
        wide = cost.inception(GOOGLENET["4b"], batch=4, height=14, width=28, plan=plan)
        assert wide.saved_bytes == alone.saved_bytes


def test_info_prints_the_table(capsys):
    texts = []
    for flag in ("--batch-size", "--batch"):  # the old name
        assert main(["info", "--network", "paper", flag, "2", "--image-size", "224"]) == 0
        texts.append(capsys.readouterr().out)
    text, _ = texts
    assert texts[0] == texts[1]
    lines = {line.split("  ")[0].rstrip(" *"): line.split() for line in text.splitlines()}
    assert lines["inception (4c)"][-4:] == ["463", "497.5", "100", "99.9"]
    assert "1,582,671,872 (+5.5%)" in text
    assert "predicted for one NVIDIA H200; none is measured" in text
    eager, fused = (cost.network(batch=2, plan=plan) for plan in ("eager", "fused"))
    row = lines["3b"]
    assert row[1:3] == ["388,736", "304.3"]
    kilobytes = [f"{p.part(layer='3b').saved_bytes / 2e3:,.1f}" for p in (eager, fused)]
    assert row[3:5] == kilobytes
    assert row[5:7] == [str(p.part(layer="3b").launches()) for p in (eager, fused)]
    assert lines["all"][1] == f"{Network('paper').parameters():,}"
    assert f"{eager.saved_bytes / 2e6:.2f}" in lines["training step"]


def test_info_refuses_what_no_network_has(capsys):
    assert main(["info", "--network", "paper", "--image-size", "40"]) == 2
    assert "at least 47" in capsys.readouterr().err
    assert main(["info", "--batch-size", "3"]) == 2
    assert "--batch-size, --image-size and --dtype" in capsys.readouterr().err

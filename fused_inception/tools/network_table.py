"""The cost of a network as text: the paper's table beside exact counts, then the three plans."""

from collections.abc import Sequence

from fused_inception import cost
from fused_inception.cost import Cost, Device, Network
from fused_inception.tools.text import aligned

MILLION = 1e6
KI = 1024


def report(variant: str, *, batch: int, image_size: int, dtype: str, device: Device) -> list[str]:
    """Lines to print.

    Raises:
        ValueError: an unknown name, or images that are too small.
    """
    sizes = {"batch": batch, "image_size": image_size, "dtype": dtype}
    network = Network(variant, image_size=image_size)
    plans = {plan: cost.network(variant, plan=plan, **sizes) for plan in cost.PLANS}  # type: ignore[arg-type]
    inference = {
        plan: cost.network(variant, plan=plan, training=False, **sizes)  # type: ignore[arg-type]
        for plan in cost.PLANS
    }
    return [
        f'GoogLeNet "{variant}", {image_size} x {image_size} pixels, batch {batch}, {dtype}. '
        f"All times are predicted for one {device.name}; none is measured.",
        "",
        *_paper_table(network),
        "",
        *_layer_table(network, plans, batch, device),
        "",
        *_totals(plans, inference, batch, device, norm=network.norm),
        "",
        *_assumptions(device),
    ]


def _paper_table(network: Network) -> list[str]:
    """The printed table 1 counts weights in Ki, biases not."""
    rows: list[Sequence[str]] = [
        ("row of table 1", "Ki weights", "Ki weights", "M mult-adds", "M mult-adds")
    ]
    rows.append(("", "paper", "exact", "paper", "exact"))
    for row in cost.PAPER_TABLE_1:
        weights = network.weights(*row.layers) / KI
        multiply_adds = network.multiply_adds(*row.layers) / MILLION
        printed = (f"{row.parameters:,g}", f"{row.multiply_adds:,}")
        rows.append((row.name, printed[0], f"{weights:,.1f}", printed[1], f"{multiply_adds:,.1f}"))
    total = network.inference_multiply_adds()
    rows.append(
        (
            "all",
            f"{sum(row.parameters for row in cost.PAPER_TABLE_1):,g}",
            f"{sum(network.weights(*row.layers) for row in cost.PAPER_TABLE_1) / KI:,.1f}",
            f"{sum(row.multiply_adds for row in cost.PAPER_TABLE_1):,}",
            f"{total / MILLION:,.1f}",
        )
    )
    lines = ["The paper's table 1 (its network, 224 x 224) beside the exact counts of this one:"]
    lines += aligned(rows)
    share = total / cost.PAPER_BUDGET - 1
    lines.append(
        f"Budget of the paper: {cost.PAPER_BUDGET / MILLION:,.0f} M multiply-adds at inference; "
        f"exact: {total:,} ({share:+.1%})."
    )
    return lines


def _layer_table(network: Network, plans: dict[str, Cost], batch: int, device: Device) -> list[str]:
    seconds = {plan: _layer_seconds(plans[plan], device) for plan in plans}
    head: tuple[Sequence[str], ...] = (
        ("layer", "parameters", "M mult-adds", "saved kB", "saved kB", "launches", "launches",
         "predicted us", "predicted us", "predicted us"),
        ("", "", "an image", "eager", "fused", "eager", "fused", "eager", "compiled", "fused"),
    )  # fmt: skip
    rows = list(head)

    def row(name: str, layers: tuple[str, ...]) -> None:
        def saved(plan: str) -> str:
            total = sum(plans[plan].part(layer=layer).saved_bytes for layer in layers)
            return f"{total / batch / 1e3:,.1f}"

        def launches(plan: str) -> str:
            return str(sum(plans[plan].part(layer=layer).launches() for layer in layers))

        def micro(plan: str) -> str:
            return f"{sum(seconds[plan].get(layer, 0.0) for layer in layers) * 1e6:,.1f}"

        rows.append(
            (
                name,
                f"{network.parameters(*layers):,}",
                f"{network.multiply_adds(*layers) / MILLION:,.1f}",
                *map(saved, ("eager", "fused")),
                *map(launches, ("eager", "fused")),
                *map(micro, plans),
            )
        )

    for layer in network.layers:
        row(layer, (layer,))
    row("all", tuple(network.layers))
    return [
        "A training step, layer by layer, saved kB an image, without loss and optimiser:",
        *aligned(rows),
    ]


def _layer_seconds(cost: Cost, device: Device) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for op, taken in cost.timeline(device):
        seconds[op.layer] = seconds.get(op.layer, 0.0) + taken
    return seconds


def _totals(
    training: dict[str, Cost],
    inference: dict[str, Cost],
    batch: int,
    device: Device,
    *,
    norm: bool,
) -> list[str]:
    rows: list[Sequence[str]] = [
        ("", "plan", "launches", "Triton", "packing", "saved", "moved", "GFLOP",
         "predicted ms", "predicted ms", "predicted"),
        ("", "", "in all", "", "", "MB/image", "GB", "", "in a graph", "no graph",
         "images/s"),
    ]  # fmt: skip
    for what, plans in (("training step", training), ("inference", inference)):
        for plan, total in plans.items():
            seconds = total.seconds(device)
            rows.append(
                (
                    what,
                    plan,
                    str(total.launches()),
                    str(total.launches("triton", "inductor")),
                    str(total.launches("packing")),
                    f"{total.saved_bytes / batch / MILLION:.2f}",
                    f"{(total.read_bytes + total.write_bytes) / 1e9:.2f}",
                    f"{total.flops / 1e9:,.1f}",
                    f"{seconds * 1e3:.3f}",
                    f"{total.eager_seconds(device, norm=norm) * 1e3:.3f}",
                    f"{batch / seconds:,.0f}",
                )
            )
            what = ""
    return ["Totals:", *aligned(rows, names=2)]


def _assumptions(device: Device) -> list[str]:
    rows: list[Sequence[str]] = [
        (name, f"{figure.value:g}", "measured" if figure.measured else "assumed", figure.source)
        for name, figure in device.figures().items()
    ]
    return [f"The {device.name} of these predictions, in SI units:", *aligned(rows, names=4)]

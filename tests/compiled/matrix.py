"""Which problems are compiled for which targets."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from fused_inception.geometry import GOOGLENET, AvgWindow, NaiveDims, googlenet_sizes
from fused_inception.tuning.targets import TARGETS
from tests.compiled.collect import Specialisation
from tests.compiled.problems import (
    DTYPES,
    Auxiliary,
    GlobalPool,
    Gradients,
    Library,
    Module,
    NormConvolution,
    NormModule,
    PackedConvolution,
    Pooling,
    Problem,
    Stage,
    Stem,
    specialisations,
)

BATCHES = (1, 8, 32, 128, 256)
SOME_BATCHES = (1, 32, 256)  # of every test run
IMAGE = 224
SIZES = googlenet_sizes(IMAGE)


# modules behind the ReLU of another: does an auxiliary classifier add to the gradient there?
BEHIND = {
    "3b": (False,), "4b": (True,), "4c": (False, True), "4d": (False,), "4e": (True,),
    "5b": (False,),
}  # fmt: skip


def _module(name: str, batch: int) -> Problem:
    return Module(GOOGLENET[name], batch, SIZES.module(name), BEHIND.get(name, ()))


def _norm_module(name: str, batch: int) -> Problem:
    return NormModule(GOOGLENET[name], batch, SIZES.module(name))


def _stage(number: str) -> Problem:
    return Stage(tuple(dims for name, dims in GOOGLENET.items() if name.startswith(number)))


def _auxiliary(below: str, batch: int) -> Problem:
    paper = AvgWindow(kernel=5, stride=3, ceil_mode=True)
    return Auxiliary(batch, GOOGLENET[below].out_channels, SIZES.maxpool3, paper)


# layer of GoogLeNet -> its problem for a batch
LAYERS: dict[str, Callable[[int], Problem]] = {
    "stem": lambda n: Stem(n, IMAGE),
    # its parts, as operators of their own
    "conv1": lambda n: Stem(n, IMAGE).convolutions[0],
    "conv2": lambda n: Stem(n, IMAGE).convolutions[1],
    "conv3": lambda n: Stem(n, IMAGE).convolutions[2],
    "pool1": lambda n: Pooling("max_pool_lrn", n, 64, SIZES.conv1),
    "pool2": lambda n: Pooling("lrn_max_pool", n, 192, SIZES.maxpool1),
    "pool3": lambda n: Pooling("max_pool", n, GOOGLENET["3b"].out_channels, SIZES.maxpool2),
    "pool4": lambda n: Pooling("max_pool", n, GOOGLENET["4e"].out_channels, SIZES.maxpool3),
    # not in the network, where a pool stands beside each norm
    "norm": lambda n: Pooling("lrn", n, 192, SIZES.maxpool1),
    **{name: functools.partial(_module, name) for name in GOOGLENET},
    # two launches that are one where maps are small, which depends on the target too
    "4c-gradients": lambda n: Gradients(GOOGLENET["4c"], n, SIZES.module("4c")),
    **{f"stage{number}": lambda _, of=number: _stage(of) for number in "345"},
    # with BatchNorm, in training
    **{f"{name}-bn": functools.partial(_norm_module, name) for name in GOOGLENET},
    "conv1-bn": lambda n: NormConvolution(n, 3, 64, kernel=7, stride=2, side=IMAGE),
    "conv2-bn": lambda n: NormConvolution(n, 64, 64, kernel=1, stride=1, side=SIZES.maxpool1),
    "conv3-bn": lambda n: NormConvolution(n, 64, 192, kernel=3, stride=1, side=SIZES.maxpool1),
    # conv1 of few pixels, which is not read packed
    "images": lambda n: Stem(n, 64).convolutions[0],
    "conv1-packed": lambda n: PackedConvolution(n, 64, IMAGE),
    # what stands behind convolutions of the library
    "4c-library": lambda n: Library(_module("4c", n)),
    "4c-bn-library": lambda n: Library(_norm_module("4c", n)),
    "conv1-library": lambda n: Library(LAYERS["conv1"](n)),
    "conv3-bn-library": lambda n: Library(LAYERS["conv3-bn"](n)),
    # not in the network: 3a without its reductions
    "naive": lambda n: Module(NaiveDims(192, 64, 128, 32), n, SIZES.maxpool2),
    "aux1": functools.partial(_auxiliary, "4a"),
    "aux2": functools.partial(_auxiliary, "4d"),
    "pool5": lambda n: GlobalPool(n, GOOGLENET["5b"].out_channels, SIZES.maxpool4),
}


@dataclass(frozen=True)
class Group:
    """Layers that are compiled and reported together."""

    target: str
    precision: str
    layers: tuple[str, ...]
    batches: tuple[int, ...]
    inference: bool = True  # too, not training alone

    def uses(self) -> dict[Specialisation, list["Use"]]:
        """What they launch, and for what each."""
        modes = (True, False) if self.inference else (True,)
        found: dict[Specialisation, list[Use]] = {}
        for layer, batch, training in product(self.layers, self.batches, modes):
            problem = LAYERS[layer](batch)
            for spec in specialisations(problem, self.target, self.precision, training=training):
                found.setdefault(spec, []).append(Use(layer, batch, training))
        return found

    def specialisations(self) -> list[Specialisation]:
        """What they launch, without repeats."""
        return list(self.uses())


@dataclass(frozen=True)
class Use:
    """A layer that launches a kernel."""

    layer: str
    batch: int
    training: bool


# every test run: what the heuristics return for GoogLeNet in bf16 on sm_90, and each kernel for
# the other types there, for bf16 on the other targets, and where exact fp32 once went wrong
STEM = ("stem", "conv1", "pool1", "conv2", "conv3", "pool2")
OTHERS = ("pool3", "pool4", "norm", "aux1", "aux2", "pool5", "stage3", "stage4", "stage5")
LIBRARY = ("4c-library", "4c-bn-library", "conv1-library", "conv3-bn-library")
FAMILIES = (
    *("stem", "images", "pool1", "conv3", "pool2", "pool3", "norm", "4c", "naive", "aux1"),
    "conv1-packed",
    *("pool5", "4c-gradients", "4c-bn", "4c-library", "stage5"),
)
EVERY_RUN = {
    "sm_90-bf16-stem": Group("sm_90", "bf16", STEM, SOME_BATCHES),
    **{f"sm_90-bf16-{name}": Group("sm_90", "bf16", (name,), SOME_BATCHES) for name in GOOGLENET},
    "sm_90-bf16-naive": Group("sm_90", "bf16", ("naive",), SOME_BATCHES),
    "sm_90-bf16-norms": Group(
        "sm_90", "bf16", ("3a-bn", "4b-bn", "conv1-bn", "conv3-bn"), (256,), False
    ),
    "sm_90-bf16-library": Group("sm_90", "bf16", LIBRARY, (256,), False),
    "sm_90-bf16-others": Group("sm_90", "bf16", OTHERS, SOME_BATCHES),
    **{
        f"{target}-{precision}": Group(target, precision, FAMILIES, (32,), inference=False)
        for target in TARGETS
        for precision in DTYPES
        if (target == "sm_90") != (precision == "bf16")
        # where Triton multiplied in TF32 behind a gather
        or (target, precision) == ("sm_100", "ieee")
    },
}
# `make compile-all`; what has BatchNorm apart
NORMS = tuple(name for name in LAYERS if "-bn" in name)
FULL = {
    f"{target}-{precision}{suffix}": Group(
        target,
        precision,
        layers,
        BATCHES if target == "sm_90" else (1, 32, 256) if precision == "bf16" else (32,),
        # in eval BatchNorm is in the filters of the others
        inference=not suffix,
    )
    for target in TARGETS
    for precision in DTYPES
    for suffix, layers in (("", tuple(n for n in LAYERS if n not in NORMS)), ("-norms", NORMS))
}


def names() -> list[str]:
    """Of all groups, those of every test run first."""
    return [*EVERY_RUN, *(f"full:{name}" for name in FULL)]

"""Measured configurations take the place of the heuristic's, if they can be launched."""

import ast
import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

import fused_inception as fi
from fused_inception.geometry import InceptionDims, NaiveDims, Window
from fused_inception.tuning import chosen, table
from fused_inception.tuning.fields import from_fields
from fused_inception.tuning.heuristic import Operands, branches_config
from fused_inception.tuning.limits import why_not
from fused_inception.tuning.targets import TARGETS, Target, target_of
from tests.conftest import needs_triton
from tests.tables import SM_90, contents, put
from tests.test_house import ROOT

DIMS = InceptionDims(192, 64, 96, 128, 16, 32, 32)
OPS = Operands(2, "tf32")
WINDOW = Window(3, 2)
# family -> arguments of its heuristic
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pointwise": (DIMS, 2**15, OPS, True, False),
    "branches": (DIMS, 2**15, OPS, False),
    "mask": (256, 2**15),
    "dgrad": (DIMS, 2**15, OPS, True),
    "input_grad": (DIMS, 2**15, OPS),
    "wgrad": (DIMS, 2**15, OPS),
    "norm": (256, 2**15),
    "conv": (64, 192, 3, 2**15, OPS, False),
    "image_conv": (147, 64, 2**15, OPS),
    "stem_conv": (64, 2**17, OPS),
    "stem_wgrad": ((64, 64, 192), 2**17, 2**15, OPS),
    "avg_pool_project": (512, 128, 16, 25, 2**10, OPS),
    "naive": (NaiveDims(192, 64, 128, 32), 2**15, OPS),
    "naive_input_grad": (NaiveDims(192, 64, 128, 32), 2**15, OPS),
    "naive_wgrad": (NaiveDims(192, 64, 128, 32), 2**15, OPS),
    "vector": (2**20,),
    "march": (2**10, 28, 24, WINDOW),
}


def problem_of(family: str, target: Target) -> chosen.Problem:
    return chosen.Problem(family, ARGUMENTS[family], target)


def choose(family: str, target: Target = SM_90) -> Any:
    """What a script would get."""
    function: Callable[..., Any] = getattr(chosen, f"{family}_config")
    names = list(chosen._signature(chosen.FAMILIES[family].heuristic).parameters)
    arguments = dict(zip((n for n in names if n != "target"), ARGUMENTS[family], strict=True))
    return function(**arguments, target=target)


@pytest.mark.parametrize("family", chosen.FAMILIES)
def test_heuristic_decides_without_a_measurement(family: str) -> None:
    for target in TARGETS.values():
        expected = chosen.FAMILIES[family].by_heuristic(problem_of(family, target))
        assert choose(family, target) == expected


@pytest.mark.parametrize("family", chosen.FAMILIES)
def test_heuristics_choices_pass_through_a_table(family: str) -> None:
    """Nothing is lost on the way through JSON, and every limit lets them pass."""
    for target in TARGETS.values():
        problem = problem_of(family, target)
        config = chosen.FAMILIES[family].by_heuristic(problem)
        text = json.dumps({"key": problem.key, "fields": asdict(config)})
        back = json.loads(text)
        assert tuple(back["key"]) == problem.key
        assert from_fields(type(config), back["fields"]) == config
        assert why_not(config, problem.itemsize, target) is None


@pytest.mark.parametrize("ops", [OPS, Operands(4, "tf32"), Operands(4, "ieee")], ids=str)
def test_heuristics_choices_for_many_pixels_pass_too(ops: Operands) -> None:
    """What `tune` finds to be best and writes is read again, whatever the batch."""
    naive = NaiveDims(192, 64, 128, 32)
    for target, pixels in itertools.product(TARGETS.values(), (2**21, 2**24, 2**27)):
        for family, arguments in {
            "wgrad": (DIMS, pixels, ops),
            "naive_wgrad": (naive, pixels, ops),
            "conv": (64, 192, 3, pixels, ops, False),
            "stem_wgrad": ((64, 64, 192), 4 * pixels, pixels, ops),
            "avg_pool_project": (512, 128, 16, 25, pixels, ops),
        }.items():
            problem = chosen.Problem(family, arguments, target)
            config = chosen.FAMILIES[family].by_heuristic(problem)
            assert why_not(config, problem.itemsize, target) is None


def measured_branches(**changes: Any) -> dict[str, Any]:
    """An entry for launch B, other than what the heuristic says."""
    fields = asdict(branches_config(*ARGUMENTS["branches"][:3], SM_90))
    fields = copy.deepcopy(fields) | {"num_warps": 4, "num_stages": 2}
    fields["conv3"]["block_k"] = 16
    for name, value in changes.items():
        inner, _, outer = name.rpartition("__")
        (fields[inner] if inner else fields)[outer] = value
    key = [*problem_of("branches", SM_90).key]
    return {"family": "branches", "key": key, "fields": fields, "run": 0}


@pytest.mark.usefixtures("own_tables")
def test_measured_configuration_is_chosen() -> None:
    entry = measured_branches()
    put(contents([entry]))
    assert asdict(choose("branches")) == entry["fields"]
    assert choose("branches", TARGETS["sm_80"]) == branches_config(
        *ARGUMENTS["branches"][:3], TARGETS["sm_80"]
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"more": 1}, "has the fields conv3", id="unknown-field"),
        pytest.param({"conv3": 5}, "Tile takes fields, got 5", id="no-tile"),
        pytest.param({"num_warps": "4"}, "num_warps must be of type int, got '4'", id="text"),
        pytest.param({"num_warps": True}, "num_warps must be of type int", id="flag"),
        pytest.param({"num_warps": 5}, "num_warps must be one of", id="five-warps"),
        pytest.param({"num_stages": 0}, "num_stages must be between", id="no-stage"),
        pytest.param({"conv5__block_n": 48}, "block_n must be a power of two", id="width-48"),
        pytest.param({"conv5__block_k": 8}, "block_k must be a power of two from 16", id="step-8"),
        pytest.param(
            {"conv3__block_m": 512, "conv3__block_k": 128},
            r"needs \d+ bytes of shared memory, sm_90 has 232448",
            id="shared-memory",
        ),
    ],
)
@pytest.mark.usefixtures("own_tables")
def test_measurement_that_cannot_be_launched_is_ignored_with_a_warning(
    changes: dict[str, Any], why: str
) -> None:
    path = put(contents([measured_branches(**changes)]))
    with pytest.warns(RuntimeWarning, match=why) as warned:
        config = choose("branches")
    assert str(path) in str(warned[0].message)
    assert config == branches_config(*ARGUMENTS["branches"][:3], SM_90)


@pytest.mark.parametrize(
    ("family", "inner", "changes", "why"),
    [
        pytest.param("mask", "", {"block_c": 4}, "block_c 4 is below 8", id="half-a-byte"),
        pytest.param("stem_wgrad", "sums", {"block_c": 4}, "block_c 4 is below 8", id="of-sums"),
        pytest.param("mask", "", {"pixels": 33}, "no multiple of block_p 32", id="pixels"),
        pytest.param("norm", "", {"pixels": 33}, "no multiple of block_p 32", id="of-a-norm"),
        pytest.param("stem_wgrad", "sums", {"pixels": 33}, "no multiple of block_p 32", id="sums"),
        pytest.param("mask", "", {"block_p": 1024, "pixels": 1024}, "too large", id="large-block"),
        pytest.param("branches", "conv3", {"block_n": 1024, "block_k": 16}, "too large", id="wide"),
        pytest.param(
            "pointwise", "pool", {"block_m": 1024, "block_k": 256}, "too large", id="pool"
        ),
        pytest.param(
            "avg_pool_project",
            "",
            {"block_pixel": 1024, "num_warps": 1},
            "too large",
            id="pixels-of-a-map",
        ),
        pytest.param("avg_pool_project", "", {"taps": 10**6}, "taps must be between", id="taps"),
        pytest.param("stem_conv", "forward", {"block_k": 128}, "must divide 64", id="step-128"),
        pytest.param("vector", "", {"block_v": 1024, "num_warps": 1}, "too large", id="vectors"),
        pytest.param("march", "", {"rows": 0}, "rows must be 1 or more", id="no-rows"),
    ],
)
@pytest.mark.usefixtures("own_tables")
def test_what_no_kernel_of_a_family_can_do_is_ignored_with_a_warning(
    family: str, inner: str, changes: dict[str, int], why: str
) -> None:
    problem = problem_of(family, SM_90)
    config = chosen.FAMILIES[family].by_heuristic(problem)
    fields = asdict(config)
    (fields[inner] if inner else fields).update(changes)
    put(contents([{"family": family, "key": [*problem.key], "fields": fields, "run": 0}]))
    with pytest.warns(RuntimeWarning, match=why):
        assert choose(family) == config


@needs_triton
@pytest.mark.usefixtures("own_tables")
def test_launches_follow_the_table(device: torch.device) -> None:
    dims, own = InceptionDims(8, 8, 8, 8, 8, 8, 8), target_of(device)
    problem = chosen.Problem("branches", (dims, 16, Operands(4, "tf32"), False), own)
    block = fi.Inception(*dims.widths).to(device).eval()
    x = torch.randn(1, 8, 4, 4, device=device)

    def launched() -> dict[str, Any]:
        with torch.no_grad(), fi.backend("triton"), fi.record_launches() as launches:
            block(x)
        return next(launch.config for launch in launches if "branches" in launch.kernel)

    before = launched()
    fields = asdict(chosen.FAMILIES["branches"].by_heuristic(problem))
    fields["num_stages"] += 1
    with table.trying("branches", problem.key, own, fields):
        assert launched() == before | {"NUM_STAGES": before["NUM_STAGES"] + 1}
    assert launched() == before


def configs_imported() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "fused_inception/ops").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("heuristic"):
                yield from ((path.name, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("heuristic"):
                yield path.name, node.attr


def test_scripts_ask_the_tables() -> None:
    """No script goes by a heuristic alone where a table may know better."""
    past = [found for found in configs_imported() if found[1].removesuffix("_config") in ARGUMENTS]
    assert not past
    assert ARGUMENTS.keys() == chosen.FAMILIES.keys()

"""The search for launches: candidates, pruning, measurement by a timer that a test brings."""

import contextlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_inception as fi
from fused_inception.__main__ import main
from fused_inception.geometry import InceptionDims
from fused_inception.tools import sources, tune
from fused_inception.tools.launch_bench import LaunchBench, library_speed_ups
from fused_inception.tools.tune import Tuning, problems_of
from fused_inception.tuning import chosen, dispatch, search, table
from fused_inception.tuning.chosen import Problem
from fused_inception.tuning.configs import BranchesConfig, Tile
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.limits import shared_bytes, why_not
from fused_inception.tuning.targets import TARGETS, target_of
from tests.conftest import needs_triton
from tests.tables import SM_90
from tests.test_chosen import ARGUMENTS, problem_of

BRANCHES = problem_of("branches", SM_90)


@pytest.mark.parametrize("family", ARGUMENTS)
def test_candidates_can_be_launched_and_are_others(family: str) -> None:
    for target in TARGETS.values():
        problem = problem_of(family, target)
        start, *others = search.candidates(problem)
        assert start == chosen.FAMILIES[family].by_heuristic(problem)
        assert start not in others
        assert len(set(others)) == len(others) > 0
        assert all(why_not(other, problem.itemsize, target) is None for other in others)


def test_a_part_is_varied_alone() -> None:
    start = chosen.FAMILIES["branches"].by_heuristic(BRANCHES)
    assert search.parts(start) == ["conv3", "tail_n", "conv5", "launch"]
    for config in search.variants(BRANCHES, start, "conv3"):
        assert config.conv3 != start.conv3
        assert asdict(config) | {"conv3": None} == asdict(start) | {"conv3": None}
    launches = {(c.num_warps, c.num_stages) for c in search.variants(BRANCHES, start, "launch")}
    assert launches <= {
        (warps, start.num_stages + more)
        for warps in (start.num_warps // 2, start.num_warps, start.num_warps * 2)
        for more in (-1, 0, 1)
    }
    assert len(launches) > 1


def test_shared_memory_bounds_the_candidates() -> None:
    """sm_89 has less than half of sm_90's."""
    start = BranchesConfig(Tile(256, 128, 32), 0, Tile(128, 32, 16), 8, 4)
    deep = {c.num_stages for c in search.variants(BRANCHES, start, "launch")}
    small = Problem("branches", BRANCHES.arguments, TARGETS["sm_89"])
    shallow = {c.num_stages for c in search.variants(small, start, "launch")}
    assert deep == {3, 4, 5}
    assert shallow == {3, 4}
    assert shared_bytes(start, 2) == 4 * (256 + 128) * 32 * 2


def test_padding_bounds_the_candidates() -> None:
    """32 filters of a 5x5: columns of 64 would compute as much again for nothing."""
    start = chosen.FAMILIES["branches"].by_heuristic(BRANCHES)
    assert start.conv5.block_n == 32
    widths = {c.conv5.block_n for c in search.variants(BRANCHES, start, "conv5")}
    assert widths == {16, 32}


def test_padding_of_an_images_filter_gradient() -> None:
    """Its rows are the 128 filters, its columns 27 positions and the bias."""
    problem = Problem("image_conv", (27, 128, 2**15, Operands(2, "tf32")), SM_90)
    start = chosen.FAMILIES["image_conv"].by_heuristic(problem)
    assert start.wgrad.tile == Tile(64, 64, 64)
    tiles = [c.wgrad.tile for c in search.variants(problem, start, "wgrad")]
    assert {tile.block_m for tile in tiles} == {32, 64, 128}
    assert {tile.block_n for tile in tiles} == {32, 64}


def test_sums_of_a_thread_bound_the_candidates() -> None:
    start = BranchesConfig(Tile(256, 128, 32), 0, Tile(128, 32, 16), 8, 3)
    warps = {c.num_warps for c in search.variants(BRANCHES, start, "launch")}
    assert warps == {8, 16}


class FakeBench:
    """`seconds` of a configuration as a function says; 4 warps do not compile."""

    def __init__(self, cost: Any) -> None:
        self.cost = cost
        self.measured: list[Any] = []

    def usable(self, configs: list[Any]) -> list[Any]:
        return [config for config in configs if config.num_warps != 4]

    def seconds(self, config: Any) -> float:
        self.measured.append(config)
        return self.cost(config)


def always() -> bool:
    return True


def test_search_goes_from_part_to_part() -> None:
    """The best of each part, in order: a narrow 3x3, then a shallow 5x5, then two stages."""
    start = chosen.FAMILIES["branches"].by_heuristic(BRANCHES)

    def cost(config: BranchesConfig) -> float:
        tiles = config.conv3.block_n + config.conv5.block_k
        return tiles + 10 * abs(config.num_stages - 2) + config.num_warps / 100

    bench = FakeBench(cost)
    found = search.search(BRANCHES, bench, always)
    assert found is not None
    assert found.complete
    assert found.heuristic_seconds == cost(start)
    assert found.seconds == cost(found.config) < cost(start)
    assert found.config.conv3.block_n == start.conv3.block_n // 2
    assert found.config.num_stages == start.num_stages - 1
    assert found.tried == len(bench.measured) == len(set(bench.measured))
    assert not any(config.num_warps == 4 for config in bench.measured[1:])


def test_heuristic_stays_where_nothing_is_clearly_faster() -> None:
    start = chosen.FAMILIES["branches"].by_heuristic(BRANCHES)
    bench = FakeBench(lambda config: 1.0 if config == start else 0.995)
    found = search.search(BRANCHES, bench, always)
    assert found is not None
    assert found.config == start


def test_search_ends_with_the_time() -> None:
    bench = FakeBench(lambda config: 1.0)
    found = search.search(BRANCHES, bench, lambda: len(bench.measured) < 5)
    assert found is not None
    assert (found.tried, found.complete) == (5, False)
    assert search.search(BRANCHES, bench, lambda: False) is None


def test_search_gives_up_where_the_heuristic_fails() -> None:
    bench = FakeBench(lambda config: math.inf)
    assert search.search(BRANCHES, bench, always) is None
    assert len(bench.measured) == 1


class FakeCall:
    """Computes something else with 8 warps, and fails with 16."""

    backward = False

    def results(self, args: Any) -> list[torch.Tensor]:
        fields = table.lookup(BRANCHES.family, BRANCHES.key, SM_90)
        assert fields is not None
        if fields["num_warps"] == 16:
            raise RuntimeError("no such launch")
        return [torch.tensor([1.0, 2.0 if fields["num_warps"] == 8 else 1.0])]


def test_wrong_results_and_failures_are_never_the_fastest() -> None:
    config = BranchesConfig(Tile(64, 64, 32), 0, Tile(64, 32, 16), 4, 3)
    calls: Any = [(FakeCall(), (torch.zeros(1),))]
    bench = LaunchBench(BRANCHES, calls, lambda work: 0.5, 1)
    seconds = [bench.seconds(replace(config, num_warps=warps)) for warps in (4, 8, 16)]
    assert seconds == [0.5, math.inf, math.inf]


def test_library_is_compared_part_by_part_in_its_direction() -> None:
    def timer(work: Any) -> float:
        forced = dispatch._forced or frozenset()
        return 3.0 if not forced else 1.5 if "conv3.wgrad" in forced else 6.0

    forward, backward = FakeCall(), FakeCall()
    backward.backward = True
    key = dispatch.module_key(ARGUMENTS["branches"][0], 2**15, Operands(2, "tf32"))
    both: Any = [(forward, ()), (backward, ())]
    found = library_speed_ups(key, SM_90, both, timer)
    assert found.pop("conv3.wgrad") == 2.0
    assert set(found.values()) == {0.5}
    assert {*found, "conv3.wgrad"} == set(dispatch.MODULE_PARTS)
    assert library_speed_ups(key, SM_90, both[:1], timer).keys() == {
        "conv3.forward",
        "conv5.forward",
    }


@needs_triton
def test_whole_search_writes_a_table_that_launches_follow(
    device: torch.device, own_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timer that likes few stages; kernels really run, and their results are compared."""
    dims = InceptionDims(8, 8, 8, 8, 8, 8, 8)
    model = fi.Inception(*dims.widths).to(device).eval()
    x = torch.randn(1, 8, 4, 4, device=device).to(memory_format=torch.channels_last)
    every = search.variants
    monkeypatch.setattr(search, "variants", lambda *args: every(*args)[:1])
    # pre-compilation is another test's
    monkeypatch.setattr(LaunchBench, "usable", lambda self, configs: configs)

    def timer(work: Any) -> float:
        with fi.record_launches() as launches:
            work()
        return sum(launch.config.get("NUM_STAGES", 0) + 1 for launch in launches) * 1e-6

    target = target_of(device)
    path = table.user_path(target.name)
    begun: list[Problem] = []

    origin = {"gpu": "a test's", "torch": "2.9", "triton": "3.6", "version": "1", "sources": "1f"}

    def tuned(*, again: bool, **changed: str) -> Tuning:
        tuning = Tuning(target, path, origin | changed, timer, 1)
        tuning.go(model, x, time.monotonic() + 600, again=again)
        return tuning

    with fi.backend("triton"), torch.no_grad():
        found = tuned(again=False)
        assert {winner.problem.family for winner in found.winners} == {"pointwise", "branches"}
        assert found.left == 0
        monkeypatch.setattr(Tuning, "_search", lambda self, problem, *_: not begun.append(problem))
        monkeypatch.setattr(Tuning, "_compare", lambda self, *_: None)
        tuned(again=False)
        assert not begun
        # other kernels are other measurements, as are another GPU's and other versions'
        for changed in ({}, *({name: "another"} for name in origin)):
            begun.clear()
            tuned(again=not changed, **changed)
            assert [problem.family for problem in begun] == ["pointwise", "branches"], changed
        with fi.record_launches() as launches:
            model(x)
    entries = {entry.family: entry for entry in table.read(path, target.name)}
    assert entries.keys() == {"pointwise", "branches", "dispatch"}
    assert entries["branches"].run == origin
    assert entries["dispatch"].fields.keys() == {"conv3.forward", "conv5.forward"}
    problem, ours = found.winners[1].problem, found.winners[1].config
    assert entries["branches"].fields == asdict(ours)
    assert ours.num_stages < chosen.FAMILIES["branches"].by_heuristic(problem).num_stages
    (launch,) = (launch for launch in launches if "branches" in launch.kernel)
    assert launch.config["NUM_STAGES"] == ours.num_stages
    assert f"wrote {path}" in str(found)


@needs_triton
def test_the_library_may_search_and_what_fails_is_told(
    device: torch.device, own_tables: Path
) -> None:
    model = fi.Inception(8, 8, 8, 8, 8, 8, 8).to(device).eval()
    x = torch.randn(1, 8, 4, 4, device=device)
    searches: set[bool] = set()

    def timer(work: Any) -> float:
        searches.add(torch.backends.cudnn.benchmark)
        raise OSError("no clock")

    tuning = Tuning(TARGETS["sm_90"], table.user_path("sm_90"), {}, timer, 1)
    with fi.backend("triton"), torch.no_grad(), pytest.raises(OSError, match="no clock"):
        tuning.go(model, x, time.monotonic() + 600, again=False)
    assert searches == {True}
    assert not torch.backends.cudnn.benchmark
    assert "2 problems fail as the heuristic has them, the first one is pointwise: OSError" in str(
        tuning
    )


@needs_triton
def test_table_is_written_as_far_as_the_time_went(device: torch.device, own_tables: Path) -> None:
    model = fi.Inception(8, 8, 8, 8, 8, 8, 8).to(device).eval()
    x = torch.randn(1, 8, 4, 4, device=device)
    path = table.user_path("sm_90")
    tuning = Tuning(TARGETS["sm_90"], path, {}, lambda work: 1.0, 1)
    with fi.backend("triton"), torch.no_grad():
        tuning.go(model, x, time.monotonic(), again=False)
    assert tuning.left == 3
    assert not path.exists()
    assert "run it again to go on" in str(tuning)


@needs_triton
def test_time_that_others_leave_goes_to_searches_that_were_cut(
    device: torch.device, own_tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search ends with its share of the time, the library needs none."""
    model = fi.Inception(8, 8, 8, 8, 8, 8, 8).to(device).eval()
    x = torch.randn(1, 8, 4, 4, device=device)
    order: list[str] = []
    monkeypatch.setattr(Tuning, "_compare", lambda self, *_: order.append("library"))

    def search_of(self: Tuning, problem: Problem, pairs: Any, in_time: Any) -> bool:
        order.append(problem.family)
        # the second time is over for one of them
        return order.count(problem.family) == 2 and problem.family == "branches"

    monkeypatch.setattr(Tuning, "_search", search_of)
    tuning = Tuning(TARGETS["sm_90"], own_tables / "table.json", {}, lambda work: 1.0, 1)
    with fi.backend("triton"), torch.no_grad():
        tuning.go(model, x, time.monotonic() + 600, again=False)
    first = {"pointwise", "branches"}
    assert set(order[:2]) == set(order[-2:]) == first
    assert order[2:-2] == ["library"]
    assert tuning.left == 1


def test_what_multiplies_most_is_searched_first() -> None:
    families = ("mask", "stem_conv", "branches", "stem_wgrad", "pointwise")
    problems = [problem_of(family, SM_90) for family in families]
    most = [search.products(problem) for problem in problems]
    assert most[0] == 0
    # 7x7 filters in 256 packed positions; their gradients, and those of the 1x1 and 576 x 192
    assert most[1] == 2**17 * 64 * 256
    assert most[3] == 2**17 * 64 * 256 + 2**15 * (64 * 64 + 640 * 256)
    chosen.problems.update({(p.family, p.key): p for p in problems})
    found = problems_of([(p.family, p.key) for p in problems])
    order = sorted(range(5), key=lambda i: -most[i])
    assert [p.family for p in found] == [families[i] for i in order]
    assert [p.family for p in found][-1] == "mask"


def test_results_that_are_not_finite_are_a_failure() -> None:
    """They agree with nothing, not even with themselves."""

    class Unwritten(FakeCall):
        def results(self, args: Any) -> list[torch.Tensor]:
            return [torch.tensor([1.0, math.nan])]

    calls: Any = [(Unwritten(), (torch.zeros(1),))]
    bench = LaunchBench(BRANCHES, calls, lambda work: 0.5, 1)
    assert search.search(BRANCHES, bench, always) is None
    assert bench.error == "ArithmeticError: results are not finite"


def test_a_library_that_fails_ends_no_search(
    own_tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def timer(work: Any) -> float:
        raise RuntimeError("no plan for it")

    path = own_tables / "table.json"
    tuning = Tuning(SM_90, path, {}, timer, 1)
    key = dispatch.module_key(ARGUMENTS["branches"][0], 2**15, Operands(2, "tf32"))
    tuning._compare(key, [(FakeCall(), ())], always)  # type: ignore[list-item]
    assert "not compared with the library: no plan for it" in capsys.readouterr().out
    assert not tuning.plans
    assert not path.exists()


@needs_triton
@pytest.mark.parametrize("failed", [[], ["pointwise: OSError: no clock"]])
def test_launches_that_fail_are_its_exit_status(
    failed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it runs, and on what, is stood in for."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(tune, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(tune, "provenance", lambda device: {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tuning, "go", lambda self, *_, again: self.failed.extend(failed))
    assert main(["tune", "--device", str(cpu), "--image-size", "64"]) == len(failed)
    assert ("problems fail" in capsys.readouterr().out) == bool(failed)


def test_provenance_says_what_was_measured_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a table's entries are gone on with by, and whence they came."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a test's")
    monkeypatch.setattr("sys.argv", ["fused-inception", "tune", "--model", "paper"])
    origin = tune.provenance(torch.device("cpu"))
    assert origin["gpu"] == "a test's"
    assert origin["torch"] == torch.__version__
    assert origin["command"] == "python -m fused_inception tune --model paper"
    assert len(origin["sources"]) == 16
    monkeypatch.setattr(sources, "LAUNCHES", ("kernels", "ops"))
    assert tune.provenance(torch.device("cpu"))["sources"] != origin["sources"]


@needs_triton
def test_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--list", "--image-size", "64", "--eval", "--batch-size", "1"]) == 0
    out = capsys.readouterr().out
    for family in ("pointwise", "branches", "conv", "library convolutions"):
        assert family in out
    assert "wgrad" not in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_tune_says_so(capsys: pytest.CaptureFixture[str], own_tables: Path) -> None:
    assert main(["tune"]) == 2
    assert "needs" not in capsys.readouterr().out
    assert not any(own_tables.rglob("*.json"))

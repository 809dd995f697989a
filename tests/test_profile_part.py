"""The part "profile" of `gpu_check`: what it runs first, what it lists."""

import pytest
import torch

from benchmarks.gpu import profiles
from benchmarks.problems import Problem
from benchmarks.providers import PROVIDERS
from tests.test_gpu_check import CPU


def test_profiles_of_every_step_come_before_searches() -> None:
    """Those of ours and eager, of their graphs, then of torch.compile and its graphs."""
    items = profiles.items({"providers": None}, torch.device("cuda"))
    names = [item.key.split()[-1] for item in items]
    quick = ["fused", "eager"]
    assert names[:6] == 3 * quick
    assert names[6:12] == [f"{name}-graph" for _ in range(3) for name in quick]
    assert names[12:18] == ["compile"] * 3 + ["compile-graph"] * 3
    assert len({item.key for item in items}) == len(items) == 3 * len(PROVIDERS)


def test_a_profile_of_nothing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUPTI may not be used."""
    monkeypatch.setattr(profiles.profile, "events", lambda self: [])
    problem = Problem("kernels", "global_avg_pool2d", 1, "fp32", CPU)
    assert "no kernel" in profiles.run(problem, "step", "eager")["failures"][0]


def test_profile_lists_what_runs() -> None:
    facts = profiles.run(Problem("kernels", "global_avg_pool2d", 1, "fp32", CPU), "step", "eager")
    kernels = {row["kernel"]: row for row in facts["kernels"]}
    assert kernels["aten::mean"]["count"] == 1
    times = [row["us"] for row in facts["kernels"]]
    assert times == sorted(times, reverse=True)
    assert facts["device_us"] == pytest.approx(sum(times), rel=0.01)

"""Arguments are checked once for each description of them, and never taken for others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fused_inception import functional
from fused_inception.functional import fitting
from fused_inception.geometry import InceptionDims
from tests.cases import InceptionCase

DIMS = InceptionDims(16, 8, 8, 16, 8, 16, 8)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The descriptions that fit; none before a test."""
    found: set[Any] = set()
    monkeypatch.setattr(fitting, "_fitting", found)
    return found


def module_arguments() -> dict[str, Any]:
    data = InceptionCase("", DIMS, 2, 4, 4).tensors(torch.float32)
    ones, zeros = ([of(b.shape[0]) for b in data.biases] for of in (torch.ones, torch.zeros))
    return {
        "x": data.x,
        "filters": data.filters,
        "running_means": [t.clone() for t in zeros],
        "running_vars": [t.clone() for t in ones],
        "gammas": ones,
        "betas": zeros,
        "training": True,
        "batches_tracked": [torch.tensor(0) for _ in ones],
    }


def conv_arguments() -> dict[str, Any]:
    return {
        "x": torch.randn(2, 16, 4, 4),
        "weight": torch.randn(8, 16, 3, 3),
        "running_mean": torch.zeros(8),
        "running_var": torch.ones(8),
        "gamma": torch.ones(8),
        "beta": torch.zeros(8),
        "padding": 1,
        "training": True,
        "batches_tracked": torch.tensor(0),
    }


def other(name: str, i: int, change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    """Arguments whose `name` has another tensor at `i`."""

    def of(arguments: dict[str, Any]) -> dict[str, Any]:
        changed = [*arguments[name]]
        changed[i] = change(changed[i])
        return {**arguments, name: changed}

    return of


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "a filter's shape": (other("filters", 2, lambda t: t[:, :-1]), "w3 must be of shape"),
    "a filter's device": (
        other("filters", 0, lambda t: t.to("meta")),
        "w1 must be on the device of x, cpu, got meta",
    ),
    "a filter's dtype": (other("filters", 4, Tensor.double), "w5 must be float32"),
    "a mean's shape": (other("running_means", 1, lambda t: t[:-1]), "running_means must be of sha"),
    "a gamma missing": (other("gammas", 3, lambda t: None), "gammas must be 6 tensors or all None"),
    "no betas": (lambda a: {**a, "betas": [None] * 6}, "gammas must come with betas"),
    "no statistics": (
        lambda a: (
            {**a, **dict.fromkeys(("running_means", "running_vars"), [None] * 6)}
            | {"training": False}
        ),
        "training=False needs",
    ),
    "a counter's dtype": (other("batches_tracked", 0, Tensor.float), "batches_tracked must be int"),
    "no counters": (
        lambda a: {**a, "batches_tracked": [None] * 6, "momentum": None},
        "momentum=None averages",
    ),
    "eps": (lambda a: {**a, "eps": 0.0}, "eps must be positive"),
    "one value": (lambda a: {**a, "x": a["x"][:1, :, :1, :1]}, "more than 1 value per channel"),
    "strided statistics": (
        other("running_vars", 5, lambda t: torch.ones(2 * len(t))[::2]),
        "running_vars must be contiguous",
    ),
    "two dtypes of statistics": (
        lambda a: (
            {**a, "x": a["x"].half(), "filters": [w.half() for w in a["filters"]]}
            | {"running_means": [t.half() for t in a["running_means"]]}
        ),
        "must be of one dtype",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_module_that_fits_speaks_for_no_other(wrong: str) -> None:
    good = module_arguments()
    change, message = WRONG[wrong]
    functional.inception_bn(**good)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=message):
            functional.inception_bn(**change(good))
    functional.inception_bn(**good)


WRONG_CONV: dict[str, tuple[dict[str, Any], str]] = {
    "padding": ({"padding": -1}, "padding must be at least 0"),
    "stride": ({"stride": 0}, "stride must be at least 1"),
    "a filter that is no square": ({"weight": torch.zeros(8, 16, 3, 5)}, "weight must be of shape"),
    "a large filter": ({"weight": torch.zeros(8, 16, 9, 9)}, "does not fit"),
    "no gamma": ({"gamma": None}, "betas must come with gammas"),
    "eps": ({"eps": -1e-3}, "eps must be positive"),
    "no counter": ({"batches_tracked": None, "momentum": None}, "momentum=None"),
}


@pytest.mark.parametrize("wrong", WRONG_CONV)
def test_a_convolution_that_fits_speaks_for_no_other(wrong: str) -> None:
    good = conv_arguments()
    changes, message = WRONG_CONV[wrong]
    functional.conv2d_bn_relu(**good)
    with pytest.raises((ValueError, TypeError), match=message):
        functional.conv2d_bn_relu(**{**good, **changes})


def test_autocast_is_part_of_it() -> None:
    data = InceptionCase("", DIMS, 1, 4, 4).tensors(torch.float32)
    filters = [w.bfloat16() for w in data.filters]
    pairs = [t for pair in zip(filters, data.biases, strict=True) for t in pair]
    with torch.autocast("cpu", torch.bfloat16):
        functional.inception(data.x, *pairs)
    with pytest.raises(TypeError, match="w1 must be float32"):
        functional.inception(data.x, *pairs)


def test_training_is_part_of_it() -> None:
    good = module_arguments()
    good |= dict.fromkeys(("running_means", "running_vars", "batches_tracked"), [None] * 6)
    functional.inception_bn(**good)
    with pytest.raises(ValueError, match="training=False needs"):
        functional.inception_bn(**{**good, "training": False})


def test_what_is_what_is_part_of_it() -> None:
    """As many tensors of the same shapes in other places."""
    good = module_arguments()
    good |= dict.fromkeys(("gammas", "betas", "batches_tracked"), ())
    functional.inception_bn(**good)
    moved = {"running_vars": (), "gammas": good["running_vars"]}
    with pytest.raises(ValueError, match="running_means must come with running_vars"):
        functional.inception_bn(**{**good, **moved})


def test_the_check_is_part_of_it() -> None:
    calls: list[str] = []
    checks = [lambda *_, casts, name=name: calls.append(name) for name in "ab"]
    for check in 2 * checks:
        fitting.once(check, [torch.zeros(3)], None, casts=False)
    assert calls == ["a", "b"]


def test_checked_once(monkeypatch: pytest.MonkeyPatch, known: set[Any]) -> None:
    good = module_arguments()
    functional.inception_bn(**good)
    assert len(known) == 1
    calls: list[Any] = []
    monkeypatch.setattr(functional.batch_norm.checks, "inception_filters", calls.append)
    functional.inception_bn(**good)
    assert not calls


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch, known: set[Any]) -> None:
    monkeypatch.setattr(fitting, "_MOST", 2)
    good = conv_arguments()
    for n in range(1, 6):
        functional.conv2d_bn_relu(
            **{**good, "x": good["x"].expand(2, -1, -1, -1).repeat(n, 1, 1, 1)}
        )
    assert 0 < len(known) <= 2


def test_symbols_for_sizes(known: set[Any]) -> None:
    """A tracer's sizes cannot be kept."""
    w, b = torch.randn(8, 16, 3, 3), torch.zeros(8)
    traced = make_fx(lambda *t: functional.conv2d_relu(*t, 1, 1), tracing_mode="symbolic")(
        torch.randn(2, 16, 4, 4), w, b
    )
    assert not known
    x = torch.randn(3, 16, 6, 5)
    torch.testing.assert_close(traced(x, w, b), functional.conv2d_relu(x, w, b, 1, 1))

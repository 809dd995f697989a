"""The launch configurations in force: those that a table has measured, else the heuristic's.

Here is one function for each of the heuristics' that has something to choose, with its arguments;
the scripts of the operators ask these. A call costs a look-up in a cache.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fused_inception.tuning import (
    conv_heuristic,
    heuristic,
    naive_heuristic,
    norm_heuristic,
    pool_heuristic,
    table,
    wgrad_heuristic,
)
from fused_inception.tuning.configs import (
    AvgPoolProjectConfig,
    BranchesConfig,
    ConvConfig,
    DgradConfig,
    ImageConvConfig,
    InputGradConfig,
    MarchConfig,
    MaskConfig,
    NaiveConfig,
    NaiveWgradConfig,
    NormConfig,
    PointwiseConfig,
    StemConvConfig,
    StemWgradConfig,
    VectorConfig,
    WgradConfig,
)
from fused_inception.tuning.fields import from_fields, numbers
from fused_inception.tuning.heuristic import Operands
from fused_inception.tuning.limits import why_not
from fused_inception.tuning.targets import Target

_P = ParamSpec("_P")
_C = TypeVar("_C")


@dataclass(frozen=True)
class Problem:
    """What a family is asked: the arguments of its heuristic."""

    family: str
    arguments: tuple[Any, ...]  # all but the target
    target: Target

    @property
    def key(self) -> table.Key:
        """As tables have it."""
        return numbers(self.arguments)

    @property
    def itemsize(self) -> int:
        """Bytes of an element that a GEMM reads; 2 where there is none."""
        sizes = [a.itemsize for a in self.arguments if isinstance(a, Operands)]
        return sizes[0] if sizes else 2


@dataclass(frozen=True)
class Family:
    """Launches whose configuration is chosen as one."""

    name: str
    kind: type
    heuristic: Callable[..., Any]

    def problem(self, *args: Any, **named: Any) -> Problem:
        """The problem that a call of the heuristic with these arguments is about."""
        bound = _signature(self.heuristic).bind(*args, **named)
        bound.apply_defaults()
        target = bound.arguments.pop("target")
        return Problem(self.name, tuple(bound.arguments.values()), target)

    def by_heuristic(self, problem: Problem) -> Any:
        """The configuration without a measurement."""
        names = [name for name in _signature(self.heuristic).parameters if name != "target"]
        arguments = dict(zip(names, problem.arguments, strict=True))
        return self.heuristic(**arguments, target=problem.target)

    def measured(self, problem: Problem) -> Any:
        """The configuration that a table has for it; None where none has a usable one."""
        fields = table.lookup(self.name, problem.key, problem.target)
        if fields is None:
            return None
        try:
            config = from_fields(self.kind, fields)
            why = why_not(config, problem.itemsize, problem.target)
        except ValueError as error:
            config, why = None, str(error)
        if why is None:
            return config
        table.reject(self.name, problem.key, problem.target, why)
        return None


FAMILIES: dict[str, Family] = {}
# all that were asked in this process, by what a table knows of them
problems: dict[tuple[str, table.Key], Problem] = {}


def _family(kind: type, by_heuristic: Callable[_P, _C]) -> Callable[_P, _C]:
    """The function that takes the place of a heuristic `name_config`."""
    name = by_heuristic.__name__.removesuffix("_config")
    family = FAMILIES[name] = Family(name, kind, by_heuristic)

    @table.cached
    @functools.wraps(by_heuristic)
    def config(*args: Any, **named: Any) -> Any:
        problem = family.problem(*args, **named)
        problems[name, problem.key] = problem
        measured = family.measured(problem)
        return family.by_heuristic(problem) if measured is None else measured

    return config


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


pointwise_config = _family(PointwiseConfig, heuristic.pointwise_config)
branches_config = _family(BranchesConfig, heuristic.branches_config)
mask_config = _family(MaskConfig, heuristic.mask_config)
dgrad_config = _family(DgradConfig, heuristic.dgrad_config)
input_grad_config = _family(InputGradConfig, heuristic.input_grad_config)
wgrad_config = _family(WgradConfig, wgrad_heuristic.wgrad_config)
norm_config = _family(NormConfig, norm_heuristic.norm_config)
conv_config = _family(ConvConfig, conv_heuristic.conv_config)
image_conv_config = _family(ImageConvConfig, conv_heuristic.image_conv_config)
stem_conv_config = _family(StemConvConfig, conv_heuristic.stem_conv_config)
stem_wgrad_config = _family(StemWgradConfig, conv_heuristic.stem_wgrad_config)
avg_pool_project_config = _family(AvgPoolProjectConfig, conv_heuristic.avg_pool_project_config)
naive_config = _family(NaiveConfig, naive_heuristic.naive_config)
naive_input_grad_config = _family(InputGradConfig, naive_heuristic.naive_input_grad_config)
naive_wgrad_config = _family(NaiveWgradConfig, naive_heuristic.naive_wgrad_config)
vector_config = _family(VectorConfig, pool_heuristic.vector_config)
march_config = _family(MarchConfig, pool_heuristic.march_config)

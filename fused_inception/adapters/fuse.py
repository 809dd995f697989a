"""`fuse_`, `unfuse_` and `fused`: blocks become fused ones in place, and go back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fused_inception.adapters import ours, torchvision
from fused_inception.adapters.registry import POOLS, Entry
from fused_inception.adapters.report import ALREADY_FUSED, FILTERED, FusionError, FusionReport
from fused_inception.nn.adoption import origin_of, release, why_not_released
from fused_inception.nn.auxiliary import IN_PART

Filter = Callable[[nn.Module, str], bool]


def fuse_(
    model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False
) -> FusionReport:
    """Fuse, in place, every block of `model` that has a fused counterpart.

    These are the blocks of torchvision's GoogLeNet and of our reference: Inception modules,
    convolution + BatchNorm (or bias) + ReLU, auxiliary classifiers; in these two networks also the
    max pools and the global average pool. They are found anywhere in `model`, which may be such a
    block itself, or be wrapped, in DistributedDataParallel for example.

    A block changes its class and nothing else: it stays the same object with the same layers,
    parameters, buffers, hooks and mode, so state dicts, optimisers, freezing, `deepcopy`, pickles
    and whoever else refers to it go on as before. Its layers are read at each call; where one of
    them gets a hook, a parametrisation or another type later, the layers compute by themselves.

    Left as they are, with the reason in the report: subclasses of the known types; blocks with a
    hook, a parametrisation, another type (quantised, SyncBatchNorm) or an option without a kernel
    in a layer inside; blocks that `torch.compile` has taken on their own.

    Args:
        model: any module.
        filter_fn: called with each block that could be fused and its qualified name; False leaves
            it as it is.
        strict: raise where a known block cannot be fused, or where there is none.

    Returns:
        The report; blocks that are fused already are in `skipped` as such.

    Raises:
        FusionError: `strict` is violated; nothing has been changed.
        TypeError: `model` is no module.
    """
    report, _ = _fuse(model, filter_fn, strict)
    return report


def survey(model: nn.Module) -> FusionReport:
    """What `fuse_` would do; changes nothing."""
    found = _Survey(None)
    found.visit(model, "", None)
    found.report.applied = False
    return found.report


def unfuse_(model: nn.Module) -> None:
    """Undo `fuse_`: the blocks of `model` that it fused have their original class again.

    They are the same objects all the time; hooks, modes and weights set in between stay.

    Raises:
        ValueError: nothing in `model` was fused by `fuse_`: modules that were made fused, as those
            of `googlenet` or `torchvision_blocks`, have nothing to go back to. Or a block was given
            another class since, by FSDP's `fully_shard` or a parametrisation of the block itself,
            which is to be undone first. Nothing is changed.
        TypeError: `model` is no module.
    """
    check_module(model)
    adopted = {name: m for name, m in model.named_modules() if origin_of(m) is not None}
    if not adopted:
        raise ValueError(
            f"fuse_ has fused nothing in this {type(model).__name__}: there is nothing to undo"
        )
    _release(adopted)


@contextmanager
def fused(
    model: nn.Module, *, filter_fn: Filter | None = None, strict: bool = False
) -> Iterator[FusionReport]:
    """`fuse_` inside a `with` block; on leaving it, what it fused, and only that, is undone.

    Yields the report; arguments and errors are those of `fuse_`, on leaving those of `unfuse_`.
    """
    report, changed = _fuse(model, filter_fn, strict)
    names = {id(module): name for name, module in model.named_modules()}
    try:
        yield report
    finally:
        _release({names[id(module)]: module for module in changed})


def _fuse(
    model: nn.Module, filter_fn: Filter | None, strict: bool
) -> tuple[FusionReport, list[nn.Module]]:
    """The report, and the modules that changed."""
    check_module(model)
    survey = _Survey(filter_fn)
    survey.visit(model, "", None)
    report = survey.report
    if strict and (report.refused or not (report.fused or report.skipped)):
        report.applied = False
        raise FusionError(report)
    return report, [m for block, entry in survey.plan for m in entry.adopt(block)]


def _release(modules: dict[str, nn.Module]) -> None:
    """All, or, where one cannot go back, none."""
    for name, module in modules.items():
        why_not = why_not_released(module)
        if why_not is not None:
            raise ValueError(f"{name or 'the model'} {why_not}; nothing was changed")
    for module in modules.values():
        if origin_of(module) is not None:
            release(module)


class _Survey:
    """Walks through a model, changes nothing; says which blocks are to be fused, and which not."""

    def __init__(self, filter_fn: Filter | None) -> None:
        self.report = FusionReport()
        self.plan: list[tuple[nn.Module, Entry]] = []
        self._filter = filter_fn
        families = (torchvision.family(), ours.family())
        self._known = {cls: entry for family in families for cls, entry in family.blocks.items()}
        self._networks = tuple(cls for family in families for cls in family.networks)
        self._reasons: dict[int, str | None] = {}
        self._open: set[int] = set()

    def visit(self, module: nn.Module, name: str, parent: nn.Module | None) -> None:
        """Judge `module` or, where its type is not known, all that is inside."""
        if type(module) in ours.FUSED:
            self.report.skipped[name] = _how_fused(module)
            return
        entry = self._known.get(type(module))
        reason = None
        if entry is None and isinstance(parent, self._networks):
            entry = POOLS.get(type(module))
            if entry is not None and type(parent) not in self._networks:
                reason = f"the network is a {_subclass(parent, self._networks)}"
        if entry is None:
            self._inside(module, name)
            return
        if id(module) not in self._reasons:
            reason = self._obstacle(module, name, entry) if reason is None else reason
            self._reasons[id(module)] = reason
            if reason is None:
                self.plan.append((module, entry))
        reason = self._reasons[id(module)]
        if reason is not None:
            self.report.skipped[name] = reason
            return
        self.report.fused.append(name)
        self.report.changes[name] = f"{entry.label} -> {entry.becomes.__name__}"

    def _obstacle(self, module: nn.Module, name: str, entry: Entry) -> str | None:
        if self._filter is not None and not self._filter(module, name):
            return FILTERED
        return entry.obstacle(module)

    def _inside(self, module: nn.Module, name: str) -> None:
        if isinstance(module, tuple(self._known)):
            self.report.skipped[name] = f"is a {_subclass(module, tuple(self._known))}"
            return
        if id(module) in self._open:  # holds itself
            return
        self._open.add(id(module))
        for child_name, child in module._modules.items():
            if child is not None:
                self.visit(child, f"{name}.{child_name}" if name else child_name, module)
        self._open.remove(id(module))


def _subclass(module: nn.Module, known: tuple[type[nn.Module], ...]) -> str:
    base = next(cls for cls in known if isinstance(module, cls))
    return f"{type(module).__name__}, a subclass of {base.__module__}.{base.__qualname__}"


def _how_fused(module: Any) -> str:
    obstacle = module._obstacle()
    if obstacle is None:
        return ALREADY_FUSED
    return f"{ALREADY_FUSED}{': ' if obstacle == IN_PART else ', but '}{obstacle}"


def check_module(model: object) -> None:
    """`model` is a module.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

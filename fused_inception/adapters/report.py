"""What `fuse_` did, what it left alone, and why."""

from dataclasses import dataclass, field

ALREADY_FUSED = "already fused"
FILTERED = "filter_fn said no"


@dataclass
class FusionReport:
    """The blocks that `fuse_` knows, by qualified name; `str` gives a table.

    Layers that it does not know, linear layers and dropout for example, are not mentioned.

    Attributes:
        fused: blocks that run as a fused operator now, in the order of the model. A module that
            the model holds at two places is named twice.
        skipped: blocks that were left as they are, with the reason.
        changes: of every block in `fused`, what it was and what it became.
        applied: whether the model was changed; not in the report of a `FusionError`.
    """

    fused: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    applied: bool = True

    @property
    def refused(self) -> dict[str, str]:
        """What of `skipped` neither was fused before nor was left out by `filter_fn`."""
        chosen = (ALREADY_FUSED, FILTERED)
        return {name: why for name, why in self.skipped.items() if not why.startswith(chosen)}

    def __str__(self) -> str:
        done = "fused" if self.applied else "could be fused"
        rows = [(name or "(the model)", done, self.changes.get(name, "")) for name in self.fused]
        rows += [(name or "(the model)", "skipped", why) for name, why in self.skipped.items()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        total = f"{len(self.fused)} {done}, {len(self.skipped)} skipped"
        before = sum(why.startswith(ALREADY_FUSED) for why in self.skipped.values())
        if before:
            total += f", {before} of them fused before"
        if not rows:
            total = "nothing here that fuse_ knows"
        return "\n".join([*lines, total])


class FusionError(ValueError):
    """`fuse_(strict=True)` met a block that it cannot fuse; the model is as it was.

    Attributes:
        report: what could be fused, what could not and why.
    """

    def __init__(self, report: FusionReport) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        refused = self.report.refused
        if not refused:
            return "strict: the model has no block that fuse_ knows; nothing was changed"
        listed = "".join(f"\n  {name or '(the model)'}: {why}" for name, why in refused.items())
        return f"strict: {len(refused)} blocks cannot be fused; nothing was changed{listed}"

"""Which kernels calls of our operators launch, and their compilation before they do."""

from collections.abc import Iterable, Sequence

from fused_inception.kernels.ahead import Specialisation, compile_all, recorded
from fused_inception.kernels.launch import only_described
from fused_inception.ops.ahead import Call
from fused_inception.tuning import table
from fused_inception.tuning.targets import Target, standing_for


def kernels_of(calls: Iterable[Call], target: Target) -> list[Specialisation]:
    """The kernels that these calls launch on the current device, which is a `target`; without those
    that this process has launched before."""
    with standing_for(target), recorded() as found:
        for call in calls:
            if call.launches:
                call.run()
    return list(found)


def lookups_of(calls: Iterable[Call], target: Target) -> dict[tuple[str, table.Key], list[Call]]:
    """What these calls would look up in the tables of `target`: (family, key) -> the calls that
    do. No GPU is needed."""
    found: dict[tuple[str, table.Key], list[Call]] = {}
    for call in calls:
        if call.launches:
            with standing_for(target), only_described(), table.asked() as asked:
                call.run()
            for lookup in dict.fromkeys(asked):
                found.setdefault(lookup, []).append(call)
    return found


def compile_kernels(
    specs: Sequence[Specialisation], workers: int
) -> tuple[list[Specialisation], dict[str, str]]:
    """Compile those that Triton's cache on disk lacks, in `workers` processes: (what was compiled,
    error by kernel)."""
    errors: dict[str, str] = {}
    compiled = []

    def done(spec: Specialisation, error: str | None) -> None:
        if error is None:
            compiled.append(spec)
        else:
            errors[spec.kernel] = error

    compile_all([spec for spec in specs if not spec.on_disk()], workers, done)
    return compiled, errors

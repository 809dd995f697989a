"""Frozen dataclasses as the plain values of a JSON file, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints


def numbers(value: Any) -> tuple[int | str, ...]:
    """The numbers, names and flags in dataclasses and tuples, in order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, f.name) for f in dataclasses.fields(value))
    if isinstance(value, tuple):
        return tuple(part for inner in value for part in numbers(inner))
    return (value,)


def from_fields(kind: type, fields: object) -> Any:
    """The configuration of class `kind` with these fields, nested as `dataclasses.asdict` nests.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"{kind.__name__} takes fields, got {fields!r}")
    types = get_type_hints(kind)
    if fields.keys() != types.keys():
        got, want = ", ".join(map(str, fields)), ", ".join(types)
        raise ValueError(f"{kind.__name__} has the fields {want}, got {got}")
    values = {}
    for name, expected in types.items():
        value = fields[name]
        if dataclasses.is_dataclass(expected):
            value = from_fields(expected, value)  # type: ignore[arg-type]
        elif type(value) is not expected:
            raise ValueError(f"{name} must be of type {expected.__name__}, got {value!r}")
        values[name] = value
    return kind(**values)

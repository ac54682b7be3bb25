"""Options as dataclass fields: one declaration serves the Python API, the command line and YAML
files.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, TypeVar

from octavo.errors import ConfigError

T = TypeVar("T")

_TYPES = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "None": (type(None),),
}


def option(default: Any, help: str, choices: tuple[str, ...] | None = None, **field: Any) -> Any:
    """A dataclass field that carries its help text and, where there are few values, those."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices}, **field)


def type_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The alternatives of a field's annotation: ("int", "None") for `int | None`."""
    return tuple(part.strip() for part in str(field.type).split("|"))


def from_options(cls: type[T], options: dict[str, Any]) -> T:
    """Build the options object `cls` from keywords.

    Raises:
        ConfigError: an unknown option (with the nearest known name), a wrong type or value.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"Unknown option {name!r}.{hint} Known options: {', '.join(sorted(known))}."
            )
        _check(known[name], value)
    return cls(**options)


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    names = type_names(field)
    allowed = tuple(kind for name in names for kind in _TYPES[name])
    if not isinstance(value, allowed) or (isinstance(value, bool) and "bool" not in names):
        raise ConfigError(f"Option {field.name!r} takes {' or '.join(names)}, not {value!r}.")
    choices = field.metadata["choices"]
    if choices and value is not None and value not in choices:
        raise ConfigError(
            f"Option {field.name!r} must be one of {', '.join(choices)}, not {value!r}."
        )

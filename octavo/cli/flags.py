"""Command-line flags and YAML files from option dataclasses: `max_model_len` becomes
`--max-model-len`, and `drain_timeout_s`, as times are in seconds, `--drain-timeout`.

A flag that was not given is absent from the namespace, so that three layers can be told apart: the
command line wins over the --config file, which wins over the defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from octavo.config.options import type_names
from octavo.errors import ConfigError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgG]?)")
# As vLLM reads them: small letters are powers of 1000, capital ones of 1024.
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


def add_options(parser: argparse.ArgumentParser, cls: type[Any], *skip: str) -> None:
    """One flag per field of the options class `cls`, except those named in `skip`."""
    group = parser.add_argument_group(
        cls.__name__.removesuffix("Args").removesuffix("Config").lower() + " options"
    )
    for field in dataclasses.fields(cls):
        if field.name in skip:
            continue
        names = type_names(field)
        settings: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": _help(field),
        }
        if "bool" in names:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = {"int": _size, "float": float}.get(names[0], str)
            settings["metavar"] = {"int": "N", "float": "X"}.get(names[0], "TEXT")
            if choices := field.metadata["choices"]:
                settings |= {"choices": choices, "metavar": None}
        group.add_argument(f"--{flag_name(field.name)}", **settings)


def flag_name(field_name: str) -> str:
    """How users write the option, on the command line and in YAML."""
    return field_name.removesuffix("_s").replace("_", "-")


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"]).replace("%", "%%")
    if "default" in text or field.default is None:
        return text
    return f"{text} (default: {field.default})"


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        if re.fullmatch(r"-\d+", text):
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8192, 8k or 4G")
    value = float(match[1]) * _UNITS[match[2]]
    if not value.is_integer():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(value)


def add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="options from a YAML file, written as on the command line without the dashes",
    )


def split_options(namespace: argparse.Namespace, *classes: type[Any]) -> tuple[dict[str, Any], ...]:
    """What was given for each class, on the command line or in the --config file.

    Raises:
        ConfigError: the file cannot be read or names something that no class has.
    """
    given = _read_config(getattr(namespace, "config", None), classes) | {
        name: value for name, value in vars(namespace).items() if value is not None
    }
    return tuple(
        {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}
        for cls in classes
    )


def _read_config(path: Path | None, classes: Iterable[type[Any]]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"Cannot read the config file {path}: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a mapping of options, not a {type(content).__name__}.")
    options = {str(name).replace("_", "-"): value for name, value in content.items()}
    known = {flag_name(field.name): field for cls in classes for field in dataclasses.fields(cls)}
    if unknown := sorted(set(options) - known.keys()):
        raise ConfigError(
            f"{path} has unknown options: {', '.join(unknown)}. Known: {', '.join(sorted(known))}."
        )
    try:
        return {
            known[name].name: _yaml_value(known[name], value) for name, value in options.items()
        }
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{path}: {error}.") from error


def _yaml_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """YAML knows no sizes: 8k and 4G arrive as text."""
    return _size(value) if isinstance(value, str) and "int" in type_names(field) else value

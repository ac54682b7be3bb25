"""Every environment variable that Octavo reads, in one table. Nothing else may touch
`os.environ`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable(
            "OCTAVO_HOME",
            "",
            "folder for converted models and caches (default: the user's cache folder)",
        ),
        Variable(
            "OCTAVO_LOG_LEVEL",
            "INFO",
            "least level that is logged",
            ("DEBUG", "INFO", "WARNING", "ERROR"),
        ),
        Variable("OCTAVO_LOG_FORMAT", "text", "json logs one object a line", ("text", "json")),
        Variable("OCTAVO_API_KEY", "", "API key that the server asks for; --api-key wins"),
        Variable("OCTAVO_SSL_KEYFILE_PASSWORD", "", "opens the file of --ssl-keyfile"),
        Variable("XDG_CACHE_HOME", "", "the user's cache folder, as the XDG standard has it"),
        Variable("HF_TOKEN", "", "read by huggingface-hub: token for gated models"),
        Variable("HF_HOME", "", "read by huggingface-hub: where downloads are kept"),
        Variable("HF_HUB_OFFLINE", "", "read by huggingface-hub: 1 never touches the network"),
    )
}


def get(name: str) -> str:
    """The variable's value, or its default. KeyError for one that is not in the table.

    Raises:
        ConfigError: the value is not one of its choices.
    """
    variable = VARIABLES[name]
    value = os.environ.get(name) or variable.default
    if not variable.choices:
        return value
    for choice in variable.choices:
        if choice.lower() == value.lower():
            return choice
    raise ConfigError(f"{name} must be one of {', '.join(variable.choices)}, not {value!r}.")


def with_values(**values: str) -> dict[str, str]:
    """This process's environment with some variables of the table set: for a child."""
    assert values.keys() <= VARIABLES.keys()
    return {**os.environ, **values}


def calm_openmp() -> None:
    """Let OpenMP's threads sleep instead of spinning when they wait for each other. Its library
    reads this when torch is first imported. Spinning costs up to 10 times the speed as soon as
    another process wants a core: 200 to 1,200 ms per token instead of 85, float32, two busy cores.
    """
    if not os.environ.get("OMP_WAIT_POLICY"):
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def home() -> Path:
    """Octavo's folder for converted models and caches; not created here."""
    if configured := get("OCTAVO_HOME"):
        return Path(configured).expanduser()
    cache = get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "octavo"

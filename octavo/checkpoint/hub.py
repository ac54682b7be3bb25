"""Models on the Hugging Face hub: what is downloaded, and what its errors mean."""

from __future__ import annotations

from pathlib import Path

from octavo.errors import CheckpointError

_TEXT_FILES = ("*.json", "*.jinja")
_WEIGHT_FILES = ("*.safetensors",)
_SKIPPED = ("consolidated*", "original/*", "onnx/*", "*/*")


def download(
    repo_id: str, *, revision: str | None, download_dir: str | None, needs_weights: bool
) -> Path:
    """The repository's folder in the hub cache, downloaded where necessary. HF_HOME, HF_TOKEN and
    HF_HUB_OFFLINE are huggingface-hub's own business.

    Raises:
        CheckpointError: not found, gated, offline and not cached, or the network failed.
    """
    from huggingface_hub import errors, snapshot_download

    where = f"{repo_id!r} at revision {revision!r}" if revision else repr(repo_id)
    try:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                cache_dir=download_dir,
                allow_patterns=[*_TEXT_FILES, *(_WEIGHT_FILES if needs_weights else ())],
                ignore_patterns=list(_SKIPPED),
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"Model {where} is gated: accept its terms on https://huggingface.co/{repo_id}, then "
            f"set HF_TOKEN to a token of that account."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"Model {repo_id!r} has no revision {revision!r}.") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"Model {where} is not on the hub (or is private: set HF_TOKEN). Check the spelling."
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a valid hub id: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"Model {where} is not in the local cache and the hub cannot be reached. Connect, "
            f"unset HF_HUB_OFFLINE, or give a folder or .gguf file instead."
        ) from error
    except Exception as error:  # the HTTP client's own errors are many and change with versions
        raise CheckpointError(f"Model {where} could not be downloaded: {error}") from error

"""`locate`: from what the user wrote to files on this machine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from octavo.checkpoint.builtin import ensure_builtin
from octavo.checkpoint.catalogue import BUILTIN_MODELS
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.config_check import check_config, check_token_ids
from octavo.checkpoint.folder import TokenizerFiles, open_folder, read_tokenizer_files
from octavo.checkpoint.hub import download
from octavo.config import EngineArgs
from octavo.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


def locate_from(args: EngineArgs) -> Checkpoint:
    """The checkpoint that the options name. Raises CheckpointError as `locate` does."""
    return locate(
        args.model,
        revision=args.revision,
        download_dir=args.download_dir,
        tokenizer=args.tokenizer,
        load_format=args.load_format,
    )


def locate(
    model: str,
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    tokenizer: str | None = None,
    load_format: str = "auto",
    progress: bool = True,
) -> Checkpoint:
    """Find a model and read its configuration and tokenizer, but none of its weights.

    `model` is tried as a built-in name, a folder, a .gguf file and a hub id, in this order; a
    `tokenizer` given in the same ways replaces the model's own. Code that a checkpoint brings
    (`auto_map`) is never run.

    Raises:
        CheckpointError: nothing of that name, or its files are unusable.
    """
    if load_format not in _LOAD_FORMATS:
        raise CheckpointError(
            f"load_format must be one of {', '.join(_LOAD_FORMATS)}, not {load_format!r}."
        )
    needs_weights = load_format != "dummy"
    path = _find(model, revision, download_dir, needs_weights=needs_weights, progress=progress)
    checkpoint = _open(model, path, load_format)
    if tokenizer is not None:
        files = _tokenizer_files(tokenizer, download_dir, progress=progress)
        checkpoint = dataclasses.replace(
            checkpoint,
            tokenizer_json=files.tokenizer_json,
            tokenizer_config=files.tokenizer_config,
            chat_template=files.chat_template or checkpoint.chat_template,
        )
    return checkpoint


def _find(
    model: str,
    revision: str | None,
    download_dir: str | None,
    *,
    needs_weights: bool,
    progress: bool,
) -> Path:
    """The folder or .gguf file that a name stands for."""
    if model in BUILTIN_MODELS:
        return ensure_builtin(model, progress)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file.")
    if path.suffix.lower() != ".gguf" and _HUB_ID.fullmatch(model):
        return download(
            model, revision=revision, download_dir=download_dir, needs_weights=needs_weights
        )
    raise CheckpointError(
        f"No model {model!r}. Give a built-in name ({', '.join(BUILTIN_MODELS)}), a folder in "
        f"Hugging Face layout, a .gguf file, or a hub id like 'org/name'."
    )


def _open(model: str, path: Path, load_format: str) -> Checkpoint:
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            path = ggufs[0]
        elif ggufs:
            raise CheckpointError(
                f"{path} holds {len(ggufs)} .gguf files; give one of them, e.g. {ggufs[0]}."
            )
    is_gguf = path.is_file()
    if load_format in ("safetensors", "gguf") and is_gguf != (load_format == "gguf"):
        kind = "a .gguf file" if is_gguf else "a folder of safetensors"
        raise CheckpointError(f"load_format is {load_format!r}, but {path} is {kind}.")
    needs_weights = load_format != "dummy"
    if is_gguf:
        return open_gguf(model, path, needs_weights=needs_weights)
    return open_folder(model, path, needs_weights=needs_weights)


def open_gguf(model: str, path: Path, *, needs_weights: bool = True) -> Checkpoint:
    """A .gguf file as a checkpoint: its metadata says what config.json and tokenizer.json would."""
    from octavo.checkpoint.gguf_config import hf_config, hf_generation_config
    from octavo.checkpoint.gguf_file import GgufFile
    from octavo.checkpoint.gguf_vocab import hf_tokenizer

    file = GgufFile.open(path)
    config, generation_config = hf_config(file), hf_generation_config(file)
    check_config(config, path)
    check_token_ids(generation_config, path)
    tokenizer_json, tokenizer_config = hf_tokenizer(file) or (None, {})
    return Checkpoint(
        model=model,
        path=path,
        weights_format="gguf" if needs_weights else "none",
        weight_files=(path,) if needs_weights else (),
        config=config,
        generation_config=generation_config,
        tokenizer_config=tokenizer_config,
        tokenizer_json=tokenizer_json,
        chat_template=file.string("tokenizer.chat_template"),
    )


def _tokenizer_files(tokenizer: str, download_dir: str | None, *, progress: bool) -> TokenizerFiles:
    path = _find(tokenizer, None, download_dir, needs_weights=False, progress=progress)
    if path.is_file():
        gguf = open_gguf(tokenizer, path, needs_weights=False)
        files = TokenizerFiles(gguf.tokenizer_json, gguf.tokenizer_config, gguf.chat_template)
    else:
        files = read_tokenizer_files(path)
    if files.tokenizer_json is None:
        raise CheckpointError(f"{path} has no tokenizer.json.")
    return files

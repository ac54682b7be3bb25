"""A model folder in Hugging Face layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.config_check import check_config, check_token_ids, check_weights_fit
from octavo.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
QUANTIZED_FILE = "model.gguf"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_JSON_BYTES = 256 << 20  # the largest tokenizer.json are some tens of MB

# The class of the text part of a multimodal model, by `text_config.model_type`.
_TEXT_CLASSES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
# Read from the outer config where the nested one does not have them.
_OUTER_KEYS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "dtype",
    "quantization_config",
)


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The text side of a model: everything a tokenizer is made from."""

    tokenizer_json: str | None
    tokenizer_config: Mapping[str, Any]
    chat_template: str | None


def open_folder(model: str, folder: Path, *, needs_weights: bool) -> Checkpoint:
    """Read a folder's configuration and list its weight files.

    Raises:
        CheckpointError: config.json or a shard is missing, a file is broken, or the weights are
        pickled.
    """
    config = _unnested(read_json(folder / "config.json"), folder)
    check_config(config, folder / "config.json")
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.is_file() else {}
    check_token_ids(generation_config, path)
    text = read_tokenizer_files(folder)
    weight_files = _weight_files(folder) if needs_weights else ()
    if weight_files:
        check_weights_fit(config, weight_files)
    weights_format: Literal["safetensors", "none"] = "safetensors" if weight_files else "none"
    quantized = folder / QUANTIZED_FILE
    return Checkpoint(
        model=model,
        path=folder,
        weights_format=weights_format,
        weight_files=weight_files,
        quantized_file=quantized if needs_weights and quantized.is_file() else None,
        config=config,
        generation_config=generation_config,
        tokenizer_config=text.tokenizer_config,
        tokenizer_json=text.tokenizer_json,
        chat_template=text.chat_template,
    )


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """What a folder says of its tokenizer; parts that are missing are None or empty."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    tokenizer = folder / "tokenizer.json"
    return TokenizerFiles(
        tokenizer_json=read_text(tokenizer) if tokenizer.is_file() else None,
        tokenizer_config=config,
        chat_template=_chat_template(folder, config),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing, too large, no JSON, or no object.
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_text(path: Path) -> str:
    """A UTF-8 file as text.

    Raises:
        CheckpointError: the file is missing, too large or not UTF-8.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB.")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a model folder needs config.json, tokenizer.json "
            f"and *.safetensors, as on the Hugging Face hub."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}") from error


def _unnested(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The text model's configuration of a multimodal one; others as they are.

    `text_part_of` then names the outer class: the loader skips the other parts' tensors.
    """
    text = config.get("text_config")
    if text is None:
        return config
    if not isinstance(text, dict):
        raise CheckpointError(f"{folder / 'config.json'}: text_config must be an object.")
    outer = config.get("architectures") or ["unknown"]
    if not isinstance(outer, list):
        raise CheckpointError(f"{folder / 'config.json'}: architectures must be a list.")
    inner = _TEXT_CLASSES.get(str(text.get("model_type")))
    # A null of the text part may mean something ("no sliding window"), so it stays.
    shared = {key: config[key] for key in _OUTER_KEYS if key in config and text.get(key) is None}
    return text | shared | {"architectures": [inner] if inner else outer, "text_part_of": outer[0]}


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return read_text(jinja)
    template = tokenizer_config.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name: [{"name": ..., "template": ...}]
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        template = named[-1] if named else None
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{folder}: the chat template must be a string.")
    return template


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if index.is_file():
        return _shards(folder, read_json(index))
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    files = sorted(folder.glob("*.safetensors"))
    # Mistral's folders hold the same weights a second time under other names.
    files = [file for file in files if not file.name.startswith("consolidated")] or files
    if files:
        return tuple(files)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights only as Python pickles ({pickled[0]}), which can run code "
            f"when they are read and are never loaded. Convert them to safetensors first, with "
            f"transformers: `AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)`."
        )
    raise CheckpointError(
        f"{folder} has no *.safetensors files; use load_format='dummy' to run without weights."
    )


def _shards(folder: Path, index: dict[str, Any]) -> tuple[Path, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX} has no weight_map.")
    files = []
    # json.dumps: names may be of any kind, and lists are no keys.
    for name in {json.dumps(name): name for name in weight_map.values()}.values():
        is_name = isinstance(name, str) and name.isprintable() and PurePosixPath(name).name == name
        if not is_name:
            raise CheckpointError(f"{folder / _INDEX}: {name!a:.300} is no file name.")
        if not _is_file(folder / name):
            raise CheckpointError(
                f"{folder} has no {name}, which {_INDEX} names; download the model again."
            )
        files.append(folder / name)
    return tuple(sorted(files))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False

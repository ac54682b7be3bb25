"""`Checkpoint`: the files of one model and the parts of them that are read before any weight is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on this machine's disk.

    `config` is config.json with the text model's part unnested; for a .gguf file it is the
    equivalent made from the file's metadata. `tokenizer_json` is the text of a Hugging Face
    tokenizer.json (for a .gguf file, made from its vocabulary), or None where there is no
    tokenizer.
    """

    model: str  # as the user named it
    path: Path  # folder, or the .gguf file
    weights_format: Literal["safetensors", "gguf", "none"]
    weight_files: tuple[Path, ...]
    config: Mapping[str, Any] = field(repr=False)
    generation_config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    tokenizer_config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    # The same weights as a .gguf file in 4 or 8 bits, where the folder has both.
    quantized_file: Path | None = None
    tokenizer_json: str | None = field(repr=False, default=None)
    chat_template: str | None = field(repr=False, default=None)

"""A model folder without weights, for `load_format="dummy"`: it starts in well under a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.tiny_tokenizers import byte_level_json

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 511,
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def write_tiny_folder(folder: Path, *, has_tokenizer: bool = True, **config: Any) -> Path:
    """A tiny Llama's config.json, a byte-level tokenizer and a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    if has_tokenizer:
        (folder / "tokenizer.json").write_text(byte_level_json())
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE})
        )
    return folder

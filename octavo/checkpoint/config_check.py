"""config.json is written by strangers: whatever a model reads of it has the kind and range that the
reader expects, or the folder is refused here, in words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.errors import CheckpointError

_MOST_LAYERS = 4096
_MOST = 1 << 24  # of any other size: ten times the largest there are
_MOST_POSITIONS = 1 << 31
_MOST_TOKENS = 1 << 31
_VALUES_PER_BYTE = 4  # weights of two bits would be the smallest there are
_ALWAYS_ALLOWED = 1 << 24  # weights: no harm is done by so few

_NEEDED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_SIZES = (  # positive integers; null where a model has none
    *("intermediate_size", "moe_intermediate_size", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "sliding_window_pattern"),
)
_COUNTS = ("sliding_window", "decoder_sparse_step", "max_window_layers")  # 0 is a value, too
_POSITIVE = (
    *("rms_norm_eps", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "partial_rotary_factor"),
)
_BASES = ("rope_theta", "rope_local_base_freq")
_FLAGS = (
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"),
    "norm_topk_prob",
)
_TEXTS = ("model_type", "hidden_act", "hidden_activation", "dtype", "torch_dtype")
_OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config")


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Check what models read of a config.json, or of its equivalent from a .gguf file.

    Values that are missing are the model's business; so is null, except where no model takes it.

    Raises:
        CheckpointError: names the key.
    """
    check = _Check(config, path)
    for name in _NEEDED_SIZES:
        check.integer(name, 1, _MOST_LAYERS if name == "num_hidden_layers" else _MOST, null=False)
    check.integer("max_position_embeddings", 1, _MOST_POSITIONS)
    check.integer("original_max_position_embeddings", 2, _MOST_POSITIONS)
    for name in _SIZES:
        check.integer(name, 1, _MOST)
    for name in _COUNTS:
        check.integer(name, 0, _MOST_POSITIONS)
    for name in _POSITIVE:
        check.number(name, 0.0)
    for name in _BASES:
        check.number(name, 1.0)
    for name in _FLAGS:
        check.kind(name, bool, "true or false")
    for name in _TEXTS:
        check.kind(name, str, "a string")
    for name in _OBJECTS:
        check.kind(name, dict, "an object")
    check.strings("architectures")
    check.strings("layer_types")
    check.layers()
    check.head_dim()
    for name in ("rope_scaling", "rope_parameters"):
        _check_rope(config.get(name) or {}, f"{path}: {name}")
    check_token_ids(config, path)


def check_token_ids(config: Mapping[str, Any], path: Path) -> None:
    """`eos_token_id` of a config.json or generation_config.json: null, an id or a list of ids."""
    ids = config.get("eos_token_id")
    for token_id in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not _is_integer(token_id, 0, _MOST_TOKENS):
            raise CheckpointError(f"{path}: eos_token_id holds {_shown(token_id)}, no token id.")


def check_weights_fit(config: Mapping[str, Any], weight_files: Sequence[Path]) -> None:
    """Refuse a config of a model far larger than its weight files, before memory is taken for it.

    Raises:
        CheckpointError: the files cannot hold even the embedding and the attention.
    """
    vocab_size, size, num_layers, num_heads = (config.get(name, 0) for name in _NEEDED_SIZES)
    head_dim = config.get("head_dim") or size // max(num_heads, 1)
    num_values = vocab_size * size + num_layers * 2 * size * num_heads * head_dim
    num_bytes = sum(path.stat().st_size for path in weight_files)
    if num_values > num_bytes * _VALUES_PER_BYTE + _ALWAYS_ALLOWED:
        raise CheckpointError(
            f"{weight_files[0].parent}: the config describes a model of more than {num_values} "
            f"weights, but its files have {num_bytes} bytes. One of them belongs to another model."
        )


class _Check:
    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        self._config = config
        self._path = path

    def integer(self, name: str, low: int, high: int, *, null: bool = True) -> None:
        value = self._config.get(name)
        if value is None and (null or name not in self._config):
            return
        if not _is_integer(value, low, high):
            self._refuse(name, f"an integer from {low} to {high}")

    def number(self, name: str, low: float) -> None:
        value = self._config.get(name)
        if value is not None and not _is_number(value, above=low):
            self._refuse(name, f"a number above {low:g}")

    def kind(self, name: str, kind: type, words: str) -> None:
        if not isinstance(self._config.get(name), kind | None):
            self._refuse(name, words)

    def strings(self, name: str) -> None:
        value = self._config.get(name)
        if value is None:
            return
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._refuse(name, "a list of strings")

    def layers(self) -> None:
        types, num_layers = self._config.get("layer_types"), self._config.get("num_hidden_layers")
        if types is not None and num_layers is not None and len(types) < num_layers:
            self._refuse("layer_types", f"a list of {num_layers} types, one for each layer")
        only = self._config.get("mlp_only_layers") or []
        if not isinstance(only, list) or not all(_is_integer(i, 0, _MOST_LAYERS) for i in only):
            self._refuse("mlp_only_layers", "a list of layer numbers")

    def head_dim(self) -> None:
        size, num_heads = self._config.get("hidden_size"), self._config.get("num_attention_heads")
        if size and num_heads and not self._config.get("head_dim") and size < num_heads:
            self._refuse("num_attention_heads", f"at most hidden_size ({size})")

    def _refuse(self, name: str, words: str) -> None:
        shown = _shown(self._config.get(name))
        raise CheckpointError(f"{self._path}: {name} must be {words}, not {shown}.")


def _check_rope(params: Mapping[str, Any], where: str) -> None:
    """Numbers of a RoPE scaling; Gemma 3 has one for each type of layer."""
    for name, value in params.items():
        if isinstance(value, dict):
            _check_rope(value, f"{where}.{name}")
            continue
        numbers = value if isinstance(value, list) else [value]
        if name in _BASES and value is not None and not _is_number(value, above=1.0):
            raise CheckpointError(f"{where}.{name} must be a number above 1, not {_shown(value)}.")
        is_size = name == "original_max_position_embeddings"
        if is_size and value is not None and not _is_integer(value, 2, _MOST_POSITIONS):
            raise CheckpointError(f"{where}.{name} must be an integer above 1.")
        if name in ("type", "rope_type"):
            if not isinstance(value, str | None):
                raise CheckpointError(f"{where}.{name} must be a string, not {_shown(value)}.")
            continue
        for number in numbers:
            if not (isinstance(number, bool | None) or _is_number(number, above=0.0)):
                raise CheckpointError(
                    f"{where}.{name} must hold numbers above 0, not {_shown(number)}."
                )


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, *, above: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return above < value < 1e30 and math.isfinite(value)


def _shown(value: Any) -> str:
    """In a message: short, and printable whatever it holds."""
    return ascii(value)[:80]

"""A .gguf file's metadata as the config.json and generation_config.json that it stands for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_tensors import read_tensor
from octavo.errors import CheckpointError, UnsupportedModelError

# GGUF architecture -> (Hugging Face class, model_type). llama.cpp stores Mistral as "llama".
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": ("Phi3ForCausalLM", "phi3"),
}

_INTEGERS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}

# What llama.cpp's own code knows of these architectures and therefore does not write down.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    "gemma3": {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "phi3": {"hidden_act": "silu"},
}

# Every n-th layer attends globally, the others within the sliding window.
_GLOBAL_EVERY = {"gemma2": 2, "gemma3": 6}
# The 27B models scale queries by hidden_size / heads instead of head_dim; told by layer count.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def hf_config(file: GgufFile) -> dict[str, Any]:
    """config.json of the text model.

    Raises:
        UnsupportedModelError: an architecture that has no counterpart here.
        CheckpointError: a needed key is missing or of the wrong kind.
    """
    arch = file.string("general.architecture") or ""
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path} holds architecture {arch!r}; supported in GGUF files: "
            f"{', '.join(ARCHITECTURES)}."
        )
    if file.integer(f"{arch}.expert_count", 0):
        raise UnsupportedModelError(
            f"{file.path} is a mixture-of-experts model, which is not supported in GGUF files."
        )
    name, model_type = ARCHITECTURES[arch]
    config: dict[str, Any] = {"architectures": [name], "model_type": model_type}
    for key, hf_key in _INTEGERS.items():
        config[hf_key] = _positive(file, f"{arch}.{key}")
    if config["num_hidden_layers"] > len(file.tensors):
        raise CheckpointError(
            f"{file.path} claims {config['num_hidden_layers']} layers, but has "
            f"{len(file.tensors)} tensors."
        )
    config |= _attention(file, arch, config)
    config |= {
        "rms_norm_eps": file.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6),
        "vocab_size": _embedding_rows(file, config["hidden_size"]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": _rope_base(file, f"{arch}.rope.freq_base"),
        **_DEFAULTS[arch],
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["rope_scaling"] = _rope_scaling(file, arch, config)
    if arch in _GLOBAL_EVERY:
        config |= _gemma(file, arch, config)
    if arch == "phi3":
        config |= _phi3(file, config)
    for key in ("bos", "eos", "padding"):
        token_id = file.integer(f"tokenizer.ggml.{key}_token_id")
        config[f"{'pad' if key == 'padding' else key}_token_id"] = token_id
    return config


def hf_generation_config(file: GgufFile) -> dict[str, Any]:
    """generation_config.json: what begins a text and every token that ends one."""
    ends: list[int] = []
    for key in ("eos", "eot", "eom"):
        token_id = file.integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None and token_id not in ends:
            ends.append(token_id)
    config: dict[str, Any] = {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}
    for key, hf_key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        token_id = file.integer(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            config[hf_key] = token_id
    return config


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.integer(key, default)
    if value is None or value <= 0:
        raise CheckpointError(f"{file.path}: {key} must be a positive integer, got {value!r}.")
    return value


def _rope_base(file: GgufFile, key: str) -> float:
    value = file.number(key, 10000.0)
    if value is None or value <= 1.0:
        raise CheckpointError(f"{file.path}: {key} must be above 1, got {value!r}.")
    return value


def _embedding_rows(file: GgufFile, width: int) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape[1:] != (width,):
        raise CheckpointError(
            f"{file.path}: tensor token_embd.weight is missing, or not {width} wide."
        )
    return embedding.shape[0]


def _attention(file: GgufFile, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    num_heads = config["num_attention_heads"]
    width = config["hidden_size"] // num_heads
    return {
        "num_key_value_heads": _positive(file, f"{arch}.attention.head_count_kv", num_heads),
        "head_dim": _positive(file, f"{arch}.attention.key_length", width),
    }


def _rope_scaling(file: GgufFile, arch: str, config: dict[str, Any]) -> dict[str, Any] | None:
    prefix = f"{arch}.rope.scaling"
    kind = file.string(f"{prefix}.type", "none")
    factor = file.number(f"{prefix}.factor", file.number(f"{arch}.rope.scale_linear"))
    original = file.integer(f"{prefix}.original_context_length")
    if "rope_factors_long.weight" in file.tensors:
        return _longrope(file, prefix, original, config)
    if "rope_freqs.weight" in file.tensors:
        return _llama3(_factors(file, "rope_freqs.weight"), original, config)
    if kind == "linear" or (kind == "none" and factor not in (None, 0.0, 1.0)):
        return {"rope_type": "linear", "factor": factor or 1.0}
    if kind == "yarn":
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor or 1.0}
        if original:
            scaling["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            if (value := file.number(f"{prefix}.yarn_{key}")) is not None:
                scaling[key] = value
        return scaling
    if kind not in ("none", "linear"):
        raise UnsupportedModelError(f"{file.path}: RoPE scaling {kind!r} is not supported.")
    return None


def _factors(file: GgufFile, name: str) -> npt.NDArray[np.float64]:
    factors = read_tensor(file, file.tensors[name]).astype(np.float64).ravel()
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise CheckpointError(f"{file.path}: {name} must hold finite numbers above 0.")
    return factors


def _longrope(
    file: GgufFile, prefix: str, original: int | None, config: dict[str, Any]
) -> dict[str, Any]:
    if "rope_factors_short.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor rope_factors_short.weight is missing.")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": _factors(file, "rope_factors_long.weight").tolist(),
        "short_factor": _factors(file, "rope_factors_short.weight").tolist(),
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }
    if (attention_factor := file.number(f"{prefix}.attn_factor")) is not None:
        scaling["attention_factor"] = attention_factor
    return scaling


def _llama3(
    factors: npt.NDArray[np.float64], original: int | None, config: dict[str, Any]
) -> dict[str, Any]:
    """Llama 3's rule, recovered from the per-frequency divisors that llama.cpp stores.

    Divisors that no such rule gives are passed on as they are, in the form of a longrope whose two
    tables agree.
    """
    factor = float(factors.max(initial=1.0))
    freqs = config["rope_theta"] ** (-np.arange(len(factors)) / len(factors))
    for length in (original, 8192):
        if length is None or factor <= 1.0:
            continue
        smooth = np.clip((length * freqs / (2 * math.pi) - 1.0) / (4.0 - 1.0), 0.0, 1.0)
        if np.allclose(factors, 1.0 / ((1.0 - smooth) / factor + smooth), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": round(factor, 3),
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": length,
            }
    return {
        "rope_type": "longrope",
        "long_factor": factors.tolist(),
        "short_factor": factors.tolist(),
        "original_max_position_embeddings": config["max_position_embeddings"],
        "attention_factor": 1.0,
    }


def _gemma(file: GgufFile, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    num_layers, every = config["num_hidden_layers"], _GLOBAL_EVERY[arch]
    is_27b = num_layers == _LAYERS_OF_27B[arch]
    extra: dict[str, Any] = {
        "sliding_window": file.integer(f"{arch}.attention.sliding_window", 4096),
        "layer_types": [
            "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
            for layer in range(num_layers)
        ],
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
        ),
    }
    if arch == "gemma2":
        for key, default in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
            extra[key] = file.number(f"{arch}.{key}", default)
    elif (local := file.number(f"{arch}.rope.freq_base_swa")) is not None:
        extra["rope_local_base_freq"] = local
    return extra


def _phi3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    rotary_dim = file.integer("phi3.rope.dimension_count", config["head_dim"])
    scaling = config["rope_scaling"] or {}
    original = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    return {
        "partial_rotary_factor": (rotary_dim or config["head_dim"]) / config["head_dim"],
        "sliding_window": file.integer("phi3.attention.sliding_window") or None,
        "original_max_position_embeddings": original,
    }

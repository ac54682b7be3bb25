"""Tensors of a .gguf file under their Hugging Face names, dequantised by numpy."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.checkpoint.gguf_file import GgufFile, GgufTensor
from octavo.errors import CheckpointError, WeightsError

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """A matrix as the file stores it."""

    kind: str  # GGML's name of the type
    shape: tuple[int, int]
    data: npt.NDArray[np.uint8]  # [rows, bytes of a row]


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_LAYER = _LLAMA_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

# By architecture: what a layer's tensors are called.
LAYER_NAMES: dict[str, dict[str, str]] = {
    "llama": _LLAMA_LAYER,
    "qwen2": _LLAMA_LAYER,
    "qwen3": _LLAMA_LAYER | _QK_NORM,
    "gemma2": _GEMMA_LAYER,
    "gemma3": _GEMMA_LAYER | _QK_NORM,
    "phi3": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
}

# RoPE divisors: part of the configuration, not weights.
_CONFIG_TENSORS = frozenset(
    ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
)
# llama.cpp rotates neighbouring pairs in these, Hugging Face the two halves of a head.
_PERMUTED = {"llama": re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")}
# Stored as weight + 1, since llama.cpp's norm multiplies by the weight itself.
_NORM_PLUS_ONE = frozenset(("gemma2", "gemma3"))


def hf_name(arch: str, name: str) -> str | None:
    """The Hugging Face name of a tensor, or None for one that is not known."""
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        part = LAYER_NAMES[arch].get(match[2])
        return f"model.layers.{match[1]}.{part}.{kind}" if part else None
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else None


def read_tensor(file: GgufFile, tensor: GgufTensor) -> FloatArray:
    """A tensor's values in row-major shape: float16 where it is stored so, else float32.

    Unquantised ones are views of the (copy-on-write mapped) file.
    """
    raw = file.raw(tensor)
    if tensor.type.name in ("F32", "F16"):
        dtype = np.dtype("<f4" if tensor.type.name == "F32" else "<f2")
        return raw.view(dtype).reshape(tensor.shape)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = raw.reshape(-1, tensor.shape[-1] // tensor.type.block_len * tensor.type.block_bytes)
    # Values of damaged blocks may overflow to infinity; that is not this function's to judge.
    with np.errstate(all="ignore"):
        values: FloatArray = dequantize(rows, GGMLQuantizationType[tensor.type.name])
    return values.reshape(tensor.shape)


def iter_tensors(file: GgufFile) -> Iterator[tuple[str, FloatArray]]:
    """Every weight, as Hugging Face names and lays it out.

    Raises as `iter_stored`.
    """
    for name, values in iter_stored(file, frozenset()):
        assert not isinstance(values, GgufBlocks)
        yield name, values


def iter_stored(
    file: GgufFile, kept: frozenset[str]
) -> Iterator[tuple[str, FloatArray | GgufBlocks]]:
    """`iter_tensors`, but matrices of the types in `kept` stay as they are stored.

    Raises:
        WeightsError: a tensor that has no place in this architecture, or does not fit its heads.
    """
    arch = file.string("general.architecture") or ""
    if arch not in LAYER_NAMES:
        raise CheckpointError(f"{file.path}: architecture {arch!r} is not supported.")
    for tensor in file.tensors.values():
        if tensor.name in _CONFIG_TENSORS:
            continue
        name = hf_name(arch, tensor.name)
        if name is None:
            raise WeightsError(
                f"{file.path}: tensor {tensor.name!r} is unexpected in architecture {arch!r}."
            )
        is_kept = tensor.type.name in kept and len(tensor.shape) == 2
        values: npt.NDArray[Any] = (
            file.raw(tensor).reshape(tensor.shape[0], -1) if is_kept else read_tensor(file, tensor)
        )
        if arch in _PERMUTED and (match := _PERMUTED[arch].fullmatch(tensor.name)):
            values = _halves(values, _num_heads(file, arch, match[1]), tensor.name)
        elif arch in _NORM_PLUS_ONE and name.endswith("norm.weight"):
            values = values - np.float32(1)
        if is_kept:
            yield name, GgufBlocks(tensor.type.name, (tensor.shape[0], tensor.shape[1]), values)
        else:
            yield name, values


def _num_heads(file: GgufFile, arch: str, kind: str) -> int:
    num_heads = file.integer(f"{arch}.attention.head_count", 0)
    if kind == "k":
        num_heads = file.integer(f"{arch}.attention.head_count_kv", num_heads)
    return num_heads or 0


def _halves(values: npt.NDArray[Any], num_heads: int, name: str) -> npt.NDArray[Any]:
    """Rows of each head from interleaved (x0 y0 x1 y1 …) to halves (x0 x1 … y0 y1 …)."""
    if num_heads < 1 or len(values) % (2 * num_heads):
        raise WeightsError(f"tensor {name!r} of shape {values.shape} does not fit its heads.")
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)

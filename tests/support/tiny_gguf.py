"""Small random .gguf files of every architecture and storage type."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize

from octavo.checkpoint.gguf_file import GGML_TYPES

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 512, 4, 2, 64, 2

# What llama.cpp calls the tensors of one layer: (name, rows, columns); columns 0: a vector.
_ATTENTION = [
    ("attn_norm", HIDDEN, 0),
    ("attn_q", HEADS * HEAD_DIM, HIDDEN),
    ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
    ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN),
    ("attn_output", HIDDEN, HEADS * HEAD_DIM),
    ("ffn_norm", HIDDEN, 0),
]
_MLP = [("ffn_gate", FFN, HIDDEN), ("ffn_up", FFN, HIDDEN), ("ffn_down", HIDDEN, FFN)]
_QK_NORM = [("attn_q_norm", HEAD_DIM, 0), ("attn_k_norm", HEAD_DIM, 0)]
_GEMMA = [("post_attention_norm", HIDDEN, 0), ("post_ffw_norm", HIDDEN, 0)]
LAYER_TENSORS = {
    "llama": _ATTENTION + _MLP,
    "qwen2": _ATTENTION + _MLP,
    "qwen3": _ATTENTION + _MLP + _QK_NORM,
    "gemma2": _ATTENTION + _MLP + _GEMMA,
    "gemma3": _ATTENTION + _MLP + _GEMMA + _QK_NORM,
    "phi3": [
        ("attn_norm", HIDDEN, 0),
        ("attn_qkv", (HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        ("attn_output", HIDDEN, HEADS * HEAD_DIM),
        ("ffn_norm", HIDDEN, 0),
        ("ffn_up", 2 * FFN, HIDDEN),
        ("ffn_down", HIDDEN, FFN),
    ],
}
_BIASES = {"qwen2": ("attn_q", "attn_k", "attn_v")}

BYTE_TOKENS = ["<|end|>", "<|user|>", "a", "b", "ab", "Ġ", "Ġab", "1", "2", "c", "d"]
BYTE_MERGES = ["a b", "Ġ ab"]


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    tied: bool = False,
    qtype: str = "F32",
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray] | None = None,
    vocabulary: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Write a model; gives the values as they were stored, by GGUF name, dequantised by `gguf`."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if vocabulary:
        write_byte_vocabulary(writer)
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32}
        add.get(type(value), writer.add_uint32)(key, value)
    tensors = dict(_tensors(arch, tied, qtype, seed))
    for name, array in (extra_tensors or {}).items():
        tensors[name] = (array.astype(np.float32), None, array.astype(np.float32))
    for name, (stored, kind, _) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: values.copy() for name, (_, _, values) in tensors.items()}


def write_byte_vocabulary(writer: gguf.GGUFWriter, pre: str = "smollm") -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(BYTE_TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(BYTE_TOKENS) - 2))
    writer.add_token_merges(BYTE_MERGES)
    writer.add_eos_token_id(0)


def _shapes(arch: str, tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd.weight", (len(BYTE_TOKENS), HIDDEN)),
        ("output_norm.weight", (HIDDEN,)),
    ]
    if not tied:
        shapes.append(("output.weight", (len(BYTE_TOKENS), HIDDEN)))
    for layer in range(LAYERS):
        for name, rows, columns in LAYER_TENSORS[arch]:
            shape = (rows, columns) if columns else (rows,)
            shapes.append((f"blk.{layer}.{name}.weight", shape))
            if name in _BIASES.get(arch, ()):
                shapes.append((f"blk.{layer}.{name}.bias", (rows,)))
    return shapes


Stored = tuple[np.ndarray, gguf.GGMLQuantizationType | None, np.ndarray]  # and what it stands for


@lru_cache(maxsize=8)  # drawn and quantised once for tests that follow each other
def _tensors(arch: str, tied: bool, qtype: str, seed: int) -> dict[str, Stored]:
    tensors = {}
    rng = np.random.default_rng(seed)
    for name, shape in _shapes(arch, tied):
        array = rng.standard_normal(shape, dtype=np.float32)
        tensors[name] = _stored(array, qtype if len(shape) == 2 else "F32", rng)
    return tensors


def _stored(array: np.ndarray, kind: str, rng: np.random.Generator) -> Stored:
    if kind in ("F32", "F16"):
        array = array.astype(np.float32 if kind == "F32" else np.float16)
        array.flags.writeable = False
        return array, None, array
    qtype = gguf.GGMLQuantizationType[kind]
    try:
        raw = quantize(array, qtype)
    except NotImplementedError:  # gguf cannot write K-quants: random blocks with sane scales
        raw = random_blocks(array.shape, kind, rng)
    values = gguf.quants.dequantize(raw, qtype)
    raw.flags.writeable = values.flags.writeable = False
    return raw, qtype, values


# Byte offsets of the float16 scales in a block.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def random_blocks(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    layout = next(t for t in GGML_TYPES.values() if t.name == kind)
    num_blocks = int(np.prod(shape)) // layout.block_len
    blocks = rng.integers(0, 256, (num_blocks, layout.block_bytes), dtype=np.uint8)
    for offset in _SCALES[kind]:
        scale = rng.random(num_blocks).astype(np.float16).view(np.uint8).reshape(-1, 2)
        blocks[:, offset : offset + 2] = scale
    return blocks.reshape(*shape[:-1], -1)

"""GGUF files: header, metadata as config and tokenizer, tensors.

Checked beside what `oracle` says: no tensor reaches beyond the file or overlaps another, each has
the values that its shape says, and a tokenizer that is made can be used.
"""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import torch

from fuzz import gguf_format as fmt
from fuzz import oracle
from fuzz.gguf_format import ARRAY, STRING, Tensor
from octavo.checkpoint.gguf_config import ARCHITECTURES
from octavo.checkpoint.gguf_file import GGML_TYPES, GgufFile
from octavo.checkpoint.source import open_gguf
from octavo.errors import OctavoError
from octavo.text.tokenizer import Tokenizer
from octavo.weights.blocks import Blocks
from octavo.weights.gguf import iter_gguf

INSTRUMENTED = ("octavo.checkpoint", "octavo.weights", "octavo.text")
MAX_LEN = 32 << 10

_WIDTH = 32
_U32, _F32, _BOOL, _I32 = 4, 6, 7, 5
_PATH = oracle.scratch_folder() / "fuzz.gguf"


def check(data: bytes) -> None:
    _PATH.write_bytes(data)
    file = None
    with oracle.judged(len(data)):
        file = GgufFile.open(_PATH)
        _check_places(file, len(data))
    if file is None:
        return
    with oracle.judged(len(data)):
        for _, tensor in iter_gguf(_PATH):
            values = tensor.dequantize() if isinstance(tensor, Blocks) else tensor
            oracle.expect(tuple(values.shape) == tuple(tensor.shape), "values of another shape")
            values.to(torch.float32, copy=True)
    with oracle.judged(len(data)):
        checkpoint = open_gguf("fuzz", _PATH)
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        if tokenizer is not None:
            tokenizer.decode(tokenizer.encode("a b\u00e9 12<|end|>"))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """See `gguf_format.mutate`."""
    return fmt.mutate(data, rng, _KEYS)


def _check_places(file: GgufFile, num_bytes: int) -> None:
    tensors = sorted(file.tensors.values(), key=lambda tensor: tensor.offset)
    for tensor in tensors:
        oracle.expect(24 <= tensor.offset <= num_bytes - tensor.num_bytes, "a tensor out of bounds")
        num_values = 1
        for size in tensor.shape:
            num_values *= size
        stored = tensor.num_bytes * tensor.type.block_len
        oracle.expect(stored == num_values * tensor.type.block_bytes, "a tensor of another size")
        oracle.expect(len(file.raw(tensor)) == tensor.num_bytes, "a short read")
    for before, after in pairwise(tensors):
        oracle.expect(before.offset + before.num_bytes <= after.offset, "tensors overlap")


def seeds() -> list[bytes]:
    """Every architecture, storage type and kind of vocabulary, a few kB each."""
    made = [
        _model(arch, type_id, vocabulary)
        for index, arch in enumerate(ARCHITECTURES)
        for type_id, vocabulary in ((0, "gpt2"), ([1, 2, 3, 6, 7, 8][index % 6], "llama"))
    ]
    made += [_model("llama", type_id, None, width=256) for type_id in (12, 13, 14, 30)]
    return [*made, _model("llama", 0, None, rope="rope_freqs.weight"), _model("phi3", 0, None)]


def _model(
    arch: str, type_id: int, vocabulary: str | None, *, width: int = _WIDTH, rope: str = ""
) -> bytes:
    numbers = {
        "context_length": 64,
        "embedding_length": width,
        "block_count": 1,
        "feed_forward_length": width,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 16,
        "rope.scaling.original_context_length": 32,
    }
    metadata = {"general.architecture": (STRING, arch), "general.alignment": (_U32, 32)}
    metadata |= {f"{arch}.{key}": (_U32, number) for key, number in numbers.items()}
    metadata |= {
        f"{arch}.attention.layer_norm_rms_epsilon": (_F32, 1e-5),
        f"{arch}.rope.freq_base": (_F32, 1e4),
        f"{arch}.rope.scaling.type": (STRING, "yarn" if arch == "qwen2" else "none"),
        f"{arch}.rope.scaling.factor": (_F32, 2.0 if arch == "qwen3" else 1.0),
    }
    metadata |= _VOCABULARIES[vocabulary] if vocabulary else {}
    names = ["token_embd", "output_norm", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_output"]
    tensors = [_tensor(f"{name}.weight", type_id, width, "norm" in name) for name in names]
    factors = ["rope_factors_long.weight", "rope_factors_short.weight"] if arch == "phi3" else []
    factors += [rope] if rope else []
    stretch = np.linspace(1, 4, 8, dtype="<f4").tobytes()
    tensors += [Tensor(name, (8,), 0, stretch) for name in factors]
    return fmt.write(metadata, tensors)


def _tensor(name: str, type_id: int, width: int, is_vector: bool) -> Tensor:
    if is_vector:
        return Tensor(name, (width,), 0, np.ones(width, "<f4").tobytes())
    kind = GGML_TYPES[type_id]
    num_bytes = 4 * width // kind.block_len * kind.block_bytes
    return Tensor(name, (width, 4), type_id, random.Random(name).randbytes(num_bytes))


_TOKENS = ["<|end|>", "<s>", "a", "b", "ab", "\u0120", "\u0120ab", "1", "2", "<0x41>", "\u2581a"]
_COMMON = {
    "tokenizer.ggml.tokens": (ARRAY, (STRING, _TOKENS)),
    "tokenizer.ggml.token_type": (ARRAY, (_I32, [3, 2, 1, 1, 1, 1, 1, 4, 1, 6, 1])),
    "tokenizer.ggml.bos_token_id": (_U32, 1),
    "tokenizer.ggml.eos_token_id": (_U32, 0),
    "tokenizer.ggml.add_bos_token": (_BOOL, True),
    "tokenizer.ggml.add_space_prefix": (_BOOL, True),
    "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
}
_VOCABULARIES = {
    "gpt2": {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b", "\u0120 ab"])),
        **_COMMON,
    },
    "llama": {
        "tokenizer.ggml.model": (STRING, "llama"),
        "tokenizer.ggml.scores": (ARRAY, (_F32, [float(-i) for i in range(len(_TOKENS))])),
        **_COMMON,
    },
}


def check_seeds() -> None:
    """Seeds are files that pass: else the fuzzing would not get past the first check."""
    for data in seeds():
        _PATH.write_bytes(data)
        try:
            open_gguf("fuzz", _PATH)
        except OctavoError as error:
            raise oracle.ViolationError(f"a seed is refused: {error}") from error


_KEYS = (*_VOCABULARIES["gpt2"], *_VOCABULARIES["llama"], "split.count", "general.alignment")
_KEYS += tuple(
    f"{arch}.{key}"
    for arch in ARCHITECTURES
    for key in (
        *(
            "context_length",
            "block_count",
            "expert_count",
            "attention.head_count",
            "embedding_length",
        ),
        *("attention.head_count_kv", "attention.key_length", "attention.sliding_window"),
        *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
        *("rope.dimension_count", "rope.scaling.attn_factor", "final_logit_softcapping"),
        *("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"),
    )
)

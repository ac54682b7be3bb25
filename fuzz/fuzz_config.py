"""A model folder: config.json and its like, the safetensors index, tokenizer files, chat template,
as far as they are read before any weight is; and what `resolve` makes of them.

Checked beside what `oracle` says: no weight file outside the folder is named, the model of a config
that passes can be described, and a tokenizer and template that are made can be used.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping

import torch
from support.tiny_tokenizers import byte_level_json, sentencepiece_json

from fuzz import oracle
from fuzz.mutators import mutate_bytes, mutate_json
from octavo.checkpoint.folder import open_folder
from octavo.config import EngineArgs, resolve
from octavo.config.sections import DeviceInfo
from octavo.errors import OctavoError
from octavo.models.registry import REGISTRY, create_model
from octavo.server.state import sampling_defaults
from octavo.text.chat_template import ChatTemplate
from octavo.text.tokenizer import Tokenizer

INSTRUMENTED = ("octavo.checkpoint", "octavo.config", "octavo.models", "octavo.layers")
MAX_LEN = 64 << 10

_FOLDER = oracle.scratch_folder()
_MARK = b"\n=== "
_INDEX = "model.safetensors.index.json"
_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", _INDEX),
    *("chat_template.json", "chat_template.jinja"),
)
for _name in ("model.safetensors", "model-1.safetensors"):
    (_FOLDER / _name).touch()
    os.truncate(_FOLDER / _name, 1 << 26)  # what is in them is `fuzz_safetensors`' business
_DEVICE = DeviceInfo(
    kind="cpu",
    name="a CPU",
    total_memory_bytes=1 << 34,
    free_memory_bytes=1 << 33,
    num_cores=2,
    default_dtype="float32",
    dtypes=("float32", "bfloat16"),
    attention_backends=("torch",),
)
_MOST_WEIGHTS = 1 << 24  # models larger than this are described, but not made


def check(data: bytes) -> None:
    _lay_out(data)
    checkpoint = None
    with oracle.judged(len(data)):
        checkpoint = open_folder("fuzz", _FOLDER, needs_weights=True)
        for path in checkpoint.weight_files:
            oracle.expect(path.parent == _FOLDER and path.is_file(), f"{path} is no shard")
    if checkpoint is None:
        return
    with oracle.judged(len(data)):
        if (tokenizer := Tokenizer.from_checkpoint(checkpoint)) is not None:
            ids = tokenizer.encode("hello the\u00e9 <s>")
            tokenizer.decode(ids)
            oracle.expect(all(0 <= i < tokenizer.vocab_size for i in ids), "an id out of bounds")
            for token_id in ids:
                tokenizer.token_bytes(token_id)
    with oracle.judged(len(data)):
        ChatTemplate.from_checkpoint(checkpoint)
    with oracle.judged(len(data)):
        sampling_defaults(checkpoint.generation_config)
        config = resolve(EngineArgs(load_format="dummy", max_model_len=16), checkpoint, _DEVICE)
        if _num_weights(config.model.hf_config) <= _MOST_WEIGHTS:
            with torch.device("meta"):
                create_model(config.model.hf_config, 16)


def _num_weights(config: Mapping[str, object]) -> int:
    """Roughly; 0 where a number is none, which the model has to notice itself."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    found = [config.get(name) for name in names]
    vocab, hidden, inner, layers = (x if isinstance(x, int) else 0 for x in found)
    return abs(hidden * vocab) + abs(layers) * (abs(hidden * (hidden + inner)) + 100_000)


def _lay_out(data: bytes) -> None:
    """The parts of the input as files of the folder."""
    for name in _FILES:
        (_FOLDER / name).unlink(missing_ok=True)
    for part in data.split(_MARK)[1:]:
        name, _, content = part.partition(b"\n")
        if name.decode("latin-1") in _FILES:
            (_FOLDER / name.decode()).write_bytes(content)


def _joined(files: Mapping[str, str | bytes]) -> bytes:
    parts = (
        (name, text.encode() if isinstance(text, str) else text) for name, text in files.items()
    )
    return b"".join(_MARK + name.encode() + b"\n" + raw for name, raw in parts)


def seeds() -> list[bytes]:
    """A folder for each architecture and RoPE scaling, with both kinds of tokenizer."""
    made = []
    for index, arch in enumerate(REGISTRY):
        files: dict[str, str | bytes] = {
            "config.json": json.dumps(_config(arch, index)),
            "generation_config.json": json.dumps({"eos_token_id": [2, 3], "top_p": 0.9}),
            "tokenizer_config.json": json.dumps(
                {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": True}
                | {"chat_template": [{"name": "default", "template": "{{ messages }}"}]}
            ),
            "tokenizer.json": _small(byte_level_json() if index % 2 else sentencepiece_json()),
        }
        if index % 3 == 0:
            files[_INDEX] = json.dumps({"weight_map": {"a": "model.safetensors"}})
        if index % 3 == 1:
            files["chat_template.json"] = json.dumps({"chat_template": "{{ messages[0].role }}"})
        made.append(_joined(files))
    return made


def _small(tokenizer_json: str) -> str:
    """Without most of its merges: what is left is quick to change and to read."""
    tokenizer = json.loads(tokenizer_json)
    model = tokenizer["model"]
    model["merges"] = model["merges"][:20]
    return json.dumps(tokenizer)


_ROPES = (
    None,
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
)


def _config(arch: str, index: int) -> dict[str, object]:
    config: dict[str, object] = {
        **{"architectures": [arch], "model_type": "x", "vocab_size": 300, "hidden_size": 32},
        **{"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128},
        **{"rms_norm_eps": 1e-5, "hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
        **{"rope_theta": 10000.0, "rope_scaling": _ROPES[index % len(_ROPES)]},
        **{"sliding_window": 16, "layer_types": ["full_attention"] * 2, "eos_token_id": 2},
        **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "query_pre_attn_scalar": 8},
        **{"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4},
        **{"moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1},
        **{"mlp_only_layers": [], "original_max_position_embeddings": 32},
        **{"rope_local_base_freq": 1e4, "final_logit_softcapping": 30.0},
    }
    return {"text_config": config, "architectures": ["Outer"]} if index % 4 == 3 else config


_WORDS = (
    *("architectures", "text_config", "rope_scaling", "rope_parameters", "quantization_config"),
    *("eos_token_id", "bos_token_id", "model_type", "weight_map", "layer_types", "hidden_act"),
    *("gemma3_text", "qwen2", "yarn", "full_attention", "sliding_attention", "chat_template"),
    *("../model.safetensors", "/etc/hosts", "x" * 300 + ".safetensors", "model-1.safetensors"),
    *("type", "Sequence", "ByteLevel", "BPE", "WordPiece", "Unigram", "content", "template", "[a-"),
)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Change one of the files; now and then leave one out."""
    if rng.random() < 0.02:
        return mutate_bytes(data, rng)
    parts = [part.partition(b"\n") for part in data.split(_MARK)[1:]]
    files = {name.decode("latin-1"): content for name, _, content in parts}
    if not files:
        return data + _MARK + b"config.json\n{}"
    # Most of an input is its tokenizer: choose a file, not a byte.
    name = rng.choice(list(files))
    if rng.random() < 0.03:
        del files[name]
    elif name.endswith(".json"):
        files[name] = mutate_json(files[name], rng, _WORDS)
    else:
        files[name] = mutate_bytes(files[name], rng)
    return _joined(files)


def check_seeds() -> None:
    for data in seeds():
        _lay_out(data)
        try:
            open_folder("fuzz", _FOLDER, needs_weights=True)
        except OctavoError as error:
            raise oracle.ViolationError(f"a seed is refused: {error}") from error

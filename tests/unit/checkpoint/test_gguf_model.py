"""Configuration and tensor names of .gguf files, compared with transformers' own models."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from support.tiny_gguf import HEAD_DIM, HEADS, KV_HEADS, LAYER_TENSORS, write_gguf
from transformers import AutoConfig, AutoModelForCausalLM

from octavo.checkpoint.gguf_config import hf_config, hf_generation_config
from octavo.checkpoint.gguf_file import GgufFile
from octavo.checkpoint.gguf_tensors import hf_name, iter_tensors
from octavo.errors import CheckpointError, UnsupportedModelError, WeightsError

WINDOWS = {arch: {f"{arch}.attention.sliding_window": 32} for arch in ("gemma2", "gemma3")}


def config_of(tmp_path, arch="llama", **options):
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, **options)
    return hf_config(GgufFile.open(path))


@pytest.mark.parametrize("arch", LAYER_TENSORS)
def test_names_and_shapes_are_those_of_transformers(tmp_path, arch):
    path = tmp_path / "m.gguf"
    write_gguf(path, arch, extra=WINDOWS.get(arch), tied=arch.startswith("gemma"))
    file = GgufFile.open(path)
    config = hf_config(file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"]).from_dict(config)
        )
    assert type(model).__name__ == config["architectures"][0]
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {name: values.shape for name, values in iter_tensors(file)} == expected


def test_llama_config(tmp_path):
    config = config_of(tmp_path, extra={"llama.rope.dimension_count": HEAD_DIM})
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    assert (config["head_dim"], config["rms_norm_eps"]) == (HEAD_DIM, 1e-5)
    assert config["tie_word_embeddings"] is False
    assert config["rope_scaling"] is None
    assert config["eos_token_id"] == 0
    assert config_of(tmp_path, tied=True)["tie_word_embeddings"] is True


def test_gemma_config(tmp_path):
    extra = {
        "gemma2.attention.sliding_window": 32,
        "gemma2.attn_logit_softcapping": 40.0,
        "gemma2.final_logit_softcapping": 20.0,
    }
    config = config_of(tmp_path, "gemma2", tied=True, extra=extra)
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (40.0, 20.0)
    assert config["query_pre_attn_scalar"] == HEAD_DIM
    assert config["sliding_window"] == 32


def test_phi3_config(tmp_path):
    config = config_of(
        tmp_path,
        "phi3",
        extra={
            "phi3.rope.dimension_count": HEAD_DIM // 2,
            "phi3.rope.scaling.original_context_length": 64,
            "phi3.rope.scaling.attn_factor": 1.25,
        },
        extra_tensors={
            "rope_factors_long.weight": np.full(16, 2.0, np.float32),
            "rope_factors_short.weight": np.ones(16, np.float32),
        },
    )
    assert config["partial_rotary_factor"] == 0.5
    assert config["original_max_position_embeddings"] == 64
    assert config["rope_scaling"] == {
        "rope_type": "longrope",
        "long_factor": [2.0] * 16,
        "short_factor": [1.0] * 16,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    }


def test_rope_scaling(tmp_path):
    prefix = "llama.rope.scaling"
    linear = config_of(tmp_path, extra={f"{prefix}.type": "linear", f"{prefix}.factor": 4.0})
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    extra = {
        f"{prefix}.type": "yarn",
        f"{prefix}.factor": 8.0,
        f"{prefix}.original_context_length": 16,
    }
    assert config_of(tmp_path, extra=extra)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 16,
    }
    with pytest.raises(UnsupportedModelError, match="mystery"):
        config_of(tmp_path, extra={f"{prefix}.type": "mystery"})


def _llama3_divisors(factor: float, original: int) -> np.ndarray:
    """As llama.cpp's conversion writes them: by wavelength."""
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 10000 ** (2 * i / HEAD_DIM)
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < original / 4.0:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama3_scaling_is_recovered(tmp_path):
    tensors = {"rope_freqs.weight": _llama3_divisors(32.0, 8192)}
    assert config_of(tmp_path, extra_tensors=tensors)["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    odd = np.linspace(1, 3, HEAD_DIM // 2, dtype=np.float32)
    scaling = config_of(tmp_path, extra_tensors={"rope_freqs.weight": odd})["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["long_factor"] == scaling["short_factor"] == pytest.approx(odd.tolist())


def test_generation_config(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"tokenizer.ggml.eot_token_id": 1, "tokenizer.ggml.bos_token_id": 2})
    config = hf_generation_config(GgufFile.open(path))
    assert config == {"eos_token_id": [0, 1], "bos_token_id": 2}


def test_llama_heads_are_unpermuted(tmp_path):
    """llama.cpp's own permutation, undone."""
    path = tmp_path / "m.gguf"
    stored = write_gguf(path)
    tensors = dict(iter_tensors(GgufFile.open(path)))
    for kind, heads in (("q", HEADS), ("k", KV_HEADS)):
        ours = tensors[f"model.layers.1.self_attn.{kind}_proj.weight"]
        permuted = ours.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(ours.shape)
        np.testing.assert_array_equal(permuted, stored[f"blk.1.attn_{kind}.weight"])
    np.testing.assert_array_equal(
        tensors["model.layers.1.self_attn.v_proj.weight"], stored["blk.1.attn_v.weight"]
    )


def test_gemma_norms_lose_their_one(tmp_path):
    path = tmp_path / "m.gguf"
    stored = write_gguf(path, "gemma3", tied=True)
    tensors = dict(iter_tensors(GgufFile.open(path)))
    for ours, theirs in (
        ("model.norm", "output_norm"),
        ("model.layers.0.self_attn.q_norm", "blk.0.attn_q_norm"),
        ("model.layers.0.post_feedforward_layernorm", "blk.0.post_ffw_norm"),
    ):
        np.testing.assert_array_equal(tensors[f"{ours}.weight"], stored[f"{theirs}.weight"] - 1)


def test_foreign_tensors_and_architectures(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, extra_tensors={"blk.0.mystery.weight": np.ones(4, np.float32)})
    with pytest.raises(WeightsError, match=r"blk\.0\.mystery"):
        list(iter_tensors(GgufFile.open(path)))
    assert hf_name("llama", "blk.0.attn_q") is None
    with pytest.raises(UnsupportedModelError, match="mixture"):
        config_of(tmp_path, extra={"llama.expert_count": 8})
    writer = gguf.GGUFWriter(path, "rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="rwkv"):
        hf_config(GgufFile.open(path))


def test_implausible_layer_count(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, "gemma2", tied=True)
    content = path.read_bytes()
    key = content.index(b"gemma2.block_count") + len(b"gemma2.block_count") + 4
    path.write_bytes(content[:key] + b"\xff" * 4 + content[key + 4 :])
    with pytest.raises(CheckpointError, match="4294967295 layers"):
        hf_config(GgufFile.open(path))


def test_missing_keys_are_named(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llama\.context_length"):
        hf_config(GgufFile.open(path))

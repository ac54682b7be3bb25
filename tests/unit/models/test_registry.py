"""Choosing a model by its config, and what is refused."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
import torch
from support.small_engines import FAMILIES, QWEN3

from octavo.errors import CheckpointError, UnsupportedModelError
from octavo.models import REGISTRY, CausalLM, create_model

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


def config(architecture="LlamaForCausalLM", **changes):
    return {**SIZES, "architectures": [architecture], **changes}


@pytest.mark.parametrize("architecture", REGISTRY)
def test_every_entry_builds_a_model(architecture):
    model = create_model(config(architecture), 64)
    assert isinstance(model, CausalLM)
    assert len(model.attention_specs) == 2
    assert all(slot.shape for slot in model.weight_slots().values())


def test_every_architecture_is_tried_on_a_gpu():
    assert {name for case in FAMILIES.values() for name in case.get("architectures", ())} | set(
        QWEN3["architectures"]
    ) == set(REGISTRY)


@pytest.mark.slow
def test_registry_imports_nothing_early():
    code = "import sys, octavo.models; print([m for m in sys.modules if 'models.llama' in m])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_parameters_are_on_the_default_device_in_the_default_dtype():
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            model = create_model(config(), 64)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}


def test_sliding_layers_follow_layer_types_or_the_pattern():
    def windows(**changes):
        return [s.sliding_window for s in create_model(config(**changes), 64).attention_specs]

    gemma = {"architecture": "Gemma2ForCausalLM", "sliding_window": 8, "num_hidden_layers": 3}
    assert windows(**gemma) == [8, None, 8]
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(**gemma, layer_types=kinds) == [None, 8, None]
    assert windows(architecture="MistralForCausalLM", sliding_window=None) == [None, None]
    assert windows(architecture="MistralForCausalLM", sliding_window=9) == [9, 9]


def test_a_tied_head_may_be_stored_twice():
    model = create_model(config(tie_word_embeddings=True), 64)
    for name in ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"):
        assert any(re.fullmatch(pattern, name) for pattern in model.ignored_weights)
        assert name not in model.weight_slots()
    untied = create_model(config(tie_word_embeddings=False), 64)
    assert "lm_head.weight" in untied.weight_slots()
    assert not any(re.fullmatch(p, "lm_head.weight") for p in untied.ignored_weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "MambaForCausalLM"}, "MambaForCausalLM is not implemented.*Llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"hidden_act": "xielu"}, "'xielu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "spiral"}}, "'spiral'"),
        ({"architecture": "MistralForCausalLM", "attention_bias": True}, "attention_bias"),
        (
            {"architecture": "Qwen2ForCausalLM", "layer_types": ["chunked_attention"] * 2},
            "chunked_attention",
        ),
        (
            {"architecture": "Qwen2ForCausalLM", "layer_types": ["sliding_attention"] * 2},
            "sliding_window is None",
        ),
        (
            {"architecture": "Gemma3ForCausalLM", "use_bidirectional_attention": True},
            "use_bidirectional_attention",
        ),
        ({"architecture": "Gemma3ForCausalLM", "attn_logit_softcapping": 50.0}, "softcapping"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_named(changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        create_model(config(**changes), 64)


def test_a_missing_value_is_named():
    incomplete = config()
    del incomplete["intermediate_size"]
    with pytest.raises(CheckpointError, match="'intermediate_size'"):
        create_model(incomplete, 64)


def test_registry_names_classes_that_exist():
    for target in REGISTRY.values():
        module, _, name = target.partition(":")
        assert issubclass(getattr(importlib.import_module(module), name), CausalLM)

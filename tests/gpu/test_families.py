"""Every architecture on a GPU, with its kernels and graphs, against the CPU in plain torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.small_engines import QWEN3, prompt_logprobs, requests, run, write_model

from octavo.types import SamplingParams

pytestmark = pytest.mark.gpu

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 384,
        "num_attention_heads": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 128},
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 100,
    },
    "qwen2": {  # seven query heads share one of keys
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 448,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "qwen3-wide": {"num_attention_heads": 4, "head_dim": 128},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 64,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 64,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "phi3": {  # heads of 96, three quarters of which are rotated
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 768,
        "num_key_value_heads": 8,
        "head_dim": 96,
        "partial_rotary_factor": 0.75,
        "sliding_window": 100,
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("family") / "model", QWEN3 | FAMILIES[request.param])


def test_greedy_tokens_are_those_of_the_cpu(model: Path) -> None:
    """In float32, where a choice between near equals is rare."""
    work = requests(24, seed=8, plain=True)
    on_cpu = run(model, work, load_format="auto", device="cpu", attention_backend="torch")
    for options in ({}, {"enforce_eager": True}, {"attention_backend": "torch"}):
        on_gpu = run(model, work, load_format="auto", device="cuda", **options)
        equal = [on_cpu[i] == on_gpu[i] for i in on_cpu]
        assert sum(equal) >= len(equal) - 1, f"{options}: {sum(equal)} of {len(equal)}"


def test_half_precision_is_near_the_cpu(model: Path) -> None:
    ask = SamplingParams(max_tokens=None, temperature=0, prompt_logprobs=0)
    work = [
        dataclasses.replace(request, params=ask, max_total_len=len(request.prompt_token_ids) + 5)
        for request in requests(12, seed=9, plain=True)
    ]
    on_cpu = prompt_logprobs(model, work, dtype="float32", device="cpu", attention_backend="torch")
    for dtype, most in (("bfloat16", 0.03), ("float16", 0.004)):
        on_gpu = prompt_logprobs(model, work, dtype=dtype, device="cuda")
        mean = (on_cpu - on_gpu).abs().mean() / on_cpu.std()
        print(f"{dtype}: {mean:.1e} of the spread {on_cpu.std():.2f}")
        assert mean < most

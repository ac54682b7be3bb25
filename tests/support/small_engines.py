"""Small random models in folders, requests, and engines in this process that run them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from octavo.checkpoint import locate
from octavo.config import EngineArgs
from octavo.engine.build import build_core
from octavo.types import EngineRequest, SamplingParams

VOCAB = 1000
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# One of each architecture, on top of QWEN3, with what sets it apart.
FAMILIES: dict[str, dict[str, Any]] = {
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
        "query_pre_attn_scalar": 4,  # scores are so large that the cap is felt
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


def write_model(folder: Path, hf_config: Mapping[str, Any], *, spread: float = 0.05) -> Path:
    """A folder with weights in a file: each device would draw its own by its own generator."""
    from safetensors.torch import save_file

    from octavo.models import create_model

    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, slot in create_model(hf_config, 2048).weight_slots().items():
        weight = torch.empty(slot.shape).uniform_(-spread, spread, generator=generator)
        centre = float("norm" in name and "gemma" not in hf_config["model_type"])
        state[name] = centre + weight
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config))
    return folder


def requests(count: int, seed: int, *, plain: bool) -> list[EngineRequest]:
    """Prompts of up to 350 tokens, some with a beginning in common. `plain`: all greedy."""
    rng = random.Random(seed)
    head = [rng.randrange(3, VOCAB) for _ in range(200)]
    made = []
    for i in range(count):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randrange(1, 150))]
        prompt = tuple(head[: rng.choice([0, 0, 64, 130, 200])] + own)
        params = SamplingParams(max_tokens=None, temperature=0)
        if not plain:
            params = SamplingParams(
                max_tokens=None,
                temperature=rng.choice([0, 0.7, 1.2]),
                top_k=rng.choice([0, 30]),
                top_p=rng.choice([1.0, 0.9]),
                min_p=rng.choice([0.0, 0.05]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                logprobs=rng.choice([None, 2]),
            )
        made.append(
            EngineRequest(
                request_id=i + 1,
                prompt_token_ids=prompt,
                params=params,
                max_total_len=len(prompt) + rng.randrange(1, 80),
                stop_token_ids=(2,),
                seed=i,
            )
        )
    return made


def asking(work: Sequence[EngineRequest]) -> list[EngineRequest]:
    """The same prompts, asking for their tokens' log-probabilities and five tokens more."""
    params = SamplingParams(max_tokens=None, temperature=0, prompt_logprobs=0)
    return [
        dataclasses.replace(request, params=params, max_total_len=len(request.prompt_token_ids) + 5)
        for request in work
    ]


def run(folder: Path, work: Sequence[EngineRequest], **options: object) -> dict[int, list[int]]:
    """The tokens of each request, from an engine of its own."""
    settings: dict[str, object] = {
        "dtype": "float32",
        "load_format": "dummy",
        "max_num_batched_tokens": 256,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1 << 28,
    }
    args = EngineArgs.from_options(model=str(folder), **settings | options)
    core = build_core(args, locate(args.model, load_format=args.load_format))
    tokens: dict[int, list[int]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        if (outputs := core.step()) is not None:
            for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
                tokens[request_id].append(token)
    core.check_integrity()
    core.close()
    return tokens


def prompt_logprobs(folder: Path, work: Sequence[EngineRequest], **options: object) -> torch.Tensor:
    """Of every prompt token, request by request; the requests must ask for them."""
    settings: dict[str, object] = {"max_num_seqs": 16, "max_num_batched_tokens": 256}
    args = EngineArgs.from_options(model=str(folder), **settings | options)
    core = build_core(args, locate(str(folder)))
    found: dict[int, list[float]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        if (outputs := core.step()) is not None:
            for request_id, positions in outputs.prompt_logprobs.items():
                found[request_id] += [position.logprobs[0] for position in positions]
    core.close()
    return torch.tensor([value for values in found.values() for value in values])

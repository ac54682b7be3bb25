"""Small random models in folders, requests, and engines in this process that run them."""

from __future__ import annotations

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
    args = EngineArgs.from_options(
        model=str(folder), max_num_seqs=16, max_num_batched_tokens=256, **options
    )
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

"""Every architecture and every rotary scaling against transformers: the same weights, float32,
eager attention; ours through a paged cache with shuffled blocks, whole, in chunks, token by token
and two sequences at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from support.tiny_models import SIZES, PagedRun, Reference, load

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"rope_type": "llama3", "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
LONG |= {"rope_type": "longrope"}


@dataclass(frozen=True)
class Case:
    family: str  # of transformers' config class
    config: dict[str, Any] = field(default_factory=dict)
    max_model_len: int = 64
    prompt_len: int = 41


CASES = {
    "llama": Case("Llama"),
    "llama-tied-biased": Case(
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    ),
    "llama-mha-gelu": Case("Llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
    "llama-linear": Case("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic-within": Case("Llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    # Beyond the trained length transformers rescales to the length of the sequence.
    "llama-dynamic-beyond": Case(
        "Llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32},
        prompt_len=64,
    ),
    "llama3": Case("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "mistral": Case("Mistral", {"sliding_window": None}),
    "mistral-window": Case("Mistral", {"sliding_window": 8}),
    "qwen2": Case("Qwen2"),
    "qwen2-window": Case(
        "Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen2-yarn": Case("Qwen2", {"rope_scaling": YARN}),
    "qwen2-yarn-mscale": Case(
        "Qwen2", {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}
    ),
    "qwen2-yarn-tuned": Case(
        "Qwen2",
        {
            "rope_scaling": {
                **YARN,
                "attention_factor": 1.3,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            }
        },
    ),
    "qwen3": Case("Qwen3", {"head_dim": 32}),
    "qwen3-biased-window": Case(
        "Qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": Case(
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [1]},
    ),
    "qwen3-moe-sparse": Case(
        "Qwen3Moe",
        {"head_dim": 16, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"norm_topk_prob": False, "decoder_sparse_step": 2},
    ),
    "mixtral": Case("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Case(
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": Case(
        "Gemma3Text",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}
        | {"num_hidden_layers": 4, "sliding_window_pattern": 3},
    ),
    "gemma3-scaled": Case(
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2}
        | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "phi3": Case("Phi3"),
    "phi3-window-partial": Case("Phi3", {"sliding_window": 8, "partial_rotary_factor": 0.5}),
    "phi3-longrope-short": Case(
        "Phi3",
        {"original_max_position_embeddings": 64, "rope_scaling": LONG},
    ),
    "phi3-longrope-long": Case(
        "Phi3",
        {"original_max_position_embeddings": 32, "rope_scaling": LONG},
        max_model_len=100,
    ),
    "phi3-longrope-factor": Case(
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_scaling": {**LONG, "attention_factor": 1.2},
        },
    ),
}


def make_config(case: Case) -> transformers.PreTrainedConfig:
    return getattr(transformers, f"{case.family}Config")(**SIZES | case.config)


def prompts(case: Case) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    shape = (2, case.prompt_len)
    return torch.randint(3, SIZES["vocab_size"], shape, generator=generator).tolist()


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_logits_agree_with_transformers(case):
    reference = Reference(make_config(case))
    model = load(reference.hf_config(), reference.checkpoint, case.max_model_len)
    sequences = prompts(case)
    expected = [reference.logits(sequence) for sequence in sequences]
    assert expected[0].std() > 0.1  # not all alike

    whole = PagedRun(model, sequences)
    whole.step((0, case.prompt_len))
    assert_close(whole.result(0), expected[0])

    chunked = PagedRun(model, sequences, seed=1)
    for chunk_len in (7, 1, 13, 3, case.prompt_len - 24):
        chunked.step((0, chunk_len))
    assert_close(chunked.result(0), expected[0])

    stepwise = PagedRun(model, sequences, seed=2)
    stepwise.step((0, 3))
    for _ in range(case.prompt_len - 3):
        stepwise.step((0, 1))
    assert_close(stepwise.result(0), expected[0])

    together = PagedRun(model, sequences, seed=3)
    together.step((0, case.prompt_len - 4))
    for chunk_len in (5, 11, 6, case.prompt_len - 22):
        together.step((0, 1), (1, chunk_len))
    assert_close(together.result(0), expected[0])
    assert_close(together.result(1), expected[1])

    ends = PagedRun(model, sequences, seed=4)
    assert_close(ends.ends((0, case.prompt_len - 4)), expected[0][case.prompt_len - 5][None])
    got = ends.ends((0, 1), (1, 11))
    assert_close(got, torch.stack([expected[0][case.prompt_len - 4], expected[1][10]]))
    ends.step((0, 1), (1, 6))  # the last layer's keys and values are there
    assert_close(ends.result(0), expected[0][case.prompt_len - 3][None])
    assert_close(ends.result(1), expected[1][11:17])


def old_style(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: no rope_parameters, no layer_types."""
    params = dict(config.pop("rope_parameters"))
    config.pop("layer_types", None)
    if "full_attention" in params:
        config["rope_local_base_freq"] = params["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
        params = dict(params["full_attention"])
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in params:
            config[name] = params.pop(name)
    params["type"] = params.pop("rope_type")
    return config | {"rope_scaling": None if params["type"] == "default" else params}


@pytest.mark.parametrize("name", CASES)
def test_old_style_configs_mean_the_same(name):
    case = CASES[name]
    reference = Reference(make_config(case))
    config = old_style(reference.hf_config())
    if name == "qwen2-window":
        config["max_window_layers"] = 1
    new = load(reference.hf_config(), reference.checkpoint, case.max_model_len)
    old = load(config, reference.checkpoint, case.max_model_len)
    assert old.attention_specs == new.attention_specs
    sequences = prompts(case)
    runs = [PagedRun(model, sequences) for model in (new, old)]
    for run in runs:
        run.step((0, case.prompt_len))
    assert torch.equal(runs[0].result(0), runs[1].result(0))


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_bfloat16_rounds_where_transformers_rounds(name):
    """Not bit for bit (attention sums in another order), but no further off than rounding is."""
    case = CASES[name]
    exact = Reference(make_config(case))
    sequence = prompts(case)[0]
    expected = exact.logits(sequence)
    rounded = Reference(make_config(case))
    rounded.model.bfloat16()
    error = (rounded.logits(sequence).float() - expected).square().mean().sqrt()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = load(exact.hf_config(), exact.checkpoint, case.max_model_len)
    finally:
        torch.set_default_dtype(torch.float32)
    run = PagedRun(model, [sequence])
    run.step((0, case.prompt_len))
    ours = (run.result(0) - expected).square().mean().sqrt()
    assert ours < 1.3 * error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_gpu_computes_the_same(case):
    reference = Reference(make_config(case))
    with torch.device("cuda"):
        model = load(reference.hf_config(), reference.checkpoint, case.max_model_len)
    sequences = prompts(case)
    run = PagedRun(model, sequences)
    run.step((0, case.prompt_len - 4))
    for chunk_len in (5, 11, 6, case.prompt_len - 22):
        run.step((0, 1), (1, chunk_len))
    for i, sequence in enumerate(sequences):
        assert_close(run.result(i).cpu(), reference.logits(sequence))

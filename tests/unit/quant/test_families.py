"""Every kind of layer stack in 8 bits, against float32: the logits stay close."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.tiny_models import SIZES, PagedRun, Reference

from octavo.attention import get_backend
from octavo.kernels.cpu import library, ops
from octavo.layers.moe import MoE
from octavo.models import create_model
from octavo.quant import quantize, stack_layers
from octavo.quant.int8 import Int8Method
from octavo.weights.loader import feed

pytestmark = pytest.mark.skipif(not library.is_available(), reason="not built: no C compiler")

# Every expert is chosen: where a router is torn between two, either may win.
EXPERTS = {"head_dim": 32, "num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
FAMILIES = {
    "llama": ("Llama", {}, True),
    "qwen3": ("Qwen3", {"head_dim": 32}, True),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True}, False),
    "mixtral": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 3}, False),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8}, False),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "sliding_window": 8}, False),
}
PROMPTS = [[(7 * i + 3) % 149 for i in range(30)], [(11 * i + 5) % 149 for i in range(17)]]


def run(reference: Reference, quantization: str) -> PagedRun:
    model = create_model(reference.hf_config(), 64)
    quantize(model, quantization)
    feed(model.weight_slots(), model.ignored_weights, reference.checkpoint.items())
    if quantization == "int8":
        stack_layers(model)
    paged = PagedRun(model, PROMPTS)
    paged.backend = get_backend("native")
    with ops.in_charge(quantization == "int8"):
        paged.step((0, 20), (1, 9))
        paged.step((1, 8), (0, 1))
        for _ in range(9):
            paged.step((0, 1))
    return paged


@pytest.mark.parametrize("family", FAMILIES)
def test_close_to_float32(family):
    name, config, stacks = FAMILIES[family]
    reference = Reference(getattr(transformers, f"{name}Config")(**SIZES | config))
    exact, quantized = run(reference, "none"), run(reference, "int8")
    assert (len(quantized.model.layers) == 1) == stacks
    for seq in (0, 1):
        expected = exact.result(seq)
        assert (quantized.result(seq) - expected).norm() / expected.norm() < 0.1
        agreed = quantized.result(seq).argmax(-1) == expected.argmax(-1)
        assert agreed.float().mean() > 0.8


def test_routers_and_experts_stay_in_full():
    reference = Reference(transformers.Qwen3MoeConfig(**SIZES | EXPERTS))
    model = create_model(reference.hf_config(), 64)
    quantize(model, "int8")
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    assert layers
    for layer in layers:
        assert not isinstance(layer.gate.method, Int8Method)
        assert layer.gate_up.dtype is torch.float32
    assert isinstance(model.layers[0].self_attn.o_proj.method, Int8Method)

"""Gemma 2: four norms per layer, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

import torch

from octavo.attention.context import ForwardContext
from octavo.kernels.rope import Rope
from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.layers.norm import RMSNorm
from octavo.models.decoder import (
    Config,
    DecoderLayer,
    DecoderLM,
    is_sliding,
    read_attention_spec,
    read_window,
    refuse,
)
from octavo.weights.slots import WeightSlot

# What transformers assumes where a config is silent.
GEMMA_DEFAULTS: Config = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


class GemmaLayer(DecoderLayer):
    """Norms before and after attention and feed-forward: x + norm(attention(norm(x))), ..."""

    norm_adds_one = True

    def __init__(self, config: Config, self_attn: SelfAttention, mlp: GatedMLP) -> None:
        super().__init__(config, self_attn, mlp)
        self.pre_feedforward_layernorm = self.make_norm(config)
        self.post_feedforward_layernorm = self.make_norm(config)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, rope: Rope, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x, residual = self.input_layernorm(x, residual)
        x = self.post_attention_layernorm.normalize(self.self_attn(x, rope, context))
        x, residual = self.pre_feedforward_layernorm(x, self.self_attn.pick(residual, context))
        return self.post_feedforward_layernorm.normalize(self.mlp(x)), residual

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        before = self.pre_feedforward_layernorm.weight_slots(f"{prefix}.pre_feedforward_layernorm")
        after = self.post_feedforward_layernorm.weight_slots(f"{prefix}.post_feedforward_layernorm")
        return super().weight_slots(prefix) | before | after


class Gemma2ForCausalLM(DecoderLM):
    ties_by_default = True
    norm_adds_one = True

    def __init__(self, hf_config: Config, max_model_len: int) -> None:
        refuse(hf_config, "use_bidirectional_attention")
        defaults = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        super().__init__({**GEMMA_DEFAULTS, **defaults, **hf_config}, max_model_len)

    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        sliding = is_sliding(config, layer_idx, default=layer_idx % 2 == 0)
        return make_gemma_layer(config, layer_idx, sliding)

    def embed_scale(self, config: Config) -> float:
        return float(config["hidden_size"] ** 0.5)


def make_gemma_layer(
    config: Config, layer_idx: int, sliding: bool, *, has_qk_norm: bool = False
) -> GemmaLayer:
    spec = read_attention_spec(
        config,
        sliding_window=read_window(config) if sliding else None,
        scale=config["query_pre_attn_scalar"] ** -0.5,
        softcap=config.get("attn_logit_softcapping"),
    )
    size = config["hidden_size"]
    has_bias = config.get("attention_bias", False)
    eps = config["rms_norm_eps"]
    head_norms = RMSNorm(spec.head_dim, eps, True), RMSNorm(spec.head_dim, eps, True)
    self_attn = SelfAttention(
        layer_idx,
        size,
        spec,
        qkv_bias=has_bias,
        out_bias=has_bias,
        qk_norm=head_norms if has_qk_norm else None,
    )
    # A null hidden_activation means the default; hidden_act is an old name that Gemma 2 never used.
    activation = config["hidden_activation"] or GEMMA_DEFAULTS["hidden_activation"]
    return GemmaLayer(config, self_attn, GatedMLP(size, config["intermediate_size"], activation))

"""Llama 1 to 3.x, and the many models that store themselves as Llama (SmolLM2, Yi, ...)."""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, read_attention_spec


class LlamaForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        has_bias = config.get("attention_bias", False)
        self_attn = SelfAttention(
            layer_idx,
            config["hidden_size"],
            read_attention_spec(config),
            qkv_bias=has_bias,
            out_bias=has_bias,
        )
        mlp = GatedMLP(
            config["hidden_size"],
            config["intermediate_size"],
            config["hidden_act"],
            bias=config.get("mlp_bias", False),
        )
        return DecoderLayer(config, self_attn, mlp)

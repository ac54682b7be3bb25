"""Qwen3 (dense): Qwen2 with a norm on each query and key head instead of biases."""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.layers.norm import RMSNorm
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, read_attention_spec
from octavo.models.qwen2 import qwen_window


class Qwen3ForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        size, eps = config["hidden_size"], config["rms_norm_eps"]
        config = {"head_dim": 128, **config}
        spec = read_attention_spec(config, sliding_window=qwen_window(config, layer_idx))
        has_bias = config.get("attention_bias", False)
        self_attn = SelfAttention(
            layer_idx,
            size,
            spec,
            qkv_bias=has_bias,
            out_bias=has_bias,
            qk_norm=(RMSNorm(spec.head_dim, eps), RMSNorm(spec.head_dim, eps)),
        )
        return DecoderLayer(config, self_attn, self.make_mlp(config, layer_idx))

    def make_mlp(self, config: Config, layer_idx: int) -> GatedMLP | MoE:
        return GatedMLP(config["hidden_size"], config["intermediate_size"], config["hidden_act"])

    def rope_config(self, config: Config) -> Config:
        return {"head_dim": 128, **config}

"""Mistral: Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, read_attention_spec, refuse


class MistralForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        refuse(config, "attention_bias", "mlp_bias", "layer_types")
        spec = read_attention_spec(config, sliding_window=config.get("sliding_window", 4096))
        size = config["hidden_size"]
        mlp = GatedMLP(size, config["intermediate_size"], config["hidden_act"])
        return DecoderLayer(config, SelfAttention(layer_idx, size, spec), mlp)

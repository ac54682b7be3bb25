"""Mixtral: Mistral with experts in every layer."""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.moe import MoE
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, read_attention_spec, refuse


class MixtralForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        refuse(config, "attention_bias", "mlp_bias", "layer_types")
        spec = read_attention_spec(config, sliding_window=config.get("sliding_window"))
        size = config["hidden_size"]
        mlp = MoE(
            size,
            config["intermediate_size"],
            config["hidden_act"],
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            renormalise=True,
            stored_as=("block_sparse_moe", "w1", "w3", "w2"),
        )
        return DecoderLayer(config, SelfAttention(layer_idx, size, spec), mlp)

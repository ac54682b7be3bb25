"""Phi-3, Phi-3.5 mini and Phi-4: Llama with q-k-v and gate-up stored fused, partial rotation and
LongRoPE.
"""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, read_attention_spec, refuse


class Phi3ForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        refuse(config, "attention_bias", "mlp_bias")
        spec = read_attention_spec(config, sliding_window=config.get("sliding_window"))
        size = config["hidden_size"]
        self_attn = SelfAttention(layer_idx, size, spec, stored_as="qkv_proj")
        mlp = GatedMLP(
            size, config["intermediate_size"], config["hidden_act"], stored_as="gate_up_proj"
        )
        return DecoderLayer(config, self_attn, mlp)

    def rope_config(self, config: Config) -> Config:
        """Early checkpoints call LongRoPE "su" or "yarn"."""
        config = {"original_max_position_embeddings": 4096, **config}
        scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if (scaling.get("rope_type") or scaling.get("type")) not in ("su", "yarn"):
            return config
        return {**config, "rope_scaling": {**scaling, "rope_type": "longrope"}}

"""Gemma 3, text: Gemma 2 with normed queries and keys, no soft caps, five sliding layers to one
full one, and a rotary embedding for each kind.
"""

from __future__ import annotations

import torch

from octavo.attention.context import ForwardContext
from octavo.layers.rotary import RotaryEmbedding
from octavo.models.decoder import Config, DecoderLayer, DecoderLM, is_sliding, refuse
from octavo.models.gemma2 import GEMMA_DEFAULTS, make_gemma_layer


class Gemma3ForCausalLM(DecoderLM):
    ties_by_default = True
    norm_adds_one = True

    def __init__(self, hf_config: Config, max_model_len: int) -> None:
        refuse(hf_config, "use_bidirectional_attention", "attn_logit_softcapping")
        hf_config = {**GEMMA_DEFAULTS, **hf_config}
        super().__init__(hf_config, max_model_len)
        self.local_rotary = RotaryEmbedding(_local_rope_config(hf_config), max_model_len)

    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        pattern = config.get("sliding_window_pattern") or 6  # the last of so many is full
        sliding = is_sliding(config, layer_idx, default=(layer_idx + 1) % pattern != 0)
        return make_gemma_layer(config, layer_idx, sliding, has_qk_norm=True)

    def rope_config(self, config: Config) -> Config:
        """The full layers' rotary embedding: the one that scaling applies to."""
        if (by_type := config.get("rope_parameters") or {}).get("full_attention"):
            return {**config, "rope_scaling": None, "rope_parameters": by_type["full_attention"]}
        return {"rope_theta": 1_000_000.0, **config}

    def embed_scale(self, config: Config) -> float:
        return float(config["hidden_size"] ** 0.5)

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        full, local = self.rotary(positions), self.local_rotary(positions)
        ropes = [full if spec.sliding_window is None else local for spec in self.attention_specs]
        return self.run_layers(input_ids, ropes, context)


def _local_rope_config(config: Config) -> Config:
    """The sliding layers' rotary embedding."""
    by_type = config.get("rope_parameters") or {}
    theta = config.get("rope_local_base_freq") or 10_000.0
    local = by_type.get("sliding_attention") or {"rope_theta": theta}
    return {**config, "rope_scaling": None, "rope_parameters": local}

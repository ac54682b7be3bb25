"""Qwen3 MoE: Qwen3 with experts in some layers, mostly all."""

from __future__ import annotations

from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.models.decoder import Config
from octavo.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    def make_mlp(self, config: Config, layer_idx: int) -> GatedMLP | MoE:
        is_sparse = (layer_idx + 1) % (config.get("decoder_sparse_step") or 1) == 0
        if layer_idx in (config.get("mlp_only_layers") or ()) or not is_sparse:
            return super().make_mlp(config, layer_idx)
        return MoE(
            config["hidden_size"],
            config["moe_intermediate_size"],
            config["hidden_act"],
            num_experts=config.get("num_experts") or config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            renormalise=bool(config.get("norm_topk_prob", False)),
        )

"""Qwen2 and Qwen2.5: biases on q, k and v; a sliding window in the upper layers, if at all."""

from __future__ import annotations

from octavo.layers.attention import SelfAttention
from octavo.layers.mlp import GatedMLP
from octavo.models.decoder import (
    Config,
    DecoderLayer,
    DecoderLM,
    is_sliding,
    read_attention_spec,
    read_window,
)


def qwen_window(config: Config, layer_idx: int) -> int | None:
    """The layer's window: layers from max_window_layers on have one, if use_sliding_window."""
    uses_window = (
        bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
    )
    default = uses_window and layer_idx >= config.get("max_window_layers", 28)
    return read_window(config) if is_sliding(config, layer_idx, default) else None


class Qwen2ForCausalLM(DecoderLM):
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        size = config["hidden_size"]
        spec = read_attention_spec(config, sliding_window=qwen_window(config, layer_idx))
        self_attn = SelfAttention(layer_idx, size, spec, qkv_bias=True)
        mlp = GatedMLP(size, config["intermediate_size"], config["hidden_act"])
        return DecoderLayer(config, self_attn, mlp)

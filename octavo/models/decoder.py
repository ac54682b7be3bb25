"""The shape that most decoder-only models share: embed, a stack of layers, norm, head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from octavo.attention.base import AttentionSpec, KVLayer
from octavo.attention.context import ForwardContext
from octavo.errors import UnsupportedModelError
from octavo.kernels.decode_layers import LayerTensors
from octavo.kernels.linear import fuses
from octavo.kernels.rope import Rope
from octavo.layers.attention import SelfAttention
from octavo.layers.embedding import Embedding, LMHead
from octavo.layers.linear import DenseMethod
from octavo.layers.mlp import GatedMLP
from octavo.layers.moe import MoE
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import RotaryEmbedding
from octavo.models.base import CausalLM
from octavo.models.fused_decode import FusedDecode
from octavo.weights.slots import WeightSlot

Config = Mapping[str, Any]


class DecoderLayer(nn.Module):
    """The pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    The sum is carried unfinished as (x, residual), so that each addition happens in the norm that
    follows it.
    """

    norm_adds_one = False

    def __init__(self, config: Config, self_attn: SelfAttention, mlp: GatedMLP | MoE) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = self.make_norm(config)
        self.post_attention_layernorm = self.make_norm(config)

    def make_norm(self, config: Config) -> RMSNorm:
        return RMSNorm(config["hidden_size"], config["rms_norm_eps"], self.norm_adds_one)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, rope: Rope, context: ForwardContext
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[num_tokens, size] each; x + residual is the layer's input, and so for its result, which
        has a row for each token that attends. On a GPU the sum is finished where it arises, in x
        itself, and there is no residual.
        """
        if residual is None and fuses(x):
            x = self.self_attn.forward_fused(x, self.input_layernorm, rope, context)
            return self.mlp.forward_fused(x, self.post_attention_layernorm), None
        x, residual = self.input_layernorm(x, residual)
        x, residual = self.self_attn(x, rope, context), self.self_attn.pick(residual, context)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def plain_tensors(self, kv: KVLayer) -> LayerTensors | None:
        """What a kernel for all layers at once reads; None where the layer is in some way its own:
        another order, a window, a softcap, experts, packed weights, unusual biases or norms.
        """
        attn, mlp = self.self_attn, self.mlp
        spec = attn.attention.spec
        if type(self) is not DecoderLayer or type(attn) is not SelfAttention:
            return None
        if type(mlp) is not GatedMLP:
            return None
        products = attn.qkv_proj, attn.o_proj, mlp.gate_up_proj, mlp.down_proj
        norms = self.input_layernorm, self.post_attention_layernorm
        head_norms = attn.head_norms()
        kinds = {(norm.eps, norm.add_one) for norm in (*norms, head_norms) if norm is not None}
        if (
            spec.sliding_window is not None
            or spec.logit_softcap is not None
            or not all(isinstance(product.method, DenseMethod) for product in products)
            or any(product.bias is not None for product in products[1:])
            or kinds != {(norms[0].eps, False)}
        ):
            return None
        return LayerTensors(
            qkv=attn.qkv_proj.get_parameter("weight"),
            out=attn.o_proj.get_parameter("weight"),
            gate_up=mlp.gate_up_proj.get_parameter("weight"),
            down=mlp.down_proj.get_parameter("weight"),
            input_norm=norms[0].weight,
            post_norm=norms[1].weight,
            query_norm=head_norms.query if head_norms else None,
            key_norm=head_norms.key if head_norms else None,
            qkv_bias=attn.qkv_proj.bias,
            keys=kv.k,
            values=kv.v,
        )

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        return {
            **self.input_layernorm.weight_slots(f"{prefix}.input_layernorm"),
            **self.self_attn.weight_slots(f"{prefix}.self_attn"),
            **self.post_attention_layernorm.weight_slots(f"{prefix}.post_attention_layernorm"),
            **self.mlp.weight_slots(f"{prefix}.mlp"),
        }


class DecoderLM(CausalLM):
    """A model of that shape. A subclass says what a layer is, in `make_layer`."""

    ties_by_default = False  # where the config does not say whether head and embedding are one
    norm_adds_one = False

    def __init__(self, hf_config: Config, max_model_len: int) -> None:
        super().__init__(hf_config, max_model_len)
        vocab_size, size = hf_config["vocab_size"], hf_config["hidden_size"]
        is_tied = hf_config.get("tie_word_embeddings", self.ties_by_default)
        num_layers = hf_config["num_hidden_layers"]
        self.embed_tokens = Embedding(vocab_size, size, self.embed_scale(hf_config))
        layers = [self.make_layer(hf_config, i) for i in range(num_layers)]
        self.attention_specs = [layer.self_attn.attention.spec for layer in layers]
        self.layers = nn.ModuleList(layers)
        self.fused_decode = FusedDecode(layers)
        self.norm = RMSNorm(size, hf_config["rms_norm_eps"], self.norm_adds_one)
        self.rotary = RotaryEmbedding(self.rope_config(hf_config), max_model_len)
        self.lm_head = LMHead(
            vocab_size,
            size,
            tied_to=self.embed_tokens if is_tied else None,
            softcap=hf_config.get("final_logit_softcapping"),
        )
        # Old checkpoints store the rotary frequencies, and some a tied head a second time.
        head = (r"lm_head\.weight",) if is_tied else ()
        self.ignored_weights = (r".*\.rotary_emb\.inv_freq", *head)

    @abstractmethod
    def make_layer(self, config: Config, layer_idx: int) -> DecoderLayer:
        """Layer number layer_idx, parameters empty."""

    def rope_config(self, config: Config) -> Config:
        """The config as the rotary embedding should read it."""
        return config

    def embed_scale(self, config: Config) -> float:
        """What embeddings are multiplied by."""
        return 1.0

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        return self.run_layers(input_ids, [self.rotary(positions)] * len(self.layers), context)

    def run_layers(
        self, input_ids: torch.Tensor, ropes: Sequence[Rope], context: ForwardContext
    ) -> torch.Tensor:
        """Embed, run layer i with ropes[i], and norm; see `CausalLM.forward`."""
        x, residual = self.embed_tokens(input_ids), None
        if (decoded := self.fused_decode.run(x, ropes, context)) is not None:
            x = decoded
        else:
            for layer, rope in zip(self.layers, ropes, strict=True):
                x, residual = layer(x, residual, rope, context)
        hidden: torch.Tensor = self.norm(x, residual)[0]
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)  # type: ignore[no-any-return]

    def compute_scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head.scores(hidden)

    def weight_slots(self) -> dict[str, WeightSlot]:
        slots = self.embed_tokens.weight_slots("model.embed_tokens")
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            slots |= layer.weight_slots(f"model.layers.{i}")
        slots |= self.norm.weight_slots("model.norm")
        return slots | self.lm_head.weight_slots("lm_head")


# ---- reading a config


def read_attention_spec(
    config: Config,
    *,
    sliding_window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Heads and their width from the config; `scale` defaults to 1 / sqrt(head_dim)."""
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise UnsupportedModelError(
            f"num_attention_heads ({num_heads}) is no multiple of num_key_value_heads "
            f"({num_kv_heads})."
        )
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        logit_softcap=softcap,
    )


def is_sliding(config: Config, layer_idx: int, default: bool) -> bool:
    """Whether `layer_types` says that the layer has a sliding window; `default` if it is not there.

    Raises:
        UnsupportedModelError: the layer is of another type.
    """
    layer_types = config.get("layer_types")
    if layer_types is None:
        return default
    layer_type = layer_types[layer_idx]
    if layer_type not in ("full_attention", "sliding_attention"):
        raise UnsupportedModelError(
            f"layer_types[{layer_idx}] is {layer_type!r}; "
            "supported: full_attention, sliding_attention."
        )
    return bool(layer_type == "sliding_attention")


def read_window(config: Config) -> int:
    """`sliding_window` of a config with sliding layers."""
    window = config.get("sliding_window")
    if not isinstance(window, int) or window < 1:
        raise UnsupportedModelError(
            f"The config has sliding-window layers, but sliding_window is {window!r}."
        )
    return window


def refuse(config: Config, *names: str) -> None:
    """Raise UnsupportedModelError if any of these switches is on."""
    for name in names:
        if config.get(name):
            raise UnsupportedModelError(
                f"{name}={config[name]!r} is not implemented for {config.get('model_type')!r}."
            )

"""Attention as a model sees it: project, rotate, attend over the paged cache, project back."""

from __future__ import annotations

import torch
from torch import nn

from octavo.attention.base import AttentionSpec
from octavo.attention.context import ForwardContext
from octavo.layers.linear import Linear, MergedLinear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rope, apply_rope
from octavo.weights.slots import WeightSlot


class Attention(nn.Module):
    """Hands a layer's queries, keys and values to the backend, with that layer's cache."""

    def __init__(self, layer_idx: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.spec = spec

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        context: ForwardContext,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        cache = context.kv[self.layer_idx]
        return context.backend.forward(query, key, value, cache, context.batch, self.spec)


class SelfAttention(nn.Module):
    """Multi-head or grouped-query self-attention with rotary positions.

    Args:
        layer_idx: which layer's cache it uses.
        size: width of the hidden states.
        spec: heads, scale, window, softcap.
        qkv_bias: whether the q, k and v projections have biases.
        out_bias: whether the output projection has one.
        stored_as: checkpoint name of a q-k-v tensor that is already fused.
        qk_norm: two norms over head_dim, for queries and for keys, before the rotation.
    """

    def __init__(
        self,
        layer_idx: int,
        size: int,
        spec: AttentionSpec,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        stored_as: str | None = None,
        qk_norm: tuple[RMSNorm, RMSNorm] | None = None,
    ) -> None:
        super().__init__()
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedLinear(size, parts, bias=qkv_bias, stored_as=stored_as)
        self.o_proj = Linear(q_size, size, bias=out_bias)
        self.q_norm = qk_norm[0] if qk_norm else None
        self.k_norm = qk_norm[1] if qk_norm else None
        self.attention = Attention(layer_idx, spec)

    def forward(self, x: torch.Tensor, rope: Rope, context: ForwardContext) -> torch.Tensor:
        """[num_tokens, size] -> [num_tokens, size]"""
        spec = self.attention.spec
        heads = self.qkv_proj(x).view(len(x), -1, spec.head_dim)  # queries, keys, values
        num_rotated = spec.num_heads + spec.num_kv_heads
        if self.q_norm is None or self.k_norm is None:
            # Queries and keys lie side by side: one rotation for both.
            rotated = apply_rope(heads[:, :num_rotated], rope)
            query, key = rotated[:, : spec.num_heads], rotated[:, spec.num_heads :]
        else:
            query = apply_rope(self.q_norm.normalize(heads[:, : spec.num_heads]), rope)
            key = apply_rope(self.k_norm.normalize(heads[:, spec.num_heads : num_rotated]), rope)
        attended = self.attention(query, key, heads[:, num_rotated:], context)
        return self.o_proj(attended.flatten(1))  # type: ignore[no-any-return]

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        slots = self.qkv_proj.weight_slots(prefix) | self.o_proj.weight_slots(f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            slots |= self.q_norm.weight_slots(f"{prefix}.q_norm")
            slots |= self.k_norm.weight_slots(f"{prefix}.k_norm")
        return slots

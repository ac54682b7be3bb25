"""Attention as a model sees it: project, rotate, attend over the paged cache, project back."""

from __future__ import annotations

import torch
from torch import nn

from octavo.attention.base import AttentionSpec, PackedAttention
from octavo.attention.context import ForwardContext
from octavo.kernels.linear import Around
from octavo.kernels.qkv import HeadNorms, HeadTransform, split_and_rotate
from octavo.kernels.rope import Rope
from octavo.layers.linear import Linear, MergedLinear
from octavo.layers.norm import RMSNorm
from octavo.weights.slots import WeightSlot


class Attention(nn.Module):
    """Attends from a layer's packed projection, through the backend, with that layer's cache.

    A backend that takes the projection as it is (`PackedAttention`) rotates and stores in one go;
    for any other that is done here, in plain steps.
    """

    def __init__(self, layer_idx: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.spec = spec

    def forward(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        transform: HeadTransform,
        context: ForwardContext,
    ) -> torch.Tensor:  # [num_queries, num_heads * head_dim]
        spec, backend, cache = self.spec, context.backend, context.kv[self.layer_idx]
        batch = context.batch_of(self.layer_idx)
        if isinstance(backend, PackedAttention):
            attended = backend.forward_packed(qkv, transform, cache, batch, spec)
        else:
            heads = split_and_rotate(qkv, spec.num_heads, spec.num_kv_heads, transform)
            attended = backend.forward(*heads, cache, batch, spec)
        return attended.flatten(1)


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
        """[num_tokens, size] -> [num_queries, size]: see `pick`."""
        transform = HeadTransform(rope, self.head_norms())
        return self.o_proj(self.attention(self.qkv_proj(x), transform, context))  # type: ignore[no-any-return]

    def forward_fused(
        self, x: torch.Tensor, norm: RMSNorm, rope: Rope, context: ForwardContext
    ) -> torch.Tensor:
        """pick(x) + forward(norm(x)), in few launches; may be written over x."""
        qkv = self.qkv_proj.forward_around(x, norm.before_product())
        attended = self.attention(qkv, HeadTransform(rope, self.head_norms()), context)
        return self.o_proj.forward_around(attended, Around(residual=self.pick(x, context)))

    def pick(self, x: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """The rows of the tokens that attend: all but in the last layer."""
        return context.batch_of(self.attention.layer_idx).pick(x)

    def head_norms(self) -> HeadNorms | None:
        """The weights of both norms, if it has them."""
        if self.q_norm is None or self.k_norm is None:
            return None
        eps, add_one = self.q_norm.eps, self.q_norm.add_one
        return HeadNorms(self.q_norm.weight, self.k_norm.weight, eps, add_one)

    def weight_slots(self, prefix: str) -> dict[str, WeightSlot]:
        slots = self.qkv_proj.weight_slots(prefix) | self.o_proj.weight_slots(f"{prefix}.o_proj")
        if self.q_norm is not None and self.k_norm is not None:
            slots |= self.q_norm.weight_slots(f"{prefix}.q_norm")
            slots |= self.k_norm.weight_slots(f"{prefix}.k_norm")
        return slots

"""Paged attention by Triton kernels: NVIDIA and AMD GPUs.

Every length is read from the batch's tensors, so a CUDA graph that was captured with one batch is
right for any other whose tensors were copied over it, as long as it has as many tokens, as many
decodes and no longer `max_seq_len` and `max_query_len` than the captured one (longer contexts are
right too, only cut less finely).
"""

from __future__ import annotations

import torch

from octavo.attention.base import AttentionBatch, AttentionSpec, KVLayer
from octavo.kernels.paged_decode_triton import DecodeWorkspace, SharedPart, paged_decode
from octavo.kernels.paged_prefill_triton import paged_prefill
from octavo.kernels.qkv import HeadTransform
from octavo.kernels.qkv_triton import rotate_and_store
from octavo.kernels.shared_prefix_triton import attend_shared


class TritonAttention:
    """Any floating dtype, any head width, sliding window, softcap, grouped queries.

    It keeps the workspace of the decode kernel and nothing else.
    """

    name = "triton"
    supports_graphs = True

    def __init__(self) -> None:
        self._workspace = DecodeWorkspace()

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """See `AttentionBackend.forward`. Rows beyond the batch's sequences are undefined."""
        blocks, offsets = batch.slot_mapping // kv.k.shape[1], batch.slot_mapping % kv.k.shape[1]
        kv.k[blocks, offsets] = key.to(kv.k.dtype)
        kv.v[blocks, offsets] = value.to(kv.v.dtype)
        return self._attend(query.contiguous(), kv, batch, spec)

    def forward_packed(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        transform: HeadTransform,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """See `PackedAttention.forward_packed`."""
        query = rotate_and_store(qkv, spec.num_heads, transform, kv.k, kv.v, batch.slot_mapping)
        return self._attend(query, kv, batch, spec)

    def _attend(
        self, query: torch.Tensor, kv: KVLayer, batch: AttentionBatch, spec: AttentionSpec
    ) -> torch.Tensor:
        out = torch.empty_like(query)
        num_decodes = batch.num_decodes
        if num_decodes:
            # A graph may be padded to more decodes than there are tokens; those are empty.
            num_queries = min(num_decodes, len(query))
            paged_decode(
                query[:num_queries],
                out[:num_queries],
                kv.k,
                kv.v,
                batch.block_tables,
                batch.seq_lens,
                batch.max_seq_len,
                self._workspace,
                scale=spec.scale,
                window=spec.sliding_window,
                softcap=spec.logit_softcap,
                shared=_attend_shared(query[:num_queries], kv, batch, spec),
            )
        if len(batch.query_lens) > num_decodes:
            paged_prefill(
                query,
                out,
                kv.k,
                kv.v,
                batch.block_tables[num_decodes:],
                batch.query_starts[num_decodes:],
                batch.seq_lens[num_decodes:],
                len(query) - sum(batch.query_lens[:num_decodes]),
                batch.max_query_len,
                scale=spec.scale,
                window=spec.sliding_window,
                softcap=spec.logit_softcap,
            )
        return out


def _attend_shared(
    query: torch.Tensor, kv: KVLayer, batch: AttentionBatch, spec: AttentionSpec
) -> SharedPart | None:
    """What the decodes have in common, on its own. A window would hide parts of it."""
    shared = batch.shared
    if shared is None or spec.sliding_window is not None:
        return None
    return attend_shared(
        query,
        kv.k,
        kv.v,
        shared.block_table,
        shared.lens,
        shared.length,
        scale=spec.scale,
        softcap=spec.logit_softcap,
    )

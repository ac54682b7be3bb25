"""Paged attention by Triton kernels: NVIDIA and AMD GPUs.

Every length is read from the batch's tensors, so a CUDA graph that was captured with one batch is
right for any other whose tensors were copied over it, as long as it has as many tokens, as many
decodes and no longer `max_seq_len` and `max_query_len` than the captured one (longer contexts are
right too, only cut less finely).
"""

from __future__ import annotations

import torch

from octavo.attention.base import AttentionBatch, AttentionSpec, KVLayer
from octavo.kernels import launch
from octavo.kernels.packed_prefill_triton import can_pack, gather, packed_prefill
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
    captures_decodes = captures_chunks = compiles_ahead = gives_up_decodes = True

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
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """See `AttentionBackend.forward`. Rows beyond the batch's sequences are undefined."""
        blocks, offsets = batch.slot_mapping // kv.k.shape[1], batch.slot_mapping % kv.k.shape[1]
        kv.k[blocks, offsets] = key.to(kv.k.dtype)
        kv.v[blocks, offsets] = value.to(kv.v.dtype)
        return self._attend(batch.pick(query).contiguous(), kv, batch, spec)

    def forward_packed(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        transform: HeadTransform,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """See `PackedAttention.forward_packed`."""
        packs = self._can_pack(qkv, spec)
        query = rotate_and_store(
            qkv, spec.num_heads, transform, kv.k, kv.v, batch.slot_mapping,
            keep=packs and batch.is_fresh,
        )  # fmt: skip
        return self._attend(batch.pick(query), kv, batch, spec, qkv if packs else None)

    def _can_pack(self, qkv: torch.Tensor, spec: AttentionSpec) -> bool:
        """Whether chunks may find their keys outside the cache."""
        is_plain = spec.sliding_window is None and spec.logit_softcap is None
        return (
            is_plain
            and launch.copies_tiles(qkv.device)
            and can_pack(spec.head_dim, qkv.dtype)
            and qkv.is_contiguous()
        )

    def _attend(
        self,
        query: torch.Tensor,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
        qkv: torch.Tensor | None = None,  # where chunks may find their keys
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
            self._attend_chunks(query, out, qkv, kv, batch, spec)
        return out

    def _attend_chunks(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        qkv: torch.Tensor | None,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> None:
        """Fill the rows of `out` that belong to chunks. Their keys are in the cache."""
        if qkv is not None and (batch.is_fresh or batch.key_starts is not None):
            _attend_packed(query, out, qkv, kv, batch, spec)
        else:
            _attend_paged(query, out, kv, batch, spec)


def _attend_paged(
    query: torch.Tensor,
    out: torch.Tensor,
    kv: KVLayer,
    batch: AttentionBatch,
    spec: AttentionSpec,
) -> None:
    """The chunks, each key looked up in the cache."""
    num_decodes = batch.num_decodes
    paged_prefill(
        query,
        out,
        kv.k,
        kv.v,
        batch.block_tables[num_decodes:],
        batch.query_starts[num_decodes:],
        batch.seq_lens[num_decodes:],
        _num_chunk_tokens(query, batch),
        batch.max_query_len,
        scale=spec.scale,
        window=spec.sliding_window,
        softcap=spec.logit_softcap,
    )


def _attend_packed(
    query: torch.Tensor,
    out: torch.Tensor,
    qkv: torch.Tensor,
    kv: KVLayer,
    batch: AttentionBatch,
    spec: AttentionSpec,
) -> None:
    """The chunks: their keys are in the projection, or copied out of the cache."""
    num_decodes, width = batch.num_decodes, spec.num_kv_heads * spec.head_dim
    starts = batch.query_starts[num_decodes:]
    if batch.is_fresh:
        keys, first_col, rows = qkv, spec.num_heads * spec.head_dim, starts
    else:
        assert batch.key_starts is not None
        rows, first_col = batch.key_starts, 0
        keys = gather(kv.k, kv.v, batch.block_tables[num_decodes:], rows, batch.num_keys)
    packed_prefill(
        query,
        out,
        keys,
        first_col,
        first_col + width,
        rows,
        starts,
        batch.seq_lens[num_decodes:],
        _num_chunk_tokens(query, batch),
        batch.max_query_len,
        spec.num_kv_heads,
        spec.scale,
    )


def _num_chunk_tokens(query: torch.Tensor, batch: AttentionBatch) -> int:
    return len(query) - sum(batch.query_lens[: batch.num_decodes])


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

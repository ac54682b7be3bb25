"""Paged attention in native code, for float32 on a CPU, over a cache of any precision.

Keys and values are read where they lie in the cache, once for all query heads that share them, with
an online softmax in float32. Within a block they lie in an order of their own, head by head and
keys dimension by dimension (csrc/native.h), so that neither has to be shuffled. A long sequence is
summed up in segments of fixed length that are merged in order, so that threads can share it; a
token's result depends on its own sequence alone, bit for bit, whatever the batch and however its
prompt was cut into chunks (as long as its values are finite). On AMX, prompts attend in tiles of
bfloat16 unless the cache is in float32 (docs/decisions/0012).
"""

from __future__ import annotations

from ctypes import byref

import torch

from octavo.attention.base import AttentionBatch, AttentionSpec, KVLayer
from octavo.attention.torch_backend import TorchAttention
from octavo.kernels.cpu import ops
from octavo.kernels.cpu.library import AttentionCall, Batch, load
from octavo.kernels.qkv import HeadTransform, split_and_rotate


class NativeBatch:
    """A batch as the kernels read it. Made once per step."""

    def __init__(self, batch: AttentionBatch, block_size: int) -> None:
        self.batch = batch
        self.num_queries = sum(batch.query_lens)
        num_tokens = self.num_queries if batch.queries is None else len(batch.slot_mapping)
        num_seqs = len(batch.query_lens)
        lens = torch.tensor((batch.query_lens, batch.host_seq_lens), dtype=torch.int32)
        slots, tables = batch.slot_mapping.contiguous(), batch.block_tables.contiguous()
        roles = torch.tensor(role_ends(batch), dtype=torch.int64)
        self._owned = (lens, slots, tables, batch.queries, roles)  # what the pointers lead to
        self.pointer = byref(
            Batch(
                slots.data_ptr(),
                lens.data_ptr(),
                lens.data_ptr() + lens.element_size() * num_seqs,
                tables.data_ptr(),
                tables.stride(0),
                num_tokens,
                num_seqs,
                block_size,
                None if batch.queries is None else batch.queries.data_ptr(),
                roles.data_ptr(),
                len(roles),
            )
        )


def role_ends(batch: AttentionBatch) -> list[int]:
    """Where the roles of a batch's queries change: those below the first number were generated,
    those from there to the second are of prompts, and so on in turns. Where nobody knows prompts,
    all were generated.

    A query's role follows from its position alone: it decides how matrices are multiplied with it
    and how it attends, and so its bits.
    """
    ends = [0]
    prompt_lens = batch.prompt_lens or (0,) * len(batch.query_lens)
    for num_queries, seq_len, prompt_len in zip(
        batch.query_lens, batch.host_seq_lens, prompt_lens, strict=True
    ):
        num_prompt = min(max(prompt_len - seq_len + num_queries, 0), num_queries)
        for is_prompt, length in ((1, num_prompt), (0, num_queries - num_prompt)):
            if not length:
                continue
            if len(ends) % 2 == is_prompt:  # the last role is the other one
                ends.append(ends[-1])
            ends[-1] += length
    return ends


class NativeAttention:
    """Head sizes that are multiples of 16, up to 256; anything else is left to torch.

    It remembers the batches of the last step in native form and nothing else.
    """

    name = "native"
    captures_decodes = captures_chunks = compiles_ahead = gives_up_decodes = False

    def __init__(self) -> None:
        self._library = load()
        self._batches: dict[bool, NativeBatch] = {}  # by whether they have `queries`
        self._fallback = TorchAttention()

    def takes(self, spec: AttentionSpec, kv: KVLayer) -> bool:
        """Whether the native kernel can do it."""
        fits = self._library is not None and self._library.octavo_attention_fits(
            spec.num_heads, spec.num_kv_heads, spec.head_dim
        )
        return bool(fits) and kv.k.device.type == "cpu" and kv.k.dtype in ops.NUMBERS

    def native_batch(self, batch: AttentionBatch, kv: KVLayer) -> NativeBatch:
        found = self._batches.get(batch.queries is not None)
        if found is None or found.batch is not batch:
            found = NativeBatch(batch, kv.k.shape[1])
            self._batches[batch.queries is not None] = found
        return found

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """See `AttentionBackend.forward`. Rows beyond the batch's sequences (padding) are zero."""
        if query.dtype is not torch.float32 or not self.takes(spec, kv):
            return self._fallback.forward(query, key, value, kv, batch, spec)
        assert self._library is not None
        native = self.native_batch(batch, kv)
        query, key, value = _dense(batch.pick(query)), _dense(key), _dense(value)
        output = torch.empty(query.shape)
        output[native.num_queries :] = 0
        call = AttentionCall(
            query.data_ptr(),
            query.stride(0),
            output.data_ptr(),
            kv.k.data_ptr(),
            kv.v.data_ptr(),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.sliding_window or 0,
            spec.scale,
            spec.logit_softcap or 0.0,
            ops.NUMBERS[kv.k.dtype],
        )
        self._library.octavo_attention(
            byref(call),
            native.pointer,
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
        )
        return output

    def forward_packed(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        transform: HeadTransform,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """See `PackedAttention.forward_packed`."""
        heads = split_and_rotate(qkv, spec.num_heads, spec.num_kv_heads, transform)
        return self.forward(*heads, kv, batch, spec)


def _dense(heads: torch.Tensor) -> torch.Tensor:
    """Heads side by side within a token; tokens may be further apart."""
    is_dense = heads.stride(-1) == 1 and heads.stride(1) == heads.shape[2]
    return heads if is_dense else heads.contiguous()

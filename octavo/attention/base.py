"""The protocol behind which attention implementations stand.

KV cache of one layer: k and v, each [num_blocks, block_size, num_kv_heads, head_dim]. Block 0 is
never given to a request: padding may point at it and write to it. What lies where within a block is
a backend's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from octavo.kernels.qkv import HeadTransform


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's paged cache, which belongs to one backend for life: within a block, the order may
    be its own (the native one's: csrc/native.h).
    """

    k: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention computes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None  # a query at position p sees keys in (p - sliding_window, p]
    logit_softcap: float | None = None  # scores become cap * tanh(scores / cap)


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Leading blocks that some of a step's decodes have in common. A hint: everything is in
    `AttentionBatch` as well.
    """

    block_table: torch.Tensor  # [max_blocks] int32
    lens: torch.Tensor  # [num_decodes] int32: common positions, 0 for those who do not take part
    length: torch.Tensor  # [1] int32: the same for those who do, less than their seq_lens


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """What attention needs to know of a step; built once by the runner, read by every layer.

    Sequence i owns query tokens [query_starts[i], query_starts[i+1]), which are the last of its
    seq_lens[i] positions. The first `num_decodes` sequences have exactly one query token, or are
    padding, seq_lens 0, whose results are undefined.

    With `queries`, all tokens leave their keys and values, but only those attend: sequences are
    theirs, in their order, and all of them decodes.
    """

    # Where each token's K/V go: block_id * block_size + offset.
    slot_mapping: torch.Tensor  # [num_tokens] int64
    query_starts: torch.Tensor  # [num_seqs + 1] int32
    seq_lens: torch.Tensor  # [num_seqs] int32, this step's tokens included
    block_tables: (
        torch.Tensor
    )  # [num_seqs, max_blocks] int32; entries beyond a sequence's length are 0
    num_decodes: int
    max_query_len: int
    max_seq_len: int
    query_lens: tuple[int, ...]  # the same on the host, for backends that loop
    host_seq_lens: tuple[int, ...]
    # How many of each sequence's tokens are its prompt, where anybody asks. The others were
    # generated, and remain so when they are computed again after a preemption.
    prompt_lens: tuple[int, ...] = ()
    shared: SharedPrefix | None = None
    is_fresh: bool = False  # no sequence but the decodes has a context
    # Set where it pays to copy the keys of all but the decodes out of the cache first: where each
    # sequence's would begin, [num_seqs - num_decodes + 1] int32, and how many there are.
    key_starts: torch.Tensor | None = None
    num_keys: int = 0
    queries: torch.Tensor | None = None  # [num_decodes] int64, tokens of the step; None: all attend

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, ...] -> the rows of the tokens that attend."""
        return x if self.queries is None else x[self.queries]


class AttentionBackend(Protocol):
    """One attention implementation. What it computes follows from its arguments alone; it may keep
    buffers, and what it has worked out for the batch at hand.
    """

    name: str
    # Which steps may be captured, since nothing that attends to them depends on the host's values.
    captures_decodes: bool  # those of decodes alone
    captures_chunks: bool  # all others
    compiles_ahead: bool  # whether `launch.compiling` prepares its kernels
    gives_up_decodes: bool  # whether a kernel for whole layers may attend in its place

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """Write the step's keys and values into the cache, then attend causally over each
        sequence's context. The result has one row for each token that attends.
        """
        ...


@runtime_checkable
class PackedAttention(Protocol):
    """A backend that also takes a layer's packed projection, and so needs no key or value apart
    from the cache.
    """

    def forward_packed(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        transform: HeadTransform,
        kv: KVLayer,
        batch: AttentionBatch,
        spec: AttentionSpec,
    ) -> torch.Tensor:  # [num_queries, num_heads, head_dim]
        """Norm and rotate queries and keys, then as `AttentionBackend.forward`; qkv may be
        overwritten.
        """
        ...


@runtime_checkable
class PreparedAttention(Protocol):
    """A backend that cannot take any model, or has to get ready for one."""

    def check(self, specs: Sequence[AttentionSpec], dtype: torch.dtype) -> None:
        """Raises ConfigError if it cannot attend to such layers."""
        ...

    def prepare(
        self, specs: Sequence[AttentionSpec], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Once, after `check` and before the first step; what it allocates stays.

        Raises:
            ConfigError: it cannot do so on this machine.
        """
        ...

"""A paged KV cache and its batches, built by hand: what the runner does, in the plainest way."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from octavo.attention import AttentionBatch, AttentionSpec, KVLayer
from octavo.runner.inputs import last_layer_batch


@dataclass
class PagedCache:
    """Caches of some layers; each sequence's blocks are drawn in random order, never block 0.

    Unused parts hold NaN: an attention backend that lets them into a result is found out.
    """

    specs: Sequence[AttentionSpec]
    num_blocks: int = 64
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    kv: tuple[KVLayer, ...] = field(init=False)
    tables: dict[int, list[int]] = field(default_factory=dict)  # by sequence
    lens: dict[int, int] = field(default_factory=dict)  # positions computed, by sequence
    prompt_lens: dict[int, int] = field(default_factory=dict)  # by sequence; 0 where there is none

    def __post_init__(self) -> None:
        self._free = list(range(1, self.num_blocks))
        random.Random(self.seed).shuffle(self._free)
        self.kv = tuple(KVLayer(self._empty(spec), self._empty(spec)) for spec in self.specs)

    def _empty(self, spec: AttentionSpec) -> torch.Tensor:
        shape = (self.num_blocks, self.block_size, spec.num_kv_heads, spec.head_dim)
        return torch.full(shape, float("nan"), dtype=self.dtype, device=self.device)

    def step(
        self, chunks: Sequence[tuple[int, int]], num_decodes: int | None = None
    ) -> AttentionBatch:
        """Let each (sequence, chunk length) grow. Leading chunks of length 1 are decodes, unless
        `num_decodes` says that fewer are.
        """
        slots: list[int] = []
        for seq, chunk_len in chunks:
            start = self.lens.get(seq, 0)
            table = self.tables.setdefault(seq, [])
            while len(table) * self.block_size < start + chunk_len:
                table.append(self._free.pop())
            self.lens[seq] = start + chunk_len
            slots += [
                table[p // self.block_size] * self.block_size + p % self.block_size
                for p in range(start, start + chunk_len)
            ]
        query_lens = tuple(chunk_len for _, chunk_len in chunks)
        seq_lens = tuple(self.lens[seq] for seq, _ in chunks)
        if num_decodes is None:
            num_decodes = next((i for i, n in enumerate(query_lens) if n > 1), len(chunks))
        width = max(-(-seq_len // self.block_size) for seq_len in seq_lens)
        tables = [
            self.tables[seq][: -(-seq_len // self.block_size)]
            for (seq, _), seq_len in zip(chunks, seq_lens, strict=True)
        ]
        starts = [sum(query_lens[:i]) for i in range(len(chunks) + 1)]
        return AttentionBatch(
            slot_mapping=torch.tensor(slots, device=self.device),
            query_starts=torch.tensor(starts, dtype=torch.int32, device=self.device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=self.device),
            block_tables=torch.tensor(
                [table + [0] * (width - len(table)) for table in tables],
                dtype=torch.int32,
                device=self.device,
            ),
            num_decodes=num_decodes,
            max_query_len=max(query_lens),
            max_seq_len=max(seq_lens),
            query_lens=query_lens,
            host_seq_lens=seq_lens,
            prompt_lens=tuple(self.prompt_lens.get(seq, 0) for seq, _ in chunks),
        )

    def ends(self, batch: AttentionBatch, seqs: Sequence[int]) -> AttentionBatch:
        """What a last layer sees of which only the last tokens of these sequences of the step are
        asked for.
        """
        index = torch.tensor(seqs, device=self.device)
        queries = batch.query_starts[1:][index].long() - 1
        seq_lens, tables = batch.seq_lens[index], batch.block_tables[index]
        prompt_lens = [batch.prompt_lens[seq] for seq in seqs]
        return last_layer_batch(
            batch.slot_mapping, queries, seq_lens, tables, seq_lens.tolist(), prompt_lens
        )

    def positions(self, chunks: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Of the tokens of the step that was just built from these chunks."""
        return torch.cat([torch.arange(self.lens[s] - n, self.lens[s]) for s, n in chunks])

"""`DecodeGraphs`: decode steps captured as CUDA graphs, at a ladder of batch sizes.

A graph holds the whole step: it gathers each row's last token, position and block table, runs the
model, picks the tokens, and writes them and the new positions back. The host writes the list of
rows, if that has changed, and replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.base import AttentionBatch
from octavo.runner.rows import DeviceRows, to_device

# Hidden states of a decode step: (token_ids, positions, batch) -> [num_tokens, hidden_size].
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionBatch], torch.Tensor]
ComputeLogits = Callable[[torch.Tensor], torch.Tensor]


def batch_ladder(max_size: int) -> tuple[int, ...]:
    """Captured sizes, ascending: a step is padded to the next one, by an eighth at the most beyond
    the small ones.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32)]
    sizes += range(576, max_size + 64, 64)
    return (*(size for size in sizes if size < max_size), max_size)


@dataclass(slots=True)
class _Captured:
    """One size: the graph and the memory through which host and graph meet."""

    graph: Any  # torch.cuda.CUDAGraph
    rows: torch.Tensor  # [size] int64, in
    token_ids: torch.Tensor  # [size] int64, out; only with greedy choice
    logits: torch.Tensor | None  # [size, vocab], out; without
    host_rows: npt.NDArray[np.int32]  # what `rows` holds now


@dataclass(frozen=True, slots=True)
class GraphStep:
    """What a replay leaves behind, valid until the next one is queued."""

    token_ids: torch.Tensor | None  # [n] int64, chosen greedily
    logits: torch.Tensor | None  # [n, vocab] float32


class DecodeGraphs:
    """Captures sizes when they are first needed, or ahead of need with `capture_next`."""

    def __init__(
        self,
        rows: DeviceRows,
        block_size: int,
        max_seq_len: int,
        forward: Forward,
        compute_logits: ComputeLogits,
    ) -> None:
        self._rows = rows
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self._forward = forward
        self._compute_logits = compute_logits
        self._ladder = batch_ladder(rows.scratch)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool: Any = None

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def replay(self, rows: npt.NDArray[np.int32], *, greedy: bool) -> GraphStep:
        """Queue one decode step of `rows`; nothing waits for the device."""
        size = next(size for size in self._ladder if size >= len(rows))
        captured = self._captured.get((size, greedy)) or self._capture(size, greedy=greedy)
        if not np.array_equal(captured.host_rows[: len(rows)], rows) or (
            len(rows) < size and captured.host_rows[len(rows)] != self._rows.scratch
        ):
            self._write_rows(captured, rows)
        captured.graph.replay()
        if greedy:
            return GraphStep(captured.token_ids[: len(rows)], None)
        assert captured.logits is not None
        return GraphStep(None, captured.logits[: len(rows)])

    def capture_next(self, sizes: Sequence[int] | None = None) -> bool:
        """Capture one size that is still missing (of `sizes`, or of all). False if none is."""
        for size in self._ladder if sizes is None else sizes:
            if (size, True) not in self._captured:
                self._capture(size, greedy=True)
                return True
        return False

    def _write_rows(self, captured: _Captured, rows: npt.NDArray[np.int32]) -> None:
        captured.host_rows[: len(rows)] = rows
        captured.host_rows[len(rows) :] = self._rows.scratch
        captured.rows.copy_(to_device(captured.host_rows, self._rows.device))

    def _capture(self, size: int, *, greedy: bool) -> _Captured:
        device = self._rows.device
        scratch = np.full(size, self._rows.scratch, np.int32)
        rows = torch.full((size,), self._rows.scratch, dtype=torch.int64, device=device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._step(rows, greedy=greedy)  # compiles kernels and fills library workspaces
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            token_ids, logits = self._step(rows, greedy=greedy)
        self._pool = self._pool or graph.pool()
        captured = _Captured(graph, rows, token_ids, logits, scratch)
        self._captured[size, greedy] = captured
        return captured

    def _step(
        self, rows: torch.Tensor, *, greedy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is captured. Padding rows write to block 0 and stay at position 0."""
        state, size = self._rows, len(rows)
        positions = state.num_computed[rows]
        block_tables = state.block_tables[rows]
        blocks = block_tables.gather(1, (positions // self._block_size)[:, None])[:, 0]
        batch = AttentionBatch(
            slot_mapping=blocks.to(torch.int64) * self._block_size + positions % self._block_size,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=state.device),
            seq_lens=(positions + 1).to(torch.int32),
            block_tables=block_tables,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=self._max_seq_len,
            query_lens=(1,) * size,
            host_seq_lens=(self._max_seq_len,) * size,
        )
        hidden = self._forward(state.last_token_ids[rows], positions, batch)
        logits = self._compute_logits(hidden)
        state.num_computed[rows] = positions + (rows != state.scratch)
        if not greedy:
            return rows, logits
        token_ids = logits.argmax(dim=-1)
        state.last_token_ids[rows] = token_ids
        return token_ids, None

"""Whole steps captured as CUDA graphs, so that a step costs the host one copy and one launch.

`DecodeGraphs` are for steps in which every row decodes one token: the graph gathers tokens,
positions and block tables from the device rows itself, and the host writes only the list of rows,
if that has changed. `ChunkGraphs` are for all other steps up to a size, padded to a ladder of token
and sequence counts.

Either kind comes in two variants: "greedy" picks the most likely tokens inside the graph, the other
one leaves the hidden states to sample from.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.base import AttentionBatch
from octavo.runner.rows import DeviceRows, to_device
from octavo.sched.plan import StepPlan

T = TypeVar("T")

# (token_ids, positions, batch) -> hidden states [num_tokens, hidden_size]
Forward = Callable[[torch.Tensor, torch.Tensor, AttentionBatch], torch.Tensor]
# hidden states [n, hidden_size] -> the most likely tokens [n] int64
PickGreedily = Callable[[torch.Tensor], torch.Tensor]


def batch_ladder(max_size: int) -> tuple[int, ...]:
    """Captured numbers of rows, ascending: a step is padded to the next one, by a quarter of itself
    at most beyond 32 rows.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32)]
    sizes += range(576, max_size + 64, 64)
    return (*(size for size in sizes if size < max_size), max_size)


def token_ladder(max_tokens: int) -> tuple[int, ...]:
    """Captured numbers of tokens, ascending: steps of half an octave."""
    sizes = [16]
    while sizes[-1] < max_tokens:
        is_power = sizes[-1] & (sizes[-1] - 1) == 0
        sizes.append(sizes[-1] * 3 // 2 if is_power else sizes[-1] * 4 // 3)
    return tuple(size for size in sizes if size <= max_tokens)


def sequence_ladder(max_seqs: int) -> tuple[int, ...]:
    """Captured numbers of sequences in a step with chunks, ascending."""
    return (*(size for size in (4, 16, 64, 256) if size < max_seqs), max_seqs)


def next_size(ladder: Sequence[int], size: int) -> int | None:
    """The smallest rung that holds `size`, or None."""
    index = bisect.bisect_left(ladder, size)
    return ladder[index] if index < len(ladder) else None


@dataclass(frozen=True, slots=True)
class GraphStep:
    """What a replay leaves behind, valid until the next one is queued: one of the two."""

    token_ids: torch.Tensor | None  # [n] int64, chosen greedily
    hidden: torch.Tensor | None  # [n, hidden_size], to sample from


class Capturer:
    """Captures functions, all on one stream and into one memory pool: no two graphs ever run at the
    same time.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def capture(self, function: Callable[[], T]) -> tuple[Any, T]:
        """The graph of what `function` queues, and its result, whose tensors a replay rewrites."""
        function()  # compiles kernels and fills the libraries' workspaces
        torch.cuda.synchronize(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = function()
        self._pool = self._pool or graph.pool()
        return graph, result


@dataclass(frozen=True, slots=True)
class StepModel:
    """What is captured: the model, and the choice of tokens."""

    forward: Forward
    pick_greedily: PickGreedily

    def finish(
        self, hidden: torch.Tensor, sample_rows: torch.Tensor, rows: DeviceRows, *, greedy: bool
    ) -> torch.Tensor:
        """Tokens, also written to their rows; or the hidden states."""
        if not greedy:
            return hidden
        token_ids = self.pick_greedily(hidden)
        rows.last_token_ids[sample_rows] = token_ids
        return token_ids


@dataclass(slots=True)
class _Decode:
    graph: Any
    rows: torch.Tensor  # [size] int64, in
    result: torch.Tensor  # [size] int64 or [size, hidden_size], out
    host_rows: npt.NDArray[np.int64]  # what `rows` holds now


class DecodeGraphs:
    """One graph per number of rows and variant, captured when first needed or ahead of need."""

    def __init__(
        self,
        model: StepModel,
        capturer: Capturer,
        rows: DeviceRows,
        block_size: int,
        max_seq_len: int,
    ) -> None:
        self._model = model
        self._capturer = capturer
        self._rows = rows
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self.ladder = batch_ladder(rows.scratch)
        self._captured: dict[tuple[int, bool], _Decode] = {}

    def is_captured(self, size: int) -> bool:
        return (size, True) in self._captured

    def replay(self, rows: npt.NDArray[np.int32], *, greedy: bool) -> GraphStep:
        """Queue one decode step of `rows`; nothing waits for the device."""
        size = next_size(self.ladder, len(rows))
        assert size is not None, "more rows than there are"
        captured = self._captured.get((size, greedy)) or self.capture(size, greedy=greedy)
        wanted = np.full(size, self._rows.scratch, np.int64)
        wanted[: len(rows)] = rows
        if not np.array_equal(captured.host_rows, wanted):
            captured.rows.copy_(to_device(wanted, self._rows.device))
            captured.host_rows = wanted
        captured.graph.replay()
        result = captured.result[: len(rows)]
        return GraphStep(result, None) if greedy else GraphStep(None, result)

    def capture(self, size: int, *, greedy: bool = True) -> _Decode:
        host_rows = np.full(size, self._rows.scratch, np.int64)
        rows = to_device(host_rows, self._rows.device)
        graph, result = self._capturer.capture(lambda: self._step(rows, greedy=greedy))
        captured = self._captured[size, greedy] = _Decode(graph, rows, result, host_rows)
        return captured

    def _step(self, rows: torch.Tensor, *, greedy: bool) -> torch.Tensor:
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
        hidden = self._model.forward(state.last_token_ids[rows], positions, batch)
        state.num_computed[rows] = positions + (rows != state.scratch)
        return self._model.finish(hidden, rows, state, greedy=greedy)


@dataclass(slots=True)
class _Chunks:
    graph: Any
    packed: torch.Tensor  # int64, in: see `_layout`
    result: torch.Tensor  # [num_seqs] int64 or [num_seqs, hidden_size], out


def _layout(num_tokens: int, num_seqs: int) -> list[int]:
    """Lengths of what the host sends, in order: rows, positions and ids of the tokens; starts,
    lengths, rows, sampled tokens and sampled rows of the sequences.
    """
    return [num_tokens] * 3 + [num_seqs + 1] + [num_seqs] * 4


class ChunkGraphs:
    """Graphs of steps that hold chunks, by (tokens, sequences) and variant.

    Padding tokens belong to no sequence: their attention is undefined, their keys and values go to
    block 0, and nothing reads either. Padding sequences are empty.
    """

    def __init__(
        self,
        model: StepModel,
        capturer: Capturer,
        rows: DeviceRows,
        block_size: int,
        max_tokens: int,
        max_seq_len: int,
    ) -> None:
        self._model = model
        self._capturer = capturer
        self._rows = rows
        self._block_size = block_size
        self._max_seq_len = max_seq_len
        self.token_ladder = token_ladder(max_tokens)
        self.sequence_ladder = sequence_ladder(rows.scratch)
        self._captured: dict[tuple[int, int, bool], _Chunks] = {}

    def is_captured(self, num_tokens: int, num_seqs: int) -> bool:
        return (num_tokens, num_seqs, True) in self._captured

    def try_replay(self, plan: StepPlan, *, greedy: bool) -> GraphStep | None:
        """Queue the step; None if it is larger than any graph. Results are of the sampling rows."""
        num_tokens = next_size(self.token_ladder, plan.num_tokens)
        num_seqs = next_size(self.sequence_ladder, len(plan.rows))
        if num_tokens is None or num_seqs is None:
            return None
        key = (num_tokens, num_seqs, greedy)
        captured = self._captured.get(key) or self.capture(num_tokens, num_seqs, greedy=greedy)
        captured.packed.copy_(to_device(self._pack(plan, num_tokens, num_seqs), self._rows.device))
        captured.graph.replay()
        result = captured.result[: len(plan.rows)]
        if not plan.samples.all():
            sampling = np.flatnonzero(plan.samples)
            result = result[to_device(sampling, self._rows.device)]
        return GraphStep(result, None) if greedy else GraphStep(None, result)

    def capture(self, num_tokens: int, num_seqs: int, *, greedy: bool = True) -> _Chunks:
        lengths = _layout(num_tokens, num_seqs)
        blank = [np.full(length, self._rows.scratch, np.int64) for length in lengths]
        for index in (1, 2, 3, 4, 6):  # all but the rows
            blank[index][:] = 0
        packed = to_device(np.concatenate(blank), self._rows.device)
        graph, result = self._capturer.capture(lambda: self._step(packed, lengths, greedy=greedy))
        captured = self._captured[num_tokens, num_seqs, greedy] = _Chunks(graph, packed, result)
        return captured

    def _pack(self, plan: StepPlan, num_tokens: int, num_seqs: int) -> npt.NDArray[np.int64]:
        n, scratch = len(plan.rows), self._rows.scratch
        ends = np.cumsum(plan.chunk_lens)
        seq_index = np.repeat(np.arange(n), plan.chunk_lens)
        first = (ends - plan.chunk_lens)[seq_index]
        used = plan.num_tokens
        token_rows = _padded(plan.rows[seq_index], num_tokens, scratch)
        positions = _padded(plan.starts[seq_index] + np.arange(used) - first, num_tokens, 0)
        token_ids = np.full(num_tokens, 0, np.int64)
        token_ids[: plan.num_decodes] = -1  # on the device: the row's last token
        token_ids[plan.num_decodes : used] = plan.token_ids
        return np.concatenate(
            [
                token_rows,
                positions,
                token_ids,
                [0],
                _padded(ends, num_seqs, used),
                _padded(plan.starts + plan.chunk_lens, num_seqs, 0),
                _padded(plan.rows, num_seqs, scratch),
                _padded(ends - 1, num_seqs, 0),
                _padded(np.where(plan.samples, plan.rows, scratch), num_seqs, scratch),
            ]
        )

    def _step(self, packed: torch.Tensor, lengths: list[int], *, greedy: bool) -> torch.Tensor:
        state = self._rows
        token_rows, positions, ids, starts, seq_lens, seq_rows, sampled, sample_rows = torch.split(
            packed, lengths
        )
        blocks = state.block_tables[token_rows, positions // self._block_size].to(torch.int64)
        num_tokens, num_seqs = len(token_rows), len(seq_rows)
        batch = AttentionBatch(
            slot_mapping=blocks * self._block_size + positions % self._block_size,
            query_starts=starts.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            block_tables=state.block_tables[seq_rows],
            num_decodes=0,
            max_query_len=num_tokens,
            max_seq_len=self._max_seq_len,
            query_lens=(num_tokens,) * num_seqs,
            host_seq_lens=(self._max_seq_len,) * num_seqs,
        )
        token_ids = torch.where(ids < 0, state.last_token_ids[token_rows], ids)
        hidden = self._model.forward(token_ids, positions, batch)
        state.num_computed[seq_rows] = seq_lens
        return self._model.finish(hidden[sampled], sample_rows, state, greedy=greedy)


def _padded(values: npt.NDArray[Any], length: int, fill: int) -> npt.NDArray[np.int64]:
    padded = np.full(length, fill, np.int64)
    padded[: len(values)] = values
    return padded

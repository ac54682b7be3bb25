"""Decode steps captured as CUDA graphs, so that a step costs the host one copy and one launch.

The graph gathers tokens, positions and block tables from the device rows itself, and the host
writes only the list of rows, if that has changed. Steps with chunks are in `chunk_graphs`.

A graph comes in variants: "greedy" picks the most likely tokens inside the graph, the other leaves
the hidden states to sample from; "shared" reads a prefix that rows have in common only once.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.base import AttentionBatch, SharedPrefix
from octavo.kernels.decode_inputs import take_inputs
from octavo.runner.prefixes import CommonPrefix
from octavo.runner.rows import DeviceRows, to_device

T = TypeVar("T")

# (token_ids, positions, batch, last layer's batch) -> hidden states [num_queries, hidden_size]
Forward = Callable[
    [torch.Tensor, torch.Tensor, AttentionBatch, AttentionBatch | None], torch.Tensor
]
# hidden states [n, hidden_size] -> the most likely tokens [n] int64
PickGreedily = Callable[[torch.Tensor], torch.Tensor]


def batch_ladder(max_size: int) -> tuple[int, ...]:
    """Captured numbers of rows, ascending: a step is padded to the next one, by a quarter of itself
    at most beyond 32 rows.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32)]
    sizes += range(576, max_size + 64, 64)
    return (*(size for size in sizes if size < max_size), max_size)


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
    """What is captured: the model, the choice of tokens, and the rows that both work on."""

    forward: Forward
    pick_greedily: PickGreedily
    rows: DeviceRows
    block_size: int
    max_seq_len: int

    def finish(
        self, hidden: torch.Tensor, sample_rows: torch.Tensor, *, greedy: bool
    ) -> torch.Tensor:
        """Tokens, also written to their rows; or the hidden states."""
        if not greedy:
            return hidden
        token_ids = self.pick_greedily(hidden)
        self.rows.last_token_ids[sample_rows] = token_ids
        return token_ids


@dataclass(slots=True)
class _Decode:
    graph: Any
    packed: torch.Tensor  # int64, in: see `_pack`
    result: torch.Tensor  # [size] int64 or [size, hidden_size], out
    host: npt.NDArray[np.int64]  # what `packed` holds now


class DecodeGraphs:
    """One graph per number of rows and variant, captured when first needed or ahead of need."""

    def __init__(self, model: StepModel, capturer: Capturer) -> None:
        self._model = model
        self._capturer = capturer
        self._rows = model.rows
        self.ladder = batch_ladder(model.rows.scratch)
        self._captured: dict[tuple[int, bool, bool], _Decode] = {}

    def is_captured(self, size: int) -> bool:
        return (size, True, False) in self._captured

    def replay(
        self, rows: npt.NDArray[np.int32], *, greedy: bool, prefix: CommonPrefix | None = None
    ) -> GraphStep:
        """Queue one decode step of `rows`; nothing waits for the device."""
        size = next_size(self.ladder, len(rows))
        assert size is not None, "more rows than there are"
        shared = prefix is not None
        captured = self._captured.get((size, greedy, shared))
        captured = captured or self.capture(size, greedy=greedy, shared=shared)
        wanted = self._pack(size, rows, prefix)
        if not np.array_equal(captured.host, wanted):
            captured.packed.copy_(to_device(wanted, self._rows.device))
            captured.host = wanted
        captured.graph.replay()
        result = captured.result[: len(rows)]
        return GraphStep(result, None) if greedy else GraphStep(None, result)

    def rehearse(self, size: int, *, shared: bool = False) -> None:
        """Run a step of scratch rows without capturing it."""
        packed = to_device(self._blank(size, shared=shared), self._rows.device)
        self._step(packed, size, greedy=True)

    def _blank(self, size: int, *, shared: bool) -> npt.NDArray[np.int64]:
        prefix = CommonPrefix(self._rows.scratch, 0, np.empty(0, np.bool_)) if shared else None
        return self._pack(size, np.empty(0, np.int32), prefix)

    def capture(self, size: int, *, greedy: bool = True, shared: bool = False) -> _Decode:
        host = self._blank(size, shared=shared)
        packed = to_device(host, self._rows.device)
        graph, result = self._capturer.capture(lambda: self._step(packed, size, greedy=greedy))
        captured = self._captured[size, greedy, shared] = _Decode(graph, packed, result, host)
        return captured

    def _pack(
        self, size: int, rows: npt.NDArray[np.int32], prefix: CommonPrefix | None
    ) -> npt.NDArray[np.int64]:
        """The rows, padded to `size`; with a prefix also each row's share of it, the row whose
        blocks they are, and its length.
        """
        packed = np.zeros(size if prefix is None else 2 * size + 2, np.int64)
        packed[:size] = self._rows.scratch
        packed[: len(rows)] = rows
        if prefix is not None:
            packed[size : size + len(rows)] = prefix.length * prefix.members
            packed[2 * size :] = prefix.row, prefix.length
        return packed

    def _step(self, packed: torch.Tensor, size: int, *, greedy: bool) -> torch.Tensor:
        """What is captured. Padding rows write to block 0 and stay at position 0."""
        model, state, rows = self._model, self._rows, packed[:size]
        inputs = take_inputs(rows, state.num_computed, state.block_tables, model.block_size)
        batch = AttentionBatch(
            slot_mapping=inputs.slot_mapping,
            query_starts=torch.arange(size + 1, dtype=torch.int32, device=state.device),
            seq_lens=inputs.seq_lens,
            block_tables=inputs.block_tables,
            num_decodes=size,
            max_query_len=1,
            max_seq_len=model.max_seq_len,
            query_lens=(1,) * size,
            host_seq_lens=(model.max_seq_len,) * size,
            shared=self._shared(packed[size:]) if len(packed) > size else None,
        )
        hidden = model.forward(state.last_token_ids[rows], inputs.positions, batch, None)
        return model.finish(hidden, rows, greedy=greedy)

    def _shared(self, packed: torch.Tensor) -> SharedPrefix:
        narrow = packed.to(torch.int32)
        block_table = self._rows.block_tables[packed[-2:-1]][0]
        return SharedPrefix(block_table, lens=narrow[:-2], length=narrow[-1:])

"""Steps that hold chunks of prompts, captured as CUDA graphs.

All sizes are padded to ladders: the tokens of the step, its decodes, and its chunks. The decodes
come first, so that they go through the kernel that is made for them; padding among them is empty
sequences, which that kernel skips. Besides the variants of `graphs` there is "fresh", for chunks
without a context, whose keys need not be looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octavo.attention.base import AttentionBatch
from octavo.runner.graphs import Capturer, GraphStep, StepModel, next_size
from octavo.runner.inputs import is_fresh, last_layer_batch
from octavo.runner.rows import to_device
from octavo.sched.plan import StepPlan


def token_ladder(max_tokens: int) -> tuple[int, ...]:
    """Captured numbers of tokens, ascending: steps of half an octave."""
    sizes = [16]
    while sizes[-1] < max_tokens:
        is_power = sizes[-1] & (sizes[-1] - 1) == 0
        sizes.append(sizes[-1] * 3 // 2 if is_power else sizes[-1] * 4 // 3)
    return tuple(size for size in sizes if size <= max_tokens)


def decode_ladder(max_seqs: int) -> tuple[int, ...]:
    """Captured numbers of decodes in a step with chunks, ascending."""
    return (0, *(size for size in (16, 64, 256, 512) if size < max_seqs), max_seqs)


def chunk_ladder(max_seqs: int) -> tuple[int, ...]:
    """Captured numbers of chunks, ascending."""
    return (*(size for size in (4, 32) if size < max_seqs), max_seqs)


class StepSize(NamedTuple):
    """What a graph has room for."""

    num_tokens: int
    num_decodes: int
    num_chunks: int
    is_fresh: bool  # whether its chunks begin their sequences

    @property
    def num_seqs(self) -> int:
        return self.num_decodes + self.num_chunks

    @property
    def num_samples(self) -> int:
        """Decodes leave room for the chunks that end: see `ChunkGraphs.find_size`."""
        return self.num_decodes or self.num_chunks

    @property
    def layout(self) -> list[int]:
        """Lengths of what the host sends, in order: rows, positions and ids of the tokens; starts,
        lengths and rows of the sequences; sampled tokens, lengths and rows of their sequences.
        """
        return (
            [self.num_tokens] * 3
            + [self.num_seqs + 1]
            + [self.num_seqs] * 2
            + [self.num_samples] * 3
        )


@dataclass(slots=True)
class _Chunks:
    graph: Any
    packed: torch.Tensor  # int64, in: see `StepSize.layout`
    result: torch.Tensor  # [num_samples] int64 or [num_samples, hidden_size], out


class ChunkGraphs:
    """Graphs of steps that hold chunks, by size and variant.

    Padding tokens belong to no sequence: their attention is undefined, their keys and values go to
    block 0, and nothing reads either. Padding sequences are empty.

    Args:
        max_tokens: of the largest graph; 0: there are none.
    """

    def __init__(self, model: StepModel, capturer: Capturer, max_tokens: int) -> None:
        self._model = model
        self._capturer = capturer
        self._rows = model.rows
        self.token_ladder = token_ladder(max_tokens)
        self.decode_ladder = decode_ladder(model.rows.scratch)
        self.chunk_ladder = chunk_ladder(model.rows.scratch)
        self._captured: dict[tuple[StepSize, bool], _Chunks] = {}

    @property
    def largest(self) -> StepSize | None:
        """What needs the most memory; None where no step is captured."""
        if not self.token_ladder:
            return None
        ladders = self.token_ladder, self.decode_ladder, self.chunk_ladder
        num_tokens, num_decodes, num_chunks = (ladder[-1] for ladder in ladders)
        return StepSize(num_tokens, num_decodes, num_chunks, is_fresh=False)

    def is_captured(self, size: StepSize) -> bool:
        return (size, True) in self._captured

    def find_size(self, plan: StepPlan) -> StepSize | None:
        """The smallest graph that holds the step, if there is one."""
        num_chunks = len(plan.rows) - plan.num_decodes
        num_tokens = next_size(self.token_ladder, plan.num_tokens)
        decodes = next_size(self.decode_ladder, len(plan.rows) if plan.num_decodes else 0)
        chunks = next_size(self.chunk_ladder, num_chunks)
        if num_tokens is None or decodes is None or chunks is None:
            return None
        return StepSize(num_tokens, decodes, chunks, is_fresh(plan))

    def try_replay(self, plan: StepPlan, *, greedy: bool) -> GraphStep | None:
        """Queue the step; None if it is larger than any graph. Results are of the sampling rows."""
        size = self.find_size(plan)
        if size is None:
            return None
        captured = self._captured.get((size, greedy)) or self.capture(size, greedy=greedy)
        captured.packed.copy_(to_device(self._pack(plan, size), self._rows.device))
        captured.graph.replay()
        result = captured.result[: int(plan.samples.sum())]
        return GraphStep(result, None) if greedy else GraphStep(None, result)

    def capture(self, size: StepSize, *, greedy: bool = True) -> _Chunks:
        scratch = self._rows.scratch
        fills = (scratch, 0, 0, 0, 0, scratch, 0, 0, scratch)
        blank = [np.full(n, fill, np.int64) for n, fill in zip(size.layout, fills, strict=True)]
        packed = to_device(np.concatenate(blank), self._rows.device)
        graph, result = self._capturer.capture(lambda: self._step(packed, size, greedy=greedy))
        captured = self._captured[size, greedy] = _Chunks(graph, packed, result)
        return captured

    def _pack(self, plan: StepPlan, size: StepSize) -> npt.NDArray[np.int64]:
        scratch, used, num_decodes = self._rows.scratch, plan.num_tokens, plan.num_decodes
        ends = np.cumsum(plan.chunk_lens)
        seq_index = np.repeat(np.arange(len(plan.rows)), plan.chunk_lens)
        first = (ends - plan.chunk_lens)[seq_index]
        token_ids = np.zeros(size.num_tokens, np.int64)
        token_ids[:num_decodes] = -1  # on the device: the row's last token
        token_ids[num_decodes:used] = plan.token_ids
        starts = np.full(size.num_seqs + 1, used, np.int64)
        starts[: num_decodes + 1] = np.arange(num_decodes + 1)
        starts[num_decodes + 1 : size.num_decodes + 1] = num_decodes
        chunk_ends = ends[num_decodes:]
        starts[size.num_decodes + 1 :][: len(chunk_ends)] = chunk_ends
        positions = plan.starts[seq_index] + np.arange(used) - first
        seq_lens = plan.starts + plan.chunk_lens
        return np.concatenate(
            [
                _padded(plan.rows[seq_index], size.num_tokens, scratch),
                _padded(positions, size.num_tokens, 0),
                token_ids,
                starts,
                _spread(seq_lens, num_decodes, size, 0),
                _spread(plan.rows, num_decodes, size, scratch),
                _padded((ends - 1)[plan.samples], size.num_samples, 0),
                _padded(seq_lens[plan.samples], size.num_samples, 0),
                _padded(plan.rows[plan.samples], size.num_samples, scratch),
            ]
        )

    def _step(self, packed: torch.Tensor, size: StepSize, *, greedy: bool) -> torch.Tensor:
        model, state, block_size = self._model, self._rows, self._model.block_size
        token_rows, positions, ids, starts, seq_lens, seq_rows, *sampled = torch.split(
            packed, size.layout
        )
        sample_tokens, sample_lens, sample_rows = sampled
        blocks = state.block_tables[token_rows, positions // block_size].to(torch.int64)
        batch = AttentionBatch(
            slot_mapping=blocks * block_size + positions % block_size,
            query_starts=starts.to(torch.int32),
            seq_lens=seq_lens.to(torch.int32),
            block_tables=state.block_tables[seq_rows],
            num_decodes=size.num_decodes,
            max_query_len=size.num_tokens,
            max_seq_len=model.max_seq_len,
            query_lens=(0,) * size.num_decodes + (size.num_tokens,) * size.num_chunks,
            host_seq_lens=(model.max_seq_len,) * size.num_seqs,
            is_fresh=size.is_fresh,
        )
        last_batch = last_layer_batch(
            batch.slot_mapping,
            sample_tokens,
            sample_lens.to(torch.int32),
            state.block_tables[sample_rows],
            (model.max_seq_len,) * size.num_samples,
        )
        token_ids = torch.where(ids < 0, state.last_token_ids[token_rows], ids)
        hidden = model.forward(token_ids, positions, batch, last_batch)
        state.num_computed[seq_rows] = seq_lens
        return model.finish(hidden, sample_rows, greedy=greedy)


def _padded(values: npt.NDArray[Any], length: int, fill: int) -> npt.NDArray[np.int64]:
    padded = np.full(length, fill, np.int64)
    padded[: len(values)] = values
    return padded


def _spread(
    values: npt.NDArray[Any], num_decodes: int, size: StepSize, fill: int
) -> npt.NDArray[np.int64]:
    """Values of the step's sequences, decodes and chunks padded each."""
    decodes = _padded(values[:num_decodes], size.num_decodes, fill)
    return np.concatenate([decodes, _padded(values[num_decodes:], size.num_chunks, fill)])

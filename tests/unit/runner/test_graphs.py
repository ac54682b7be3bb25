"""Graph steps against `build_inputs`: the same tokens, contexts and results, whatever the padding.

In place of a GPU stands a capturer whose replay calls the captured function again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.attention.base import AttentionBatch
from octavo.runner.chunk_graphs import ChunkGraphs
from octavo.runner.graphs import DecodeGraphs, Forward, StepModel
from octavo.runner.inputs import build_inputs
from octavo.runner.prefixes import CommonPrefix
from octavo.runner.rows import DeviceRows
from octavo.sched.plan import StepPlan

NUM_ROWS, BLOCK, MAX_LEN = 6, 4, 40


class Again:
    """A graph that is only a function."""

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        self._function = function
        self.result = function().clone()

    def replay(self) -> None:
        self.result.copy_(self._function())


class FakeCapturer:
    def capture(self, function: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
        graph = Again(function)
        return graph, graph.result


def context_of(batch: AttentionBatch, seq: int) -> int:
    """What a sequence's tokens could see, hashed."""
    seq_len = int(batch.seq_lens[seq])
    blocks = batch.block_tables[seq, : -(-seq_len // BLOCK)].to(torch.int64)
    return int((blocks * torch.arange(1, len(blocks) + 1)).sum()) + 7919 * seq_len


def forward(
    ids: torch.Tensor,
    positions: torch.Tensor,
    batch: AttentionBatch,
    last: AttentionBatch | None = None,
) -> torch.Tensor:
    """[num_queries, 4]: what a token could see in the last layer, and what it is and where it went;
    -1 where attention would be undefined.
    """
    hidden = torch.full((len(ids), 4), -1, dtype=torch.int64)
    starts, lens = batch.query_starts.tolist(), batch.seq_lens.tolist()
    for i, seq_len in enumerate(lens):
        if i < batch.num_decodes:
            tokens = range(i, i + 1) if seq_len else range(0)
        else:
            tokens = range(starts[i], starts[i + 1])
        for token in tokens:
            hidden[token, 0] = ids[token]
            hidden[token, 1] = positions[token]
            hidden[token, 2] = context_of(batch, i)
            hidden[token, 3] = batch.slot_mapping[token]
    if last is None:
        return hidden
    assert last.num_decodes == len(last.query_lens) == len(last.seq_lens)
    assert last.slot_mapping is batch.slot_mapping
    hidden = last.pick(hidden)
    for i in range(len(hidden)):
        hidden[i, 2] = context_of(last, i)
    return hidden


def pick(hidden: torch.Tensor) -> torch.Tensor:
    return (hidden.sum(dim=1) * 31) % 97


def model_of(rows: DeviceRows, run: Forward = forward) -> StepModel:
    return StepModel(run, pick, rows, BLOCK, MAX_LEN)


def device_rows(seed: int) -> DeviceRows:
    rows = DeviceRows(NUM_ROWS, MAX_LEN // BLOCK, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    rows.block_tables[:NUM_ROWS].random_(1, 1000, generator=generator)
    rows.last_token_ids.random_(0, 100, generator=generator)
    return rows


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Decodes and at least one chunk."""
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, unique=True))
    num_decodes = draw(st.integers(0, len(rows) - 1))
    lens = [1] * num_decodes + [draw(st.integers(1, 12)) for _ in rows[num_decodes:]]
    starts = [draw(st.integers(0, MAX_LEN - n)) for n in lens]
    samples = [i < num_decodes or draw(st.booleans()) for i in range(len(rows))]
    num_known = sum(lens[num_decodes:])
    return StepPlan(
        step=0,
        rows=np.array(rows, np.int32),
        starts=np.array(starts, np.int32),
        chunk_lens=np.array(lens, np.int32),
        samples=np.array(samples),
        num_decodes=num_decodes,
        token_ids=np.array(
            draw(st.lists(st.integers(0, 99), min_size=num_known, max_size=num_known)), np.int32
        ),
    )


@given(plans(), st.integers(0, 5))
def test_steps_with_chunks(plan: StepPlan, seed: int) -> None:
    plain, state = device_rows(seed), device_rows(seed)
    inputs = build_inputs(plan, plain, BLOCK, want_all=True)
    assert inputs.last_batch is None
    expected = forward(inputs.token_ids, inputs.positions, inputs.batch)[inputs.sample_indices]
    fewer = build_inputs(plan, plain, BLOCK)
    hidden = forward(fewer.token_ids, fewer.positions, fewer.batch, fewer.last_batch)
    assert hidden[fewer.sample_indices].tolist() == expected.tolist()
    plain.num_computed[inputs.seq_rows] = inputs.seq_lens
    graphs = ChunkGraphs(model_of(state), FakeCapturer(), 96)
    step = graphs.try_replay(plan, greedy=False)
    assert step is not None
    assert step.hidden is not None
    assert step.hidden.tolist() == expected.tolist()
    step = graphs.try_replay(plan, greedy=True)
    assert step is not None
    assert step.token_ids is not None
    assert step.token_ids.tolist() == pick(expected).tolist()
    assert state.num_computed[:NUM_ROWS].tolist() == plain.num_computed[:NUM_ROWS].tolist()
    plain.last_token_ids[inputs.sample_rows] = step.token_ids
    assert state.last_token_ids[:NUM_ROWS].tolist() == plain.last_token_ids[:NUM_ROWS].tolist()


def test_a_step_too_large_for_any_graph() -> None:
    graphs = ChunkGraphs(model_of(device_rows(0)), FakeCapturer(), 16)
    plan = StepPlan(
        step=0,
        rows=np.array([1], np.int32),
        starts=np.array([0], np.int32),
        chunk_lens=np.array([17], np.int32),
        samples=np.array([True]),
        num_decodes=0,
        token_ids=np.zeros(17, np.int32),
    )
    assert graphs.try_replay(plan, greedy=True) is None


@given(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, unique=True), st.booleans())
def test_decode_steps(rows: list[int], is_shared: bool) -> None:
    state = device_rows(1)
    state.num_computed[:NUM_ROWS] = torch.arange(NUM_ROWS) * 3
    wanted = np.array(rows, np.int32)
    before = state.last_token_ids.clone()
    members = np.array([row % 2 == 0 for row in rows])
    prefix = CommonPrefix(rows[0], 2 * BLOCK, members) if is_shared else None
    seen: list[AttentionBatch] = []

    def watched(
        ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        last: AttentionBatch | None,
    ) -> torch.Tensor:
        seen.append(batch)
        return forward(ids, positions, batch, last)

    graphs = DecodeGraphs(model_of(state, watched), FakeCapturer())
    for moved in range(2):
        step = graphs.replay(wanted, greedy=False, prefix=prefix)
        assert step.hidden is not None
        assert step.hidden[:, 0].tolist() == before[rows].tolist()
        assert step.hidden[:, 1].tolist() == [3 * row + moved for row in rows]
    shared = seen[-1].shared
    assert (shared is not None) == is_shared
    if shared is not None:
        lens = [2 * BLOCK * member for member in members.tolist()]
        assert shared.lens.tolist()[: len(rows)] == lens
        assert shared.length.tolist() == [2 * BLOCK]
        assert shared.block_table.tolist() == state.block_tables[rows[0]].tolist()

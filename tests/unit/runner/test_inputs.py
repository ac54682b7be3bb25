"""`build_inputs` against the same thing written as a plain loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.runner.inputs import build_inputs
from octavo.runner.rows import DeviceRows
from octavo.sched.plan import RowAdmission, StepPlan
from octavo.types import EngineRequest, SamplingParams

NUM_ROWS, BLOCK, MAX_LEN = 6, 4, 40


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    """Any rows, decodes first, with chunks anywhere in their sequences."""
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, unique=True))
    num_decodes = draw(st.integers(0, len(rows)))
    lens = [1] * num_decodes + [draw(st.integers(1, 12)) for _ in rows[num_decodes:]]
    starts = [draw(st.integers(0, MAX_LEN - n)) for n in lens]
    num_known = sum(lens[num_decodes:])
    return StepPlan(
        step=0,
        rows=np.array(rows, np.int32),
        starts=np.array(starts, np.int32),
        chunk_lens=np.array(lens, np.int32),
        samples=np.array([draw(st.booleans()) for _ in rows]),
        num_decodes=num_decodes,
        token_ids=np.array(
            draw(st.lists(st.integers(0, 99), min_size=num_known, max_size=num_known)), np.int32
        ),
    )


def device_rows(seed: int) -> DeviceRows:
    rows = DeviceRows(NUM_ROWS, MAX_LEN // BLOCK, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    rows.block_tables.random_(1, 1000, generator=generator)
    rows.last_token_ids.random_(0, 100, generator=generator)
    rows.prompt_lens[:] = torch.randint(1, MAX_LEN, rows.prompt_lens.shape, generator=generator)
    return rows


@given(plans(), st.integers(0, 5))
def test_inputs_are_those_of_a_plain_loop(plan: StepPlan, seed: int) -> None:
    rows = device_rows(seed)
    inputs = build_inputs(plan, rows, BLOCK)
    token_ids, positions, slots, query_starts = [], [], [], [0]
    samples, sample_rows, seq_lens = [], [], []
    host_ids = iter(plan.token_ids.tolist())
    for i, row in enumerate(plan.rows.tolist()):
        start, length = int(plan.starts[i]), int(plan.chunk_lens[i])
        for position in range(start, start + length):
            is_decode = i < plan.num_decodes
            token_ids.append(int(rows.last_token_ids[row]) if is_decode else next(host_ids))
            positions.append(position)
            block = int(rows.block_tables[row, position // BLOCK])
            slots.append(block * BLOCK + position % BLOCK)
        query_starts.append(len(token_ids))
        seq_lens.append(start + length)
        if plan.samples[i]:
            samples.append(len(token_ids) - 1)
            sample_rows.append(row)
    assert inputs.token_ids.tolist() == token_ids
    assert inputs.positions.tolist() == positions
    last = inputs.last_batch
    if last is None:
        assert inputs.sample_indices.tolist() == samples
    else:
        assert inputs.sample_indices == slice(len(samples))
        assert last.queries.tolist() == (samples or [len(token_ids) - 1])
    assert inputs.sample_rows.tolist() == sample_rows
    assert inputs.seq_rows.tolist() == plan.rows.tolist()
    assert inputs.batch.prompt_lens == tuple(rows.prompt_lens[plan.rows].tolist())
    if last is not None:
        sampled = plan.rows[plan.samples] if samples else plan.rows[-1:]
        assert last.prompt_lens == tuple(rows.prompt_lens[sampled].tolist())
    assert inputs.seq_lens.tolist() == seq_lens
    batch = inputs.batch
    assert batch.slot_mapping.tolist() == slots
    assert batch.query_starts.tolist() == query_starts
    assert batch.seq_lens.tolist() == seq_lens
    assert batch.num_decodes == plan.num_decodes
    assert batch.max_query_len == max(plan.chunk_lens)
    assert batch.max_seq_len == max(seq_lens)
    assert batch.query_lens == tuple(plan.chunk_lens)
    assert batch.host_seq_lens == tuple(seq_lens)
    assert batch.slot_mapping.dtype == inputs.token_ids.dtype == torch.int64
    num_blocks = -(-max(seq_lens) // BLOCK)
    expected = rows.block_tables[plan.rows.tolist(), :num_blocks]
    assert torch.equal(batch.block_tables, expected)


def test_rows_take_over_a_plans_block_updates() -> None:
    rows = device_rows(0)
    before = rows.block_tables.clone()
    plan = StepPlan.of_changes(
        block_rows=np.array([2, 2, 5], np.int32),
        block_cols=np.array([0, 1, 9], np.int32),
        block_ids=np.array([7, 8, 9], np.int32),
    )
    rows.update(plan)
    before[2, 0], before[2, 1], before[5, 9] = 7, 8, 9
    assert torch.equal(rows.block_tables, before)
    assert plan.num_tokens == 0


def test_the_scratch_row_points_at_block_0() -> None:
    rows = DeviceRows(3, 4, torch.device("cpu"))
    assert rows.scratch == 3
    assert not rows.block_tables[rows.scratch].any()


def test_a_row_knows_how_long_its_prompt_is():
    """Also when its request comes back with what it had generated, and when another takes it."""
    rows = DeviceRows(NUM_ROWS, 4, torch.device("cpu"))

    def admit(num_prompt: int, outputs: tuple[int, ...]) -> None:
        request = EngineRequest(
            request_id=1,
            prompt_token_ids=tuple(range(num_prompt)),
            params=SamplingParams(),
            max_total_len=40,
        )
        none = np.empty(0, np.int32)
        plan = StepPlan(
            step=0, rows=none, starts=none, chunk_lens=none, samples=np.empty(0, np.bool_),
            num_decodes=0, token_ids=none, admitted=(RowAdmission(2, request, outputs),),
        )  # fmt: skip
        rows.update(plan)

    admit(7, (1, 2, 3))
    assert rows.prompt_lens.tolist() == [0, 0, 7] + [0] * (NUM_ROWS - 2)
    admit(3, ())
    assert rows.prompt_lens[2] == 3

"""A runner without a device: a paged cache of token ids, checked at every access.

It keeps real rows, real block tables and a real (tiny) cache, and derives each sampled token from
the whole context as it reads it back *through the block table*. If scheduler or cache ever mixed up
blocks, a request's stream would differ from `expected_tokens`, which needs neither.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np

from octavo.sched.plan import StepPlan, StepResult
from octavo.types import EngineRequest

EMPTY = -1
VOCAB = 50


def next_token(seed: int, context: list[int]) -> int:
    data = np.array([seed % 2**31, *context], np.int64).tobytes()
    return zlib.crc32(data) % VOCAB


def expected_tokens(request: EngineRequest) -> tuple[list[int], str]:
    """What the request must receive, whatever else runs, and how it must end."""
    context = list(request.prompt_token_ids)
    out: list[int] = []
    while True:
        out.append(next_token(request.seed, context))
        context.append(out[-1])
        if out[-1] in request.stop_token_ids:
            return out, "stop"
        if len(context) >= request.max_total_len:
            return out, "length"


@dataclass
class Row:
    request: EngineRequest
    blocks: dict[int, int] = field(default_factory=dict)
    last_token: int = EMPTY


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.cache = np.full((num_blocks, block_size), EMPTY, np.int64)
        self.rows: dict[int, Row] = {}
        self.num_steps = 0

    def execute(self, plan: StepPlan) -> StepResult:
        self.num_steps += 1
        for row in plan.freed_rows:
            self.rows.pop(row, None)
        for admission in plan.admitted:
            assert admission.row not in self.rows, "a row with two tenants"
            self.rows[admission.row] = Row(admission.request)
        updates = zip(plan.block_rows, plan.block_cols, plan.block_ids, strict=True)
        for row, col, block_id in updates:
            assert block_id != 0
            self.rows[int(row)].blocks[int(col)] = int(block_id)
        self._write(plan)
        tokens = [self._sample(plan, i) for i in np.flatnonzero(plan.samples)]
        return StepResult(np.array(tokens, np.int32))

    def _write(self, plan: StepPlan) -> None:
        """All keys and values first, as each layer does."""
        assert len(set(plan.rows.tolist())) == len(plan.rows), "a row twice in one plan"
        written: set[tuple[int, int]] = set()
        offset = 0
        for i, row_id in enumerate(plan.rows.tolist()):
            row, start, length = self.rows[row_id], int(plan.starts[i]), int(plan.chunk_lens[i])
            assert length >= 1
            if i < plan.num_decodes:
                assert length == 1
                assert row.last_token != EMPTY, "nothing was sampled in this row yet"
                tokens = [row.last_token]
            else:
                tokens = plan.token_ids[offset : offset + length].tolist()
                offset += length
            for position, token in enumerate(tokens, start):
                block = row.blocks[position // self.block_size]
                slot = (block, position % self.block_size)
                assert slot not in written, "a slot with two writers in one step"
                written.add(slot)
                self.cache[slot] = token
        assert offset == len(plan.token_ids)

    def _sample(self, plan: StepPlan, i: int) -> int:
        row = self.rows[int(plan.rows[i])]
        end = int(plan.starts[i] + plan.chunk_lens[i])
        context = [
            int(self.cache[row.blocks[p // self.block_size], p % self.block_size])
            for p in range(end)
        ]
        prompt = list(row.request.prompt_token_ids)
        assert context[: len(prompt)] == prompt[: len(context)], "the cache holds another's tokens"
        row.last_token = next_token(row.request.seed, context)
        return row.last_token

"""A dump may come from anywhere, and a runner writes where a plan tells it: nothing is replayed
before every row, block, position and token of it was found within the engine's own limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from octavo.sched.plan import RowSnapshot, StepPlan
from octavo.types import EngineInfo, EngineRequest

_MOST = 1 << 31


class BadRecordingError(Exception):
    """What is wrong with a recording, without the file's name."""


def int32_array(name: str, data: bytes) -> np.ndarray[Any, np.dtype[np.int32]]:
    if len(data) % 4:
        raise BadRecordingError(f"{name} is cut")
    return np.frombuffer(data, "<i4").astype(np.int32)


class RecordingCheck:
    """Follows a recording from its first rows on, plan by plan.

    Every method raises BadRecordingError.
    """

    def __init__(self, info: EngineInfo, rows: Iterable[RowSnapshot]) -> None:
        self._info = info
        sizes = (info.max_model_len, info.vocab_size, info.block_size, info.num_blocks)
        _within("a limit", (*sizes, info.max_num_seqs, info.max_num_batched_tokens), 1, _MOST)
        self._num_columns = -(-info.max_model_len // info.block_size)
        self._occupied: set[int] = set()
        for state in rows:
            self._admit(state.row, state.request, state.output_token_ids)
            num_tokens = len(state.request.prompt_token_ids) + len(state.output_token_ids)
            _within("num_computed", [state.num_computed], 0, num_tokens + 1)
            _within("a number of blocks", [len(state.block_ids)], 0, self._num_columns + 1)
            _within("a block", state.block_ids, 1, info.num_blocks + 1)

    def plan(self, plan: StepPlan) -> None:
        """The next plan."""
        info = self._info
        _within("a row", plan.freed_rows, 0, info.max_num_seqs)
        self._occupied -= set(plan.freed_rows)
        for admission in plan.admitted:
            self._admit(admission.row, admission.request, admission.output_token_ids)
        # A row may be nobody's: one that ended while the plan was in flight, before the recording
        # began. `replay` leaves it out.
        _within("a row", plan.rows, 0, info.max_num_seqs)
        _within("a row", plan.block_rows, 0, info.max_num_seqs)
        num_rows = len(plan.rows)
        if len(set(plan.rows.tolist())) != num_rows:
            raise BadRecordingError("a row twice in one step")
        lengths = {len(plan.starts), len(plan.chunk_lens), len(plan.samples)}
        if lengths != {num_rows} or not len(plan.block_rows) == len(plan.block_cols) == len(
            plan.block_ids
        ):
            raise BadRecordingError("arrays of different lengths")
        _within("num_decodes", [plan.num_decodes], 0, num_rows + 1)
        _within("a block's column", plan.block_cols, 0, self._num_columns)
        _within("a block", plan.block_ids, 1, info.num_blocks + 1)
        _within("a token", plan.token_ids, 0, info.vocab_size)
        self._check_chunks(plan)

    def tokens(self, plan: StepPlan, token_ids: Sequence[int]) -> None:
        """What a plan has sampled."""
        if len(token_ids) != int(plan.samples.sum()):
            raise BadRecordingError("more or fewer tokens than were sampled")
        _within("a token", token_ids, 0, self._info.vocab_size)

    def _check_chunks(self, plan: StepPlan) -> None:
        info = self._info
        _within("a chunk's length", plan.chunk_lens, 1, info.max_num_batched_tokens + 1)
        _within("a chunk's start", plan.starts, 0, info.max_model_len)
        ends = plan.starts.astype(np.int64) + plan.chunk_lens
        _within("a chunk's end", ends, 1, info.max_model_len + 1)
        _within("a decode's length", plan.chunk_lens[: plan.num_decodes], 1, 2)
        num_prompt_tokens = int(plan.chunk_lens[plan.num_decodes :].sum(dtype=np.int64))
        if num_prompt_tokens != len(plan.token_ids):
            raise BadRecordingError("more or fewer tokens than its chunks have")
        _within("the size of a step", [plan.num_tokens], 0, info.max_num_batched_tokens + 1)

    def _admit(self, row: int, request: EngineRequest, output_token_ids: Sequence[int]) -> None:
        info, params = self._info, request.params
        _within("a row", [row], 0, info.max_num_seqs)
        if row in self._occupied:
            raise BadRecordingError("a row with two owners")
        self._occupied.add(row)
        num_tokens = len(request.prompt_token_ids) + len(output_token_ids)
        _within("a request's length", [num_tokens], 1, info.max_model_len + 1)
        _within("a seed", [request.seed], 0, 1 << 63)
        bias: Mapping[int, float] = params.logit_bias or {}
        for token_ids in (
            *(request.prompt_token_ids, output_token_ids, request.stop_token_ids, tuple(bias)),
            *((params.allowed_token_ids or ()), (params.stop_token_ids or ())),
            *request.bad_words_token_ids,
        ):
            _within("a token", token_ids, 0, info.vocab_size)


def _within(what: str, values: Any, low: int, end: int) -> None:
    """All of a sequence or array in [low, end)?"""
    if len(values) and not (low <= min(values) and max(values) < end):
        raise BadRecordingError(f"{what} out of range")

"""Run a flight recording again: the same plans, on a fresh runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from octavo.engine.core import Runner
from octavo.engine.recording import Recording
from octavo.sched.plan import RowAdmission, RowSnapshot, StepPlan

_NONE = np.empty(0, np.int32)


class RestorableRunner(Runner, Protocol):
    def set_last_tokens(self, rows: Sequence[int], token_ids: Sequence[int]) -> None:
        """The rows' next input tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Difference:
    """A token that came out otherwise than it was recorded."""

    step: int
    request_id: int
    recorded: int
    replayed: int


@dataclass(slots=True)
class Outcome:
    num_steps: int = 0
    num_tokens: int = 0  # compared
    differences: list[Difference] = field(default_factory=list)


class Replay:
    """Brings `runner` to where the recording begins, then runs its steps one by one.

    A fresh runner's cache is empty, so every position that a plan takes for computed is computed
    first: the content of a block depends on the tokens before it, not on who computed it. The
    inputs of later steps are the recorded tokens, whatever comes out.
    """

    def __init__(self, recording: Recording, runner: RestorableRunner, max_tokens: int) -> None:
        """`max_tokens` is the largest step that the runner takes."""
        self._recording = recording
        self._runner = runner
        self._max_tokens = max_tokens
        self._request_ids: dict[int, int] = {}  # by row
        self._outcome = Outcome()

    def run(self, before_step: Callable[[StepPlan, bool], None]) -> Outcome:
        """`before_step` is called with each plan and whether its result is known. The last plans
        of a crash have none; running them may well end this process, too.
        """
        self._enter(self._recording.rows)
        for step in self._recording.steps:
            before_step(step.plan, step.token_ids is not None)
            token_ids = self._run(step.plan)
            self._outcome.num_steps += 1
            if step.token_ids is not None:
                self._compare(step.plan, step.token_ids, token_ids)
        return self._outcome

    def _enter(self, rows: Iterable[RowSnapshot]) -> None:
        for state in rows:
            admission = RowAdmission(state.row, state.request, state.output_token_ids)
            token_ids = self._admit(admission)
            deltas = StepPlan(
                step=-1,
                rows=_NONE,
                starts=_NONE,
                chunk_lens=_NONE,
                samples=np.empty(0, np.bool_),
                num_decodes=0,
                token_ids=_NONE,
                admitted=(admission,),
                block_rows=np.full(len(state.block_ids), state.row, np.int32),
                block_cols=np.arange(len(state.block_ids), dtype=np.int32),
                block_ids=np.array(state.block_ids, np.int32),
            )
            self._compute(deltas, state.row, token_ids[: state.num_computed])
            if state.num_computed < len(token_ids):
                self._runner.set_last_tokens([state.row], [int(token_ids[state.num_computed])])

    def _run(self, plan: StepPlan) -> list[int]:
        starts = dict(zip(plan.rows.tolist(), plan.starts.tolist(), strict=True))
        for admission in plan.admitted:
            token_ids = self._admit(admission)
            if num_found := starts.get(admission.row, 0):  # in the prefix cache, then
                self._compute(plan, admission.row, token_ids[:num_found])
                plan = _without_deltas(plan)
        result = self._runner.submit(plan).wait()
        return [int(token_id) for token_id in result.token_ids]

    def _admit(self, admission: RowAdmission) -> npt.NDArray[np.int32]:
        self._request_ids[admission.row] = admission.request.request_id
        token_ids = admission.request.prompt_token_ids + admission.output_token_ids
        return np.array(token_ids, np.int32)

    def _compute(self, deltas: StepPlan, row: int, token_ids: npt.NDArray[np.int32]) -> None:
        """Apply the deltas of a plan, then compute the row's first positions."""
        for start in range(0, len(token_ids), self._max_tokens):
            piece = token_ids[start : start + self._max_tokens]
            chunk = dataclasses.replace(
                deltas,
                rows=np.array([row], np.int32),
                starts=np.array([start], np.int32),
                chunk_lens=np.array([len(piece)], np.int32),
                samples=np.zeros(1, np.bool_),
                num_decodes=0,
                token_ids=piece,
            )
            self._runner.submit(chunk).wait()
            deltas = _without_deltas(deltas)

    def _compare(self, plan: StepPlan, recorded: list[int], replayed: list[int]) -> None:
        rows = plan.rows[plan.samples].tolist()
        self._runner.set_last_tokens(rows, recorded)
        self._outcome.num_tokens += len(rows)
        self._outcome.differences += [
            Difference(plan.step, self._request_ids[row], old, new)
            for row, old, new in zip(rows, recorded, replayed, strict=True)
            if old != new
        ]


def _without_deltas(plan: StepPlan) -> StepPlan:
    return dataclasses.replace(
        plan, freed_rows=(), admitted=(), block_rows=_NONE, block_cols=_NONE, block_ids=_NONE
    )

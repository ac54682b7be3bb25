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
from octavo.errors import ConfigError
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


@dataclass(slots=True)
class _Tenant:
    """A row's request, and how far this runner has got with it."""

    request_id: int
    token_ids: npt.NDArray[np.int32]  # known when it took the row
    num_computed: int = 0


class Replay:
    """Brings `runner` to where the recording begins, then runs its steps one by one.

    A fresh runner's cache is empty, so before a plan runs, every position is computed that it
    takes for computed: before the recording began, or for another request with that prefix. The
    content of a block depends on the tokens before it, not on who computed it; on AMX it does to
    within rounding, since an answer that became a prompt is computed as one here. The inputs of
    later steps are the recorded tokens, whatever comes out.
    """

    def __init__(self, recording: Recording, runner: RestorableRunner, max_tokens: int) -> None:
        """`max_tokens` is the largest step that the runner takes."""
        self._recording = recording
        self._runner = runner
        self._max_tokens = max_tokens
        self._tenants: dict[int, _Tenant] = {}  # by row
        self._outcome = Outcome()

    def run(self, before_step: Callable[[StepPlan, bool], None]) -> Outcome:
        """`before_step` is called with each plan and whether its result is known. The last plans
        of a crash have none; running them may well end this process, too.

        Raises:
            ConfigError: a plan takes positions for computed that nobody can compute.
        """
        beginning = _deltas_of(self._recording.rows)
        for step in self._recording.steps:
            before_step(step.plan, step.token_ids is not None)
            plan = _with_deltas(step.plan, beginning)
            beginning = StepPlan.of_changes()
            self._run(plan, step.token_ids)
            self._outcome.num_steps += 1
        return self._outcome

    def _run(self, plan: StepPlan, recorded: Sequence[int] | None) -> None:
        for row in plan.freed_rows:
            self._tenants.pop(row, None)
        for admission in plan.admitted:
            token_ids = admission.request.prompt_token_ids + admission.output_token_ids
            self._tenants[admission.row] = _Tenant(
                admission.request.request_id, np.array(token_ids, np.int32)
            )
        # A row that ended while this plan was in flight, before the recording began, is nobody's.
        keep = np.array([row in self._tenants for row in plan.rows.tolist()], np.bool_)
        if recorded is not None:
            recorded = [
                token_id
                for token_id, kept in zip(recorded, keep[plan.samples], strict=True)
                if kept
            ]
        owned = np.array([row in self._tenants for row in plan.block_rows.tolist()], np.bool_)
        plan = _only(plan, keep, owned)
        if len(plan.rows):
            plan = self._catch_up(plan)
            result = self._runner.submit(plan).wait()
            if recorded is not None:
                self._compare(plan, recorded, result.token_ids.tolist())

    def _catch_up(self, plan: StepPlan) -> StepPlan:
        """Compute what the plan takes for computed; the plan, less the changes that this took."""
        rows = zip(plan.rows.tolist(), plan.starts.tolist(), plan.chunk_lens.tolist(), strict=True)
        for row, start, length in rows:
            tenant = self._tenants[row]
            if start > max(tenant.num_computed, len(tenant.token_ids)):
                raise ConfigError(
                    f"The recording is not an engine's: step {plan.step} goes on from position "
                    f"{start} of a request whose tokens up to there it does not hold."
                )
            if tenant.num_computed < start:
                plan = self._compute(plan, row, tenant, start)
                if start < len(tenant.token_ids):
                    self._runner.set_last_tokens([row], [int(tenant.token_ids[start])])
            tenant.num_computed = start + length
        return plan

    def _compute(self, plan: StepPlan, row: int, tenant: _Tenant, end: int) -> StepPlan:
        while tenant.num_computed < end:
            start = tenant.num_computed
            piece = tenant.token_ids[start : min(end, start + self._max_tokens)]
            chunk = dataclasses.replace(
                plan,
                rows=np.array([row], np.int32),
                starts=np.array([start], np.int32),
                chunk_lens=np.array([len(piece)], np.int32),
                samples=np.zeros(1, np.bool_),
                num_decodes=0,
                token_ids=piece,
            )
            self._runner.submit(chunk).wait()
            tenant.num_computed += len(piece)
            plan = _without_deltas(plan)
        return plan

    def _compare(self, plan: StepPlan, recorded: Sequence[int], replayed: Sequence[int]) -> None:
        rows = plan.rows[plan.samples].tolist()
        self._runner.set_last_tokens(rows, recorded)
        self._outcome.num_tokens += len(rows)
        self._outcome.differences += [
            Difference(plan.step, self._tenants[row].request_id, old, new)
            for row, old, new in zip(rows, recorded, replayed, strict=True)
            if old != new
        ]


def _deltas_of(rows: Iterable[RowSnapshot]) -> StepPlan:
    """The admissions and block tables that make a fresh runner's rows these."""
    rows = list(rows)
    none: list[npt.NDArray[np.int32]] = [_NONE]
    tables = [np.array(row.block_ids, np.int32) for row in rows]
    return StepPlan.of_changes(
        admitted=tuple(RowAdmission(r.row, r.request, r.output_token_ids) for r in rows),
        block_rows=np.concatenate(
            none + [np.full(len(t), r.row, np.int32) for r, t in zip(rows, tables, strict=True)]
        ),
        block_cols=np.concatenate(none + [np.arange(len(t), dtype=np.int32) for t in tables]),
        block_ids=np.concatenate(none + tables),
    )


def _with_deltas(plan: StepPlan, before: StepPlan) -> StepPlan:
    """`plan` with the admissions and block updates of `before` done first, but for rows that it
    frees.
    """
    freed = set(plan.freed_rows)
    kept = np.array([row not in freed for row in before.block_rows.tolist()], np.bool_)
    return dataclasses.replace(
        plan,
        admitted=tuple(a for a in before.admitted if a.row not in freed) + plan.admitted,
        block_rows=np.concatenate([before.block_rows[kept], plan.block_rows]),
        block_cols=np.concatenate([before.block_cols[kept], plan.block_cols]),
        block_ids=np.concatenate([before.block_ids[kept], plan.block_ids]),
    )


def _only(plan: StepPlan, keep: npt.NDArray[np.bool_], owned: npt.NDArray[np.bool_]) -> StepPlan:
    """The chunks of a plan that `keep` names, and the block updates that `owned` names."""
    if keep.all() and owned.all():
        return plan
    chunks = np.split(plan.token_ids, np.cumsum(plan.chunk_lens[plan.num_decodes :])[:-1])
    kept = [c for c, k in zip(chunks, keep[plan.num_decodes :], strict=False) if k]
    return dataclasses.replace(
        plan,
        rows=plan.rows[keep],
        starts=plan.starts[keep],
        chunk_lens=plan.chunk_lens[keep],
        samples=plan.samples[keep],
        num_decodes=int(keep[: plan.num_decodes].sum()),
        token_ids=np.concatenate([_NONE, *kept]),
        block_rows=plan.block_rows[owned],
        block_cols=plan.block_cols[owned],
        block_ids=plan.block_ids[owned],
    )


def _without_deltas(plan: StepPlan) -> StepPlan:
    return dataclasses.replace(
        plan, freed_rows=(), admitted=(), block_rows=_NONE, block_cols=_NONE, block_ids=_NONE
    )

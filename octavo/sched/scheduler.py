"""The scheduler: decides what the next step runs, and takes in what it brought.

There is no prefill phase and no decode phase. Each running request has tokens still to compute, and
a step has a token budget. Prompts in chunks, prefix hits and preemption by recompute are cases of
that one rule.

Order is deterministic: rows ascend, the waiting queue has a total order, nothing depends on sets or
addresses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from octavo.config import SchedulerConfig
from octavo.kvcache import KVCache
from octavo.sched.deadlines import Deadlines
from octavo.sched.delta import PlanDelta, StatsDelta
from octavo.sched.plan import BoolArray, Int32Array, RowAdmission, RowSnapshot, StepPlan, StepResult
from octavo.sched.request import Request, Status
from octavo.sched.rows import RowTable
from octavo.sched.share import share_prefill_budget
from octavo.sched.waiting_queue import WaitingQueue
from octavo.types import (
    EngineRequest,
    Finish,
    FinishReason,
    Started,
    StepOutputs,
    StepStats,
    TokenLogprobs,
)

# A prompt that is being computed counts against admission with at most this share of the budget, so
# that short prompts are let in behind long ones.
_ADMISSION_SHARE = 8
# While others run, admission leaves this share of the cache free for them to grow into.
_WATERMARK = 0.01


class _Stuck(NamedTuple):
    """The next in line does not fit. Until so many blocks are free, or its prefix match can grow,
    there is no use in trying again.
    """

    request: Request
    num_wanted_blocks: int
    missing: bytes | None


class Scheduler:
    """Owns the requests, the waiting queue and the KV cache's book-keeping.

    `schedule` and `apply` may be called out of step: several plans may be in flight, and results
    are applied in the order of their plans.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache: KVCache,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.cache = cache
        self._clock = clock
        self._requests: dict[int, Request] = {}  # live ones, by request id
        self._waiting = WaitingQueue(config.policy, config.priority_ageing_s)
        self._deadlines = Deadlines()
        self._stuck: _Stuck | None = None
        self._rows = RowTable(config.max_num_seqs, config.max_model_len, config.block_size)
        self._prefilling: list[int] = []  # rows, in order of admission
        self._decoding: Int32Array = np.empty(0, np.int32)  # rows, ascending
        self._num_arrived = 0
        self._step = 0
        self._serials_in_flight: dict[int, np.ndarray] = {}  # by step: serials of the plan's rows
        self._delta = PlanDelta()
        self._stats = StatsDelta()
        self._watermark = int(cache.num_usable_blocks * _WATERMARK)

    @property
    def num_live(self) -> int:
        return len(self._requests)

    @property
    def num_in_flight(self) -> int:
        return len(self._serials_in_flight)

    # -- requests come and go

    def add(self, spec: EngineRequest) -> None:
        """Accept a request. It was checked at the door; one that cannot fit the cache is a bug
        there.
        """
        assert spec.request_id not in self._requests, f"request id {spec.request_id} is in use"
        num_tokens = len(spec.prompt_token_ids) + len(spec.output_token_ids)
        assert num_tokens < spec.max_total_len <= self.config.max_model_len
        assert self.cache.num_blocks_for(spec.max_total_len - 1) <= self.cache.num_usable_blocks
        request = Request(spec, self._num_arrived)
        self._num_arrived += 1
        self._requests[spec.request_id] = request
        self._deadlines.push(request)
        self._waiting.push(request)

    def abort(self, request_ids: Iterable[int]) -> list[Finish]:
        """End requests now, wherever they are. Unknown and finished ids are ignored."""
        return [
            self._finish(request, "abort")
            for request_id in request_ids
            if (request := self._requests.get(request_id)) is not None
        ]

    # -- decide

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a result comes in or a request
        arrives.
        """
        if self._deadlines:
            self._expire()
        num_preemptions = self._stats.num_preemptions
        decodes = self._grow(self._ready_decodes())
        budget = self.config.max_num_batched_tokens - len(decodes)
        if self._stats.num_preemptions == num_preemptions:  # else memory is short
            self._admit(budget)
        chunks = share_prefill_budget(
            [(row, self._remaining(row)) for row in self._prefilling],
            budget,
            self.config.long_prefill_token_threshold,
        )
        if not len(decodes) and not chunks:
            return None
        return self._make_plan(decodes, chunks)

    def _expire(self) -> None:
        """End requests whose time is up, before any work goes into them."""
        for request in self._deadlines.take_expired(self._clock()):
            self._stats.expired.append(self._finish(request, "timeout"))

    def _ready_decodes(self) -> Int32Array:
        """Rows whose next input token is, or will be, on the device, and which may still grow."""
        rows = self._decoding
        return rows[self._rows.num_total[rows] < self._rows.max_total[rows]]

    def _grow(self, decodes: Int32Array) -> Int32Array:
        """Give each row that enters a new block one more; where none is free, the last in line give
        way.
        """
        rows = self._rows
        needy = decodes[rows.num_computed[decodes] >= rows.num_blocks[decodes] * rows.block_size]
        if not len(needy):
            return decodes
        victims: set[int] = set()
        if len(needy) > self.cache.num_free_blocks:
            needy_rows = sorted(needy.tolist(), key=lambda r: self._waiting.rank(self._tenant(r)))
        else:
            needy_rows = needy.tolist()
        for row in needy_rows:
            while row not in victims and not self.cache.num_free_blocks:
                victims.add(self._preempt_last())
            if row not in victims:
                self._add_block(row)
        if victims:
            return decodes[[row not in victims for row in decodes.tolist()]]
        return decodes

    def _add_block(self, row: int) -> None:
        table = self._tenant(row).table
        assert table is not None
        block_id = self.cache.extend(table)
        self._delta.add_blocks(row, int(self._rows.num_blocks[row]), [block_id])
        self._rows.num_blocks[row] += 1

    def _preempt_last(self) -> int:
        """Take the row and blocks of the request that is last in line; it waits and computes
        again.
        """
        request = max(self._rows.running(), key=self._waiting.rank)
        row = request.row
        tokens = self._rows.known_tokens(row)
        self._vacate(request)
        request.preempt(tokens)
        self._waiting.push(request)
        self._stats.num_preemptions += 1
        return row

    def _admit(self, budget: int) -> None:
        """Let waiting requests in, in order, while the prompts being computed do not fill the
        step.
        """
        share = max(1, self.config.max_num_batched_tokens // _ADMISSION_SHARE)
        backlog = sum(min(self._remaining(row), share) for row in self._prefilling)
        while backlog < budget and self._rows.num_free:
            request = self._waiting.peek()
            if request is None or not self._try_start(request):
                return
            backlog += min(self._remaining(request.row), share)

    def _try_start(self, request: Request) -> bool:
        cache, num_tokens = self.cache, len(request.token_ids)
        spare = self._watermark if self._rows.num_used else 0
        if self._is_stuck(request, spare):
            return False
        if self.config.enable_prefix_caching:
            request.hash_blocks(request.token_ids, cache.block_size)
        wants_all_logits = request.spec.params.prompt_logprobs is not None
        match = cache.match([] if wants_all_logits else request.chain, num_tokens)
        table = cache.try_open(match, request.chain, num_tokens, spare=spare)
        if table is None:
            num_wanted = cache.num_wanted_blocks(match, num_tokens)
            self._stuck = _Stuck(request, num_wanted, match.missing)
            return False
        self._stuck = None
        self._waiting.pop()
        is_first = request.first_scheduled_s is None
        now_s = self._clock()
        num_cached = table.num_committed * cache.block_size
        request.start(self._rows.next_free(), table, now_s)
        self._rows.occupy(request, num_cached)
        self._prefilling.append(request.row)
        self._delta.admitted.append(
            RowAdmission(request.row, request.spec, request.output_token_ids)
        )
        self._delta.add_blocks(request.row, 0, table.block_ids)
        self._stats.num_prefix_queries += num_tokens
        self._stats.num_prefix_hits += num_cached
        if is_first:
            queue_s = max(0.0, now_s - request.spec.arrival_s)
            self._stats.started.append(Started(request.spec.request_id, num_cached, queue_s))
        return True

    def _is_stuck(self, request: Request, spare: int) -> bool:
        stuck = self._stuck
        return (
            stuck is not None
            and stuck.request is request
            and self.cache.num_free_blocks < stuck.num_wanted_blocks + spare
            and not self.cache.holds(stuck.missing)
        )

    def _make_plan(self, decodes: Int32Array, chunks: Sequence[tuple[int, int]]) -> StepPlan:
        rows = self._rows
        chunk_rows = np.array([row for row, _ in chunks], np.int32)
        all_rows = np.concatenate([decodes, chunk_rows]) if len(chunks) else decodes
        lens = np.ones(len(all_rows), np.int32)
        lens[len(decodes) :] = [num_tokens for _, num_tokens in chunks]
        starts = rows.num_computed[all_rows]
        rows.num_computed[all_rows] += lens
        samples = rows.num_computed[all_rows] == rows.num_total[all_rows]
        rows.num_total[all_rows[samples]] += 1
        pieces = [
            rows.tokens[row, rows.num_computed[row] - num_tokens : rows.num_computed[row]]
            for row, num_tokens in chunks
        ]
        self._after_chunks(chunks)
        self._serials_in_flight[self._step] = rows.serials[all_rows]
        delta, self._delta = self._delta, PlanDelta()
        plan = StepPlan(
            step=self._step,
            rows=all_rows,
            starts=starts,
            chunk_lens=lens,
            samples=samples,
            num_decodes=len(decodes),
            token_ids=np.concatenate(pieces) if pieces else np.empty(0, np.int32),
            freed_rows=tuple(delta.freed_rows),
            admitted=tuple(delta.admitted),
            block_rows=np.array(delta.block_rows, np.int32),
            block_cols=np.array(delta.block_cols, np.int32),
            block_ids=np.array(delta.block_ids, np.int32),
        )
        self._step += 1
        self._stats.num_batched_tokens = plan.num_tokens
        return plan

    def _after_chunks(self, chunks: Sequence[tuple[int, int]]) -> None:
        """Publish the blocks that the chunks fill; rows that are through their prompt go on to
        decode.

        Publishing before the step has run is safe: whoever reads the blocks does so in the same
        step, after all its tokens were written, or in a later one.
        """
        done = False
        for row, _ in chunks:
            table = self._tenant(row).table
            assert table is not None
            num_full = int(self._rows.num_computed[row]) // self.cache.block_size
            self.cache.commit(table, min(num_full, len(table.chain)))
            done |= not self._rows.is_prefilling(row)
        if done:
            through = [row for row in self._prefilling if not self._rows.is_prefilling(row)]
            self._prefilling = [row for row in self._prefilling if self._rows.is_prefilling(row)]
            self._decoding = np.sort(np.append(self._decoding, np.array(through, np.int32)))

    # -- take in

    def apply(self, plan: StepPlan, result: StepResult, step_s: float = 0.0) -> StepOutputs:
        """The tokens that a step sampled reach their requests; some of them end."""
        rows = self._rows
        # A row may have been aborted, finished or preempted since the plan was made: what came out
        # for it is void.
        valid = rows.serials[plan.rows] == self._serials_in_flight.pop(plan.step)
        live = plan.rows[plan.samples & valid]
        token_ids = result.token_ids[valid[plan.samples]]
        rows.append(live, token_ids)
        request_ids = rows.request_ids[live]
        chunks = self._chunks_by_request(plan, valid)
        logprobs, prompt_logprobs = self._logprobs_by_request(plan, result, valid)
        self._commit_outputs(live)
        finished = self._finish_rows(live, token_ids)
        return StepOutputs(
            request_ids=request_ids.tolist(),
            token_ids=token_ids.tolist(),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            chunks=chunks,
            started=self._stats.started,
            finished=[*self._stats.expired, *finished],
            stats=self._take_stats(step_s),
        )

    def take_expired(self) -> StepOutputs | None:
        """Requests that ended by their deadline, for when there is no result to `apply`."""
        if not self._stats.expired:
            return None
        expired, self._stats.expired = self._stats.expired, []
        return StepOutputs(finished=expired, stats=self.gauges())

    def drop(self, plan: StepPlan) -> None:
        """Forget a step that failed or was cut short. The caller must abort the requests that were
        in it; the prefix index goes, as `_after_chunks` has published what was never written.
        """
        self._serials_in_flight.pop(plan.step, None)
        self.cache.reset_prefix_index()

    def _commit_outputs(self, live: Int32Array) -> None:
        """Publish blocks that generated tokens have filled: all but the newest token are
        computed.
        """
        if not self.config.enable_prefix_caching:
            return
        block_size, rows = self.cache.block_size, self._rows
        num_computed = rows.num_known[live] - 1
        for row in live[num_computed % block_size == 0].tolist():
            request = self._tenant(row)
            assert request.table is not None
            num_full = int(rows.num_known[row] - 1) // block_size
            if num_full > request.table.num_committed:
                request.hash_blocks(rows.tokens[row, : rows.num_known[row]], block_size)
                self.cache.commit(request.table, num_full)

    def _finish_rows(self, live: Int32Array, token_ids: Int32Array) -> list[Finish]:
        rows = self._rows
        stopped: BoolArray = rows.hits_stop(live, token_ids)
        full: BoolArray = rows.num_known[live] >= rows.max_total[live]
        finished = []
        for i in np.flatnonzero(stopped | full).tolist():
            request = self._tenant(int(live[i]))
            if not stopped[i]:
                finished.append(self._finish(request, "length"))
                continue
            token_id = int(token_ids[i])
            own = token_id in (request.spec.params.stop_token_ids or ())
            finished.append(self._finish(request, "stop", token_id if own else None))
        return finished

    def _finish(
        self, request: Request, reason: FinishReason, stop_token_id: int | None = None
    ) -> Finish:
        if request.status is Status.RUNNING:
            num_tokens = int(self._rows.num_known[request.row])
            self._vacate(request)
        else:
            num_tokens = len(request.token_ids)
            self._waiting.discard(request)
        self._waiting.settle(request, num_tokens - request.prompt_len)
        request.finish()
        del self._requests[request.spec.request_id]
        return Finish(request.spec.request_id, reason, stop_token_id)

    def _vacate(self, request: Request) -> None:
        """Free a running request's row and blocks."""
        row, table = request.row, request.table
        assert table is not None
        self.cache.release(table)
        self._rows.vacate(row)
        self._delta.freed_rows.append(row)
        if row in self._prefilling:
            self._prefilling.remove(row)
        else:
            self._decoding = self._decoding[self._decoding != row]

    def snapshot(self, in_flight: Iterable[StepPlan]) -> list[RowSnapshot]:
        """The running requests as they were before the plans in flight, without those that came in
        with them.
        """
        rows = self._rows
        num_computed = rows.num_computed.copy()
        fresh: set[int] = set()
        for plan in in_flight:
            num_computed[plan.rows] -= plan.chunk_lens
            fresh.update(admission.row for admission in plan.admitted)
        return [
            RowSnapshot(
                request.row,
                request.spec,
                tuple(rows.known_tokens(request.row)[request.prompt_len :].tolist()),
                int(num_computed[request.row]),
                tuple(request.table.block_ids),
            )
            for request in rows.running()
            if request.row not in fresh and request.table is not None
        ]

    # -- helpers

    def _tenant(self, row: int) -> Request:
        request = self._rows.requests[row]
        assert request is not None, f"row {row} is free"
        return request

    def _remaining(self, row: int) -> int:
        return int(self._rows.num_total[row] - self._rows.num_computed[row])

    def _chunks_by_request(self, plan: StepPlan, valid: BoolArray) -> list[tuple[int, int]]:
        first = plan.num_decodes
        if first == len(plan.rows):
            return []
        live = valid[first:]
        request_ids = self._rows.request_ids[plan.rows[first:][live]]
        return list(zip(request_ids.tolist(), plan.chunk_lens[first:][live].tolist(), strict=True))

    def _logprobs_by_request(
        self, plan: StepPlan, result: StepResult, valid: BoolArray
    ) -> tuple[dict[int, TokenLogprobs], dict[int, list[TokenLogprobs]]]:
        """By row becomes by request; a prompt that was computed twice reports its logprobs once."""
        if not result.has_logprobs:
            return {}, {}
        starts = dict(zip(plan.rows[valid].tolist(), plan.starts[valid].tolist(), strict=True))
        logprobs = {
            self._tenant(row).spec.request_id: logprob
            for row, logprob in result.logprobs.items()
            if row in starts
        }
        prompt_logprobs = {}
        for row, entries in result.prompt_logprobs.items():
            if row in starts:
                request = self._tenant(row)
                fresh = entries[max(0, request.num_prompt_logprobs - starts[row]) :]
                request.num_prompt_logprobs += len(fresh)
                prompt_logprobs[request.spec.request_id] = fresh
        return logprobs, prompt_logprobs

    def gauges(self) -> StepStats:
        return StepStats(
            num_running=self._rows.num_used,
            num_waiting=len(self._waiting),
            kv_usage=self.cache.usage,
        )

    def _take_stats(self, step_s: float) -> StepStats:
        delta, self._stats = self._stats, StatsDelta()
        return dataclasses.replace(
            self.gauges(),
            num_batched_tokens=delta.num_batched_tokens,
            num_prefix_queries=delta.num_prefix_queries,
            num_prefix_hits=delta.num_prefix_hits,
            num_preemptions=delta.num_preemptions,
            step_s=step_s,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, queue and cache agree. For tests and idle times."""
        running = self._rows.running()
        self.cache.check_integrity(r.table for r in running if r.table is not None)
        listed = sorted([*self._prefilling, *self._decoding.tolist()])
        assert listed == [request.row for request in running], "rows and lists disagree"
        assert len(self._requests) == len(running) + len(self._waiting), "requests were lost"
        if not self._requests:
            assert self.cache.num_free_blocks == self.cache.num_usable_blocks, "blocks leaked"

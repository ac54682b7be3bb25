"""Policies of the scheduler, one at a time; test_scheduler_properties has what must hold always."""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
from support.fake_runner import FakeRunner, expected_tokens

from octavo.config import SchedulerConfig
from octavo.kvcache import KVCache
from octavo.sched.plan import StepPlan, StepResult
from octavo.sched.scheduler import Scheduler
from octavo.types import EngineRequest, SamplingParams, StepOutputs

BLOCK = 4


class Engine:
    """Scheduler, cache and fake runner, `depth` steps ahead of the results."""

    def __init__(self, *, num_blocks: int = 400, depth: int = 0, **options: object) -> None:
        settings = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
            "max_model_len": 1024,
            "block_size": BLOCK,
            "policy": "fcfs",
            "enable_prefix_caching": True,
            "long_prefill_token_threshold": 0,
            "async_depth": depth,
            **options,
        }
        config = SchedulerConfig(**settings)  # type: ignore[arg-type]
        cache = KVCache(num_blocks, BLOCK, enable_prefix_caching=config.enable_prefix_caching)
        self.now_s = 0.0
        self.scheduler = Scheduler(config, cache, clock=lambda: self.now_s)
        self.runner = FakeRunner(num_blocks, BLOCK)
        self.depth = depth
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.plans: list[StepPlan] = []
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self.started: list[int] = []
        self.chunks: dict[int, list[int]] = {}

    def add(self, request_id: int, prompt_len: int, max_tokens: int = 4, **fields: object) -> None:
        self.tokens[request_id] = []
        self.scheduler.add(request(request_id, prompt_len, max_tokens, **fields))

    def abort(self, *request_ids: int) -> list[int]:
        finished = self.scheduler.abort(request_ids)
        self.ends |= {finish.request_id: finish.reason for finish in finished}
        self.scheduler.check_integrity()
        return [finish.request_id for finish in finished]

    def step(self) -> StepPlan | None:
        plan = self.scheduler.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.runner.execute(plan)))
        if (early := self.scheduler.take_expired()) is not None:
            self._take(early)
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self._take(self.scheduler.apply(*self.in_flight.popleft()))
        self.scheduler.check_integrity()
        return plan

    def _take(self, outputs: StepOutputs) -> None:
        for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
            self.tokens[request_id].append(token)
        self.ends |= {finish.request_id: finish.reason for finish in outputs.finished}
        self.started += [started.request_id for started in outputs.started]
        for request_id, num_tokens in outputs.chunks:
            self.chunks.setdefault(request_id, []).append(num_tokens)

    def run(self, most: int = 2000) -> int:
        """Steps until everything is done."""
        for steps in range(most):
            if not self.scheduler.num_live and not self.in_flight:
                return steps
            self.step()
        raise AssertionError("no end")


def request(
    request_id: int, prompt_len: int, max_tokens: int = 4, **fields: object
) -> EngineRequest:
    """A prompt that shares nothing with the others'."""
    prompt = tuple((request_id * 131 + i * 7) % 1000 for i in range(prompt_len))
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=fields.pop("prompt", prompt),  # type: ignore[arg-type]
        params=SamplingParams(max_tokens=max_tokens),
        max_total_len=prompt_len + max_tokens,
        **fields,  # type: ignore[arg-type]
    )


def test_first_come_first_served() -> None:
    engine = Engine(max_num_seqs=1)
    for request_id in (5, 2, 9):
        engine.add(request_id, 6, priority=-request_id)  # which "fcfs" ignores
    engine.run()
    assert engine.started == [5, 2, 9]
    assert list(engine.ends) == [5, 2, 9]


def test_priority_lower_first_then_by_arrival() -> None:
    engine = Engine(max_num_seqs=1, policy="priority")
    for request_id, priority in ((1, 0), (2, 5), (3, -1), (4, 0)):
        engine.add(request_id, 6, priority=priority)
    engine.run()
    assert engine.started == [3, 1, 4, 2]


def test_waiting_makes_up_for_priority() -> None:
    engine = Engine(max_num_seqs=1, policy="priority", priority_ageing_s=10.0)
    for request_id, priority, arrival_s in ((1, 0, 0.0), (2, 1, 5.0), (3, 0, 14.0), (4, 0, 16.0)):
        engine.add(request_id, 6, priority=priority, arrival_s=arrival_s)
    engine.run()
    assert engine.started == [1, 3, 2, 4]


def test_another_clients_single_request_waits_for_one_turn_only() -> None:
    engine = Engine(max_num_seqs=2)
    for request_id in range(100):
        engine.add(request_id, 6, max_tokens=8, client="crowd")
    for _ in range(20):
        engine.step()
    num_before = len(engine.started)
    engine.add(1000, 6, client="single")
    while 1000 not in engine.started:
        engine.step()
    assert len(engine.started) <= num_before + 2  # a row each for both clients


def test_the_client_that_was_given_most_is_preempted() -> None:
    engine = Engine(num_blocks=13, enable_prefix_caching=False)
    for request_id, client in ((1, "b"), (2, "a"), (3, "a")):
        engine.add(request_id, 9, max_tokens=20, client=client)
    preempted = run_and_note_preemptions(engine)
    assert preempted[0] == 3
    assert 1 not in preempted


@pytest.mark.parametrize("depth", [0, 2])
def test_a_deadline_ends_a_request_wherever_it_is(depth: int) -> None:
    engine = Engine(max_num_seqs=2, depth=depth)
    engine.add(1, 5, max_tokens=50, deadline_s=10.0)  # decodes
    engine.add(2, 300, max_tokens=50, deadline_s=5.0)  # prefills
    engine.add(3, 5, deadline_s=5.0)  # waits
    engine.add(4, 5)
    for now_s in range(12):
        engine.now_s = float(now_s)
        engine.step()
    engine.run()
    assert engine.ends == {1: "timeout", 2: "timeout", 3: "timeout", 4: "length"}
    assert 3 not in engine.started
    assert len(engine.tokens[1]) >= 10 - depth - 1


def test_the_last_requests_deadline_is_told_although_nothing_runs() -> None:
    engine = Engine()
    engine.add(1, 5, deadline_s=1.0)
    engine.now_s = 2.0
    assert engine.step() is None
    assert engine.ends == {1: "timeout"}


def test_finished_requests_leave_the_deadlines_before_their_time() -> None:
    engine = Engine()
    for request_id in range(500):
        engine.add(request_id, 5, max_tokens=1, deadline_s=1e6)
        engine.run()
    assert len(engine.scheduler._deadlines) < 200


def test_a_prompt_that_does_not_fit_is_matched_again_only_when_that_may_help(monkeypatch) -> None:
    engine = Engine(num_blocks=30, max_num_seqs=3)
    engine.add(1, 60, max_tokens=40)
    engine.step()
    num_matches = 0
    match = KVCache.match

    def counted(self: KVCache, *args: object) -> object:
        nonlocal num_matches
        num_matches += 1
        return match(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(KVCache, "match", counted)
    engine.add(2, 80)
    while 2 not in engine.started:
        engine.step()
    assert 1 in engine.ends
    assert num_matches == 2


def test_a_prompt_that_does_not_fit_is_let_in_once_its_beginning_is_published() -> None:
    engine = Engine(num_blocks=30, max_num_batched_tokens=8)
    prompt = tuple(range(80))
    engine.add(1, 80, max_tokens=20, prompt=prompt)
    for _ in range(3):
        engine.step()
    engine.add(2, 80, max_tokens=2, prompt=prompt)
    while 2 not in engine.started:
        engine.step()
    assert 1 not in engine.ends  # it holds its blocks, and 2 uses them


def test_decodes_get_their_token_in_every_step_of_a_long_prefill() -> None:
    engine = Engine()
    for request_id in (1, 2, 3):
        engine.add(request_id, 3, max_tokens=60)
    engine.step()
    engine.add(4, 300)
    while not engine.tokens[4]:
        plan = engine.step()
        assert plan is not None
        assert plan.num_decodes == 3
        assert plan.num_tokens <= 32
    assert len(engine.plans) == 1 + -(-300 // (32 - 3))


def test_a_short_request_behind_four_long_prefills_is_not_kept_waiting() -> None:
    engine = Engine(num_blocks=1000, max_num_batched_tokens=64)
    for request_id in (1, 2, 3, 4):
        engine.add(request_id, 900)
    for _ in range(3):
        engine.step()
    engine.add(5, 20)
    num_steps = 0
    while not engine.tokens[5]:
        engine.step()
        num_steps += 1
    assert num_steps <= 3  # 16 tokens of each step are for the others, it has 20
    assert not engine.tokens[1]


def test_a_prompt_takes_no_more_of_a_step_than_the_threshold() -> None:
    engine = Engine(long_prefill_token_threshold=8)
    engine.add(1, 50)
    engine.run()
    assert max(int(plan.chunk_lens.max()) for plan in engine.plans) == 8


def run_and_note_preemptions(engine: Engine) -> list[int]:
    """Who lost its row without having finished, in order."""
    preempted: list[int] = []
    while engine.scheduler.num_live:
        before = [r.spec.request_id for r in engine.scheduler._rows.running()]
        engine.step()
        after = {r.spec.request_id for r in engine.scheduler._rows.running()}
        preempted += [i for i in before if i not in after and i not in engine.ends]
    return preempted


@pytest.mark.parametrize("depth", [0, 1])
def test_each_chunk_of_a_prompt_is_told_and_no_decode_is(depth: int) -> None:
    engine = Engine(depth=depth)
    engine.add(1, 5)
    engine.step()
    engine.add(2, 70)
    engine.add(3, 40)
    engine.step()
    engine.abort(3)
    engine.run()
    assert engine.chunks[1] == [5]
    assert sum(engine.chunks[2]) == 70
    assert len(engine.chunks[2]) >= 3
    assert (3 in engine.chunks) == (depth == 0)  # the result of a step in flight was void for it
    engine.add(4, 70, prompt=request(2, 70).prompt_token_ids)  # all but its end is in the cache
    engine.run()
    assert engine.chunks[4] == [2]


def test_the_last_in_line_is_preempted_and_continues_where_it_was() -> None:
    engine = Engine(num_blocks=13, enable_prefix_caching=False)
    for request_id in (1, 2, 3):
        engine.add(request_id, 9, max_tokens=20)
    preempted = run_and_note_preemptions(engine)
    assert preempted[0] == 3
    assert 1 not in preempted
    for request_id in (1, 2, 3):
        tokens, reason = expected_tokens(request(request_id, 9, 20))
        assert (engine.tokens[request_id], engine.ends[request_id]) == (tokens, reason)
    readmitted = [a for plan in engine.plans for a in plan.admitted if a.output_token_ids]
    assert readmitted
    for admission in readmitted:  # penalties and random state go on
        known = engine.tokens[admission.request.request_id]
        assert list(admission.output_token_ids) == known[: len(admission.output_token_ids)]


def test_by_priority_the_least_urgent_is_preempted() -> None:
    engine = Engine(num_blocks=13, policy="priority", enable_prefix_caching=False)
    for request_id, priority in ((1, 9), (2, 0), (3, 0)):
        engine.add(request_id, 9, max_tokens=20, priority=priority)
    assert run_and_note_preemptions(engine)[0] == 1
    assert list(engine.ends)[-1] == 1


def test_a_repeated_prompt_is_taken_from_the_cache() -> None:
    engine = Engine()
    prompt = tuple(range(21))
    engine.add(1, 21, prompt=prompt)
    engine.run()
    num_plans = len(engine.plans)
    engine.add(2, 21, prompt=prompt)
    engine.step()
    assert engine.plans[num_plans].starts.tolist() == [20]
    engine.add(3, 21, prompt=prompt, cache_salt="other")
    engine.step()
    assert 0 in engine.plans[num_plans + 1].starts.tolist()


def test_prompt_logprobs_compute_the_whole_prompt() -> None:
    engine = Engine()
    prompt = tuple(range(21))
    engine.add(1, 21, prompt=prompt)
    engine.run()
    spec = request(2, 21, prompt=prompt)
    engine.tokens[2] = []
    engine.scheduler.add(dataclasses.replace(spec, params=spec.params.replace(prompt_logprobs=0)))
    plan = engine.step()
    assert plan is not None
    assert plan.starts.tolist() == [0]


def scripted(depth: int) -> Engine:
    """A busy run: short and long prompts, shared beginnings, preemption, stops, aborts."""
    engine = Engine(num_blocks=40, max_num_seqs=5, depth=depth)
    shared = tuple(range(30))
    for request_id in range(1, 15):
        length = 5 + request_id * 11 % 40
        prompt = (shared + tuple(range(100, 140)))[:length] if request_id % 3 else None
        fields = {"prompt": prompt} if prompt else {}
        stops = (3, 7) if request_id % 4 == 0 else ()
        engine.add(request_id, length, 8 + request_id % 5, stop_token_ids=stops, **fields)
        if request_id % 2:
            engine.step()
        if request_id == 9:
            engine.abort(8)
    engine.run()
    return engine


def as_data(plan: StepPlan) -> list[object]:
    fields = [getattr(plan, field.name) for field in dataclasses.fields(plan)]
    return [f.tolist() if isinstance(f, np.ndarray) else f for f in fields]


def test_the_same_input_gives_the_same_plans() -> None:
    first, second = scripted(1), scripted(1)
    assert list(map(as_data, first.plans)) == list(map(as_data, second.plans))
    assert first.ends == second.ends


def test_running_ahead_changes_nothing_that_a_client_sees() -> None:
    alone = scripted(0)
    for depth in (1, 2):
        ahead = scripted(depth)
        assert {i: t for i, t in ahead.tokens.items() if i != 8} == {
            i: t for i, t in alone.tokens.items() if i != 8
        }
        assert ahead.ends == alone.ends


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    "reach",
    [
        pytest.param(lambda e: None, id="waiting"),
        pytest.param(lambda e: e.step(), id="prefilling"),
        pytest.param(lambda e: [e.step() for _ in range(6)], id="decoding"),
        pytest.param(lambda e: e.run(), id="finished"),
    ],
)
def test_abort_in_every_state(reach: Callable[[Engine], object], depth: int) -> None:
    engine = Engine(depth=depth)
    engine.add(1, 60, max_tokens=20)
    engine.add(2, 5, max_tokens=20)
    reach(engine)
    done = set(engine.ends)
    assert set(engine.abort(1, 77)) == {1} - done
    assert engine.abort(1) == []
    num_tokens = len(engine.tokens[1])
    engine.run()
    assert len(engine.tokens[1]) == num_tokens
    assert engine.tokens[2] == expected_tokens(request(2, 5, 20))[0]
    assert engine.scheduler.num_in_flight == 0


def test_a_preempted_request_can_be_aborted() -> None:
    engine = Engine(num_blocks=13, enable_prefix_caching=False)
    for request_id in (1, 2, 3):
        engine.add(request_id, 9, max_tokens=20)
    while len(engine.scheduler._waiting) == 0:
        engine.step()
    assert engine.abort(3) == [3]
    engine.run()
    assert set(engine.ends) == {1, 2, 3}


def test_a_dropped_step_leaves_nothing_that_was_not_computed() -> None:
    """The plan published the prompt's blocks; nobody may find what was never written."""
    engine = Engine()
    prompt = tuple(range(21))
    engine.add(1, 21, prompt=prompt)
    plan = engine.scheduler.schedule()
    assert plan is not None
    engine.scheduler.drop(plan)
    engine.abort(1)
    assert engine.scheduler.num_in_flight == 0
    engine.add(2, 21, prompt=prompt)
    engine.run()
    assert engine.plans[0].starts.tolist() == [0]
    assert engine.tokens[2] == expected_tokens(request(2, 21, prompt=prompt))[0]


def test_more_stop_tokens_than_columns() -> None:
    stops = tuple(range(0, 50, 2))
    engine = Engine()
    engine.add(1, 5, max_tokens=50, stop_token_ids=stops)
    engine.run()
    spec = request(1, 5, 50, stop_token_ids=stops)
    assert (engine.tokens[1], engine.ends[1]) == expected_tokens(spec)
    assert engine.ends[1] == "stop"


def calls_of_a_steady_step(num_rows: int) -> int:
    """Python and C function calls of schedule + apply when every row decodes, none enters a new
    block, and none ends.
    """
    config = SchedulerConfig(
        max_num_seqs=num_rows,
        max_num_batched_tokens=4 * num_rows,
        max_model_len=256,
        block_size=16,
        policy="fcfs",
        enable_prefix_caching=True,
        long_prefill_token_threshold=0,
        async_depth=0,
    )
    scheduler = Scheduler(config, KVCache(4 * num_rows + 1, 16, enable_prefix_caching=True))
    for request_id in range(num_rows):
        scheduler.add(request(request_id, 3, 100))
    count = 0

    def step() -> None:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.apply(plan, StepResult(np.full(int(plan.samples.sum()), 5, np.int32)))

    def on_event(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    while scheduler._prefilling or scheduler._waiting:
        step()
    sys.setprofile(on_event)
    try:
        step()
    finally:
        sys.setprofile(None)
    assert scheduler.num_live == num_rows
    return count


def test_a_steady_step_costs_the_same_for_a_hundred_rows_and_a_thousand() -> None:
    small, large = calls_of_a_steady_step(100), calls_of_a_steady_step(1000)
    assert large == small
    assert large < 150

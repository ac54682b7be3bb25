"""Scheduler + cache + fake runner under random arrivals, lengths, aborts, priorities and tiny
pools.

What must hold, always: no block leaks, none has two writers, every accepted request gets exactly
one terminal message, and its tokens are those that it would have received alone.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from support.examples import examples
from support.fake_runner import VOCAB, FakeRunner, expected_tokens

from octavo.config import SchedulerConfig
from octavo.kvcache import KVCache
from octavo.sched.plan import StepPlan, StepResult
from octavo.sched.scheduler import Scheduler
from octavo.types import EngineRequest, Finish, SamplingParams

BLOCK = 4
MAX_LEN = 64


@dataclass(frozen=True)
class Arrival:
    after_steps: int
    prompt_len: int
    prompt_kind: int  # prompts of one kind share their beginning
    max_new: int
    seed: int
    priority: int
    salt: str
    stops: tuple[int, ...]
    abort_after: int | None  # steps
    client: str = ""
    timeout: int | None = None  # steps


@dataclass(frozen=True)
class Scenario:
    num_rows: int
    budget: int
    num_blocks: int
    policy: str
    ageing_s: float
    threshold: int
    depth: int
    caching: bool
    arrivals: list[Arrival]
    death_after: int | None = None  # steps


arrivals = st.builds(
    Arrival,
    after_steps=st.integers(0, 6),
    prompt_len=st.integers(1, 40),
    prompt_kind=st.integers(0, 2),
    max_new=st.integers(1, 24),
    seed=st.integers(0, 3),
    priority=st.integers(-1, 1),
    salt=st.sampled_from(["", "", "s"]),
    stops=st.sampled_from([(), (3,), (1, 2, 3), tuple(range(0, VOCAB, 5))]),
    abort_after=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    client=st.sampled_from(["", "a", "b"]),
    timeout=st.one_of(st.none(), st.none(), st.integers(0, 25)),
)
scenarios = st.builds(
    Scenario,
    num_rows=st.integers(1, 6),
    budget=st.integers(6, 48),
    num_blocks=st.integers(17, 40),  # MAX_LEN needs 16
    policy=st.sampled_from(["fcfs", "priority"]),
    ageing_s=st.sampled_from([0.0, 2.0]),
    threshold=st.sampled_from([0, 0, 3, 16]),
    depth=st.integers(0, 3),
    caching=st.booleans(),
    arrivals=st.lists(arrivals, min_size=1, max_size=14),
    death_after=st.one_of(st.none(), st.integers(1, 30)),
)


def request_of(index: int, arrival: Arrival, now: int = 0) -> EngineRequest:
    prompt = tuple(
        (i * 7 + (i // 9) * arrival.prompt_kind) % VOCAB for i in range(arrival.prompt_len)
    )
    return EngineRequest(
        request_id=index + 1,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=arrival.max_new),
        max_total_len=min(arrival.prompt_len + arrival.max_new, MAX_LEN),
        stop_token_ids=arrival.stops,
        seed=arrival.seed,
        priority=arrival.priority,
        cache_salt=arrival.salt,
        client=arrival.client,
        arrival_s=float(now),
        deadline_s=None if arrival.timeout is None else float(now + arrival.timeout),
    )


@dataclass
class Simulation:
    """The engine's step loop, `depth` steps ahead of its results."""

    scenario: Scenario
    requests: dict[int, EngineRequest] = field(default_factory=dict)
    streams: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, Finish] = field(default_factory=dict)
    in_flight: deque[tuple[StepPlan, StepResult]] = field(default_factory=deque)
    num_steps: int = 0
    hits: int = 0
    preemptions: int = 0
    now: int = 0  # steps; the scheduler's clock

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        s = self.scenario
        config = SchedulerConfig(
            max_num_seqs=s.num_rows,
            max_num_batched_tokens=s.budget,
            max_model_len=MAX_LEN,
            block_size=BLOCK,
            policy=s.policy,  # type: ignore[arg-type]
            enable_prefix_caching=s.caching,
            long_prefill_token_threshold=s.threshold,
            async_depth=s.depth,
            priority_ageing_s=s.ageing_s,
        )
        cache = KVCache(s.num_blocks, BLOCK, enable_prefix_caching=s.caching)
        self.scheduler = Scheduler(config, cache, clock=lambda: float(self.now))
        self.runner = FakeRunner(s.num_blocks, BLOCK)

    def die(self) -> None:
        """Another engine goes on with what is live, from what each request has received."""
        self.in_flight.clear()
        self.start()
        for request_id, received in self.streams.items():
            if request_id not in self.finishes:
                request = self.requests[request_id]
                self.scheduler.add(dataclasses.replace(request, output_token_ids=tuple(received)))

    def step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for request in self.scheduler._requests.values():
            assert request.spec.deadline_s is None or request.spec.deadline_s > self.now
        if plan is not None:
            assert plan.num_tokens <= self.scenario.budget
            self.num_steps += 1
            self.in_flight.append((plan, self.runner.execute(plan)))
        if (early := self.scheduler.take_expired()) is not None:
            self.take(early.finished)
        if self.in_flight and (plan is None or len(self.in_flight) > self.scenario.depth):
            outputs = self.scheduler.apply(*self.in_flight.popleft())
            self.scheduler.check_integrity()
            for request_id, token in zip(outputs.request_ids, outputs.token_ids, strict=True):
                assert request_id not in self.finishes, "a token after the terminal message"
                self.streams[request_id].append(token)
            self.take(outputs.finished)
            self.hits += outputs.stats.num_prefix_hits
            self.preemptions += outputs.stats.num_preemptions

    def take(self, finished: list[Finish]) -> None:
        for finish in finished:
            assert finish.request_id not in self.finishes, "two terminal messages"
            self.finishes[finish.request_id] = finish

    def run(self) -> None:
        aborts: list[tuple[int, int]] = []

        def advance() -> None:
            for due, request_id in list(aborts):
                if due <= self.now:
                    aborts.remove((due, request_id))
                    self.take(self.scheduler.abort([request_id]))
            if self.now == self.scenario.death_after:
                self.die()
            self.step()
            self.now += 1

        for index, arrival in enumerate(self.scenario.arrivals):
            for _ in range(arrival.after_steps):
                advance()
            self.streams[index + 1] = []
            self.requests[index + 1] = request_of(index, arrival, self.now)
            self.scheduler.add(self.requests[index + 1])
            if arrival.abort_after is not None:
                aborts.append((self.now + arrival.abort_after, index + 1))
        while self.scheduler.num_live or self.in_flight:
            advance()
            assert self.now < 20_000, "no progress"


def check(scenario: Scenario) -> Simulation:
    simulation = Simulation(scenario)
    simulation.run()
    for index, arrival in enumerate(scenario.arrivals):
        request = request_of(index, arrival)
        tokens, reason = expected_tokens(request)
        finish, got = (
            simulation.finishes[request.request_id],
            simulation.streams[request.request_id],
        )
        if finish.reason in ("abort", "timeout"):
            limit = arrival.abort_after if finish.reason == "abort" else arrival.timeout
            assert limit is not None
            assert got == tokens[: len(got)]
        else:
            assert (got, finish.reason) == (tokens, reason)
    assert simulation.scheduler.num_in_flight == 0
    return simulation


@examples(300, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios)
def test_streams_are_those_of_each_request_alone(scenario: Scenario) -> None:
    check(scenario)


@pytest.mark.slow
@examples(2500, suppress_health_check=[HealthCheck.too_slow])
@given(scenarios)
def test_streams_are_those_of_each_request_alone_at_length(scenario: Scenario) -> None:
    check(scenario)


def test_the_scenarios_do_preempt_and_hit() -> None:
    """Guards the property test against scenarios too tame to prove anything."""
    arrival = Arrival(0, 30, 0, 24, 1, 0, "", (), None)
    crowd = Scenario(6, 48, 20, "fcfs", 0.0, 0, 1, True, [arrival] * 8)
    assert check(crowd).preemptions > 0
    assert check(crowd).hits > 0


def test_the_scenarios_do_expire_in_every_state() -> None:
    arrivals = [Arrival(0, 8, 0, 24, i, 0, "", (), None, timeout=t) for i, t in enumerate((1, 9))]
    running = check(Scenario(2, 48, 40, "fcfs", 0.0, 0, 1, True, arrivals))
    assert {finish.reason for finish in running.finishes.values()} == {"timeout"}
    assert len(running.streams[2]) > 0
    waiting = check(Scenario(1, 48, 40, "fcfs", 0.0, 0, 1, True, arrivals[::-1]))
    assert waiting.streams[2] == []

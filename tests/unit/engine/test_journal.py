"""The journal against a model of an engine in which some requests kill."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from octavo.engine.journal import Entry, Journal
from octavo.types import (
    MAX_CHUNKS,
    EngineRequest,
    Finish,
    RequestUpdate,
    SamplingParams,
    Started,
    StepOutputs,
    StepStats,
    TokenLogprobs,
)


def request(request_id: int, max_tokens: int = 20) -> EngineRequest:
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=(7, 8),
        params=SamplingParams(),
        max_total_len=2 + max_tokens,
    )


def take(entry: Entry) -> RequestUpdate:
    """What has arrived."""
    return asyncio.run(asyncio.wait_for(entry.next(), 1))


class Engine:
    """Gives every request its next token in each step; `strikes` says which kill, and at which."""

    def __init__(
        self,
        journal: Journal,
        strikes: dict[int, int],
        num_rows: int = 99,
        strikes_kill: bool = False,
    ) -> None:
        self.journal, self.strikes, self.num_rows = journal, strikes, num_rows
        self.strikes_kill = strikes_kill  # by a signal, as one might from outside
        self.num_deaths = 0
        self.killers: list[int] = []
        self.received: dict[int, list[int]] = {}
        self.live: dict[int, EngineRequest] = {}

    def admit(self) -> None:
        for entry in self.journal.admit():
            asked = entry.enter()
            assert list(asked.output_token_ids) == self.received.get(asked.request_id, [])
            assert asked.request_id not in self.live
            self.live[asked.request_id] = asked

    def step(self) -> None:
        """The step in which a request strikes gives nobody anything."""
        running = dict(list(self.live.items())[: self.num_rows])
        if any(len(self.received.get(i, ())) >= self.strikes.get(i, 10**9) for i in running):
            self.die(self.strikes_kill)
            return
        finished = []
        for request_id, asked in running.items():
            tokens = self.received.setdefault(request_id, [])
            tokens.append(len(tokens))
            if len(tokens) == asked.max_total_len - 2:
                finished.append(Finish(request_id, "length"))
        outputs = StepOutputs(
            request_ids=list(running),
            token_ids=[self.received[i][-1] for i in running],
            finished=finished,
        )
        for finish in finished:
            del self.live[finish.request_id]
        self.journal.record(outputs)

    def die(self, was_killed: bool) -> None:
        self.num_deaths += 1
        in_flight = None
        if self.num_rows < 99:
            computed = {i: 1 + len(self.received.get(i, ())) for i in self.live}
            in_flight = {i: (computed[i], computed[i] + 1) for i in list(computed)[: self.num_rows]}
        self.live.clear()
        killer = self.journal.bury(in_flight, was_killed=was_killed)
        if killer is not None:
            self.killers.append(killer.request.request_id)
            self.journal.finish(Finish(killer.request.request_id, "error"))


@examples(300)
@given(
    num_requests=st.integers(1, 24),
    strikes=st.dictionaries(st.integers(1, 24), st.integers(0, 18), max_size=4),
    late=st.integers(0, 8),
    kills=st.sets(st.integers(0, 300), max_size=3),
    num_rows=st.sampled_from([1, 3, 8, 99]),
    strikes_kill=st.booleans(),
)
def test_every_killer_is_found_and_the_others_end_well(
    num_requests: int,
    strikes: dict[int, int],
    late: int,
    kills: set[int],
    num_rows: int,
    strikes_kill: bool,
) -> None:
    journal = Journal()
    strikes = {i: at for i, at in strikes.items() if i <= num_requests}
    engine = Engine(journal, strikes, num_rows, strikes_kill)
    entries: dict[int, Entry] = {}
    for tick in range(3000):
        if tick % (late or 1) == 0 and len(entries) < num_requests:
            for _ in range(1 if late else num_requests):
                request_id = len(entries) + 1
                entries[request_id] = journal.add(request(request_id))
        engine.admit()
        if tick in kills and engine.live:
            engine.die(was_killed=True)
        else:
            engine.step()
        if len(entries) == num_requests and not len(journal):
            break
    assert not len(journal)
    assert sorted(engine.killers) == sorted(strikes)
    for request_id, entry in entries.items():
        update = take(entry)
        assert update.finish is not None
        assert update.token_ids == engine.received.get(request_id, [])
        if request_id not in strikes:
            assert update.finish.reason == "length"
            assert update.token_ids == list(range(20))


def test_one_killer_among_64_costs_a_handful_of_engines() -> None:
    journal = Journal()
    engine = Engine(journal, {50: 3})
    for i in range(1, 65):
        journal.add(request(i))
    while len(journal):
        engine.admit()
        engine.step()
    assert engine.killers == [50]
    assert engine.num_deaths <= 2 + 6 + 1


def test_what_was_received_before_is_not_told_again() -> None:
    journal = Journal()
    entry = journal.add(request(1))
    journal.admit()[0].enter()
    first, second, third = (TokenLogprobs((i,), (-1.0,), 1) for i in (1, 2, 3))
    journal.record(StepOutputs(prompt_logprobs={1: [first, second]}, started=[Started(1, 0, 0.5)]))
    assert journal.bury(None) is None
    journal.admit()[0].enter()
    journal.record(StepOutputs(prompt_logprobs={1: [first]}, started=[Started(1, 16, 9.0)]))
    journal.record(StepOutputs(prompt_logprobs={1: [second, third]}))
    update = take(entry)
    assert update.prompt_logprobs == [first, second, third]
    assert update.started == Started(1, 0, 0.5)


def test_chunks_wake_nobody_and_stay_few() -> None:
    journal = Journal()
    entry = journal.add(request(1))
    journal.admit()[0].enter()
    num_chunks = 3 * MAX_CHUNKS
    stats = StepStats(step_s=0.5)
    for _ in range(num_chunks):
        journal.record(StepOutputs(chunks=[(1, 10), (99, 10)], stats=stats))
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(entry.next(), 0.01))
    journal.record(StepOutputs(request_ids=[1], token_ids=[5]))
    chunks = take(entry).chunks
    assert len(chunks) == MAX_CHUNKS
    assert sum(chunk.num_tokens for chunk in chunks) == 10 * num_chunks
    assert sum(chunk.step_s for chunk in chunks) == 0.5 * num_chunks
    assert list(chunks) == sorted(chunks, key=lambda chunk: chunk.end_s)


def test_each_start_in_another_engine_is_told() -> None:
    journal = Journal()
    entry = journal.add(request(1))
    journal.admit()[0].enter()
    for _ in range(2):
        assert journal.bury(None) is None
        journal.admit()[0].enter()
        journal.record(StepOutputs(request_ids=[1] * 9, token_ids=[5] * 9))
    first, second = take(entry).resumed_s
    assert first < second


def test_so_is_that_of_a_request_that_was_in_no_step_when_the_engine_died() -> None:
    journal = Journal()
    entry = journal.add(request(1))
    journal.admit()
    entry.enter()
    entry.put()
    assert take(entry).resumed_s == ()
    journal.bury({})
    assert not entry.num_deaths
    assert list(journal.admit()) == [entry]
    entry.enter()
    entry.put()
    assert len(take(entry).resumed_s) == 1


def test_arrivals_wait_while_suspects_are_told_apart() -> None:
    journal = Journal()
    engine = Engine(journal, {1: 0})
    for i in (1, 2):
        journal.add(request(i))
    for _ in range(2):
        engine.admit()
        engine.step()
    journal.add(request(3))
    assert [entry.request.request_id for entry in journal.admit()] == [1]
    assert journal.has_waiting


def test_kills_from_outside_condemn_nobody() -> None:
    """Ever the same request is recomputed when the next one comes, alone or not."""
    journal = Journal()
    engine = Engine(journal, {})
    for i in range(1, 9):
        journal.add(request(i))
    for _ in range(6):
        engine.admit()
        engine.die(was_killed=True)
    while len(journal):
        engine.admit()
        engine.step()
    assert engine.killers == []


def test_who_has_waited_longest_goes_on_first() -> None:
    journal = Journal()
    for i in (1, 2, 3):
        journal.add(request(i))
    for entry in journal.admit():
        entry.enter()
    for i in (2, 3, 1):
        journal.record(StepOutputs(request_ids=[i], token_ids=[5]))
    assert journal.bury({}) is None
    assert [entry.request.request_id for entry in journal.admit()] == [2, 3, 1]


def test_who_left_in_the_middle_of_a_step_may_have_ended_it() -> None:
    """Nobody is alone with a death because the killer's client has hung up before it."""
    journal = Journal()
    for i in (1, 2):
        journal.add(request(i))
    for _ in range(4):
        for entry in journal.admit():
            entry.enter()
        assert journal.bury({1: (0, 2), 2: (0, 2)}) is None
        journal.finish(Finish(2, "abort"))
    assert journal.get(1) is not None

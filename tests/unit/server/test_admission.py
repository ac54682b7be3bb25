"""What may wait, who is refused, and what they are told: the counts alone, without a server."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from support.fake_engine import fake_info

from octavo.config.server import ServerConfig
from octavo.server.admission import Admission
from octavo.server.errors import ApiError
from octavo.types import (
    EngineRequest,
    Finish,
    SamplingParams,
    Started,
    StepOutputs,
    StepStats,
)

ROWS = 8  # of fake_info


class Door:
    """An `Admission` with a clock of its own, and the requests that are in."""

    def __init__(self, policy: str = "fcfs", jitter: float = 0.0, **options: Any) -> None:
        self.now_s = 100.0
        self.admission = Admission(
            ServerConfig.from_options(**options),
            dataclasses.replace(fake_info(), scheduling_policy=policy),
            clock=lambda: self.now_s,
            jitter=lambda: jitter,
        )
        self.ids = itertools.count()
        self.waiting: list[EngineRequest] = []
        self.running: list[EngineRequest] = []

    def come(
        self, n: int = 1, tokens: int = 10, client: str = "", timeout_s: float | None = None
    ) -> ApiError | None:
        """`n` sequences of one request; the refusal, if it is refused."""
        requests = [
            EngineRequest(
                request_id=next(self.ids),
                prompt_token_ids=(1,) * tokens,
                params=SamplingParams(),
                max_total_len=tokens + 100,
                client=client,
            )
            for _ in range(n)
        ]
        deadline_s = None if timeout_s is None else self.now_s + timeout_s
        try:
            self.admission.admit(client, requests, deadline_s)
        except ApiError as error:
            return error
        self.waiting += requests
        return None

    def step(self, num_tokens: int = 0, step_s: float = 0.1, **stats: Any) -> None:
        """The engine starts what it has rows for, and says so."""
        self.now_s += step_s
        started = self.waiting[: ROWS - len(self.running)]
        del self.waiting[: len(started)]
        self.running += started
        self.admission.on_step(
            StepOutputs(
                started=[Started(r.request_id, 0, 0.0) for r in started],
                stats=StepStats(
                    num_batched_tokens=num_tokens,
                    num_running=len(self.running),
                    num_waiting=len(self.waiting),
                    step_s=step_s,
                    **stats,
                ),
            )
        )

    def end(self, num_output: int = 100) -> None:
        request = self.running.pop(0)
        self.admission.on_step(StepOutputs(finished=[Finish(request.request_id, "stop")]))
        self.admission.leave(request, num_output)

    def measure(self, tokens_per_s: float) -> None:
        """Fill the rows and let the engine be that fast for a long while."""
        self.come(ROWS - len(self.running))
        for _ in range(200):
            self.step(int(tokens_per_s / 10))


def code(error: ApiError | None) -> str | None:
    return None if error is None else error.error.code


def retry_s(error: ApiError | None) -> float:
    assert error is not None
    return int(error.headers["retry-after-ms"]) / 1e3


def test_defaults_follow_the_engines_size() -> None:
    admission = Door().admission
    assert admission.max_requests == 4 * ROWS
    assert admission.max_tokens == 256 * 128


def test_rows_that_are_free_do_not_count_as_a_queue() -> None:
    door = Door(max_queue_requests=3)
    assert [code(door.come()) for _ in range(ROWS + 4)] == [None] * (ROWS + 3) + ["queue_full"]
    door.step()
    assert door.admission.num_waiting == 3
    assert code(door.come()) == "queue_full"
    door.end()
    door.step()
    assert door.come() is None


def test_the_sequences_of_a_request_count_and_are_let_in_together() -> None:
    door = Door(max_queue_requests=10)
    door.measure(1000)
    assert door.come(8) is None
    assert code(door.come(3)) == "queue_full"
    assert door.admission.num_waiting == 8
    assert door.come(2) is None


def test_tokens_are_limited_too() -> None:
    door = Door(max_queue_tokens=1000)
    assert door.come(2, 400) is None
    assert code(door.come(1, 201)) == "queue_full"
    assert door.come(1, 200) is None
    assert door.admission.num_waiting_tokens == 1000


def test_an_empty_queue_takes_any_request() -> None:
    door = Door(max_queue_requests=2, max_queue_tokens=100)
    door.measure(1000)
    assert door.come(50, 5000) is None
    assert code(door.come()) == "queue_full"


def test_zero_is_no_limit() -> None:
    door = Door(max_queue_requests=0, max_queue_tokens=0)
    assert all(door.come(8, 1000) is None for _ in range(500))


@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_a_client_below_its_share_is_let_in_where_others_fill_the_queue(unit: str) -> None:
    door = Door(**{f"max_queue_{unit}": 12 if unit == "requests" else 120})
    door.measure(1000)
    while door.come(client="many") is None:
        pass
    assert [code(door.come(client="one")) for _ in range(7)] == [None] * 6 + ["queue_full"]
    assert code(door.come(client="many")) == "queue_full"
    assert [code(door.come(client="late")) for _ in range(5)] == [None] * 4 + ["queue_full"]
    counts = door.admission.num_refused_by_client
    assert counts == {"many": 2, "one": 1, "late": 1}


def test_whoever_leaves_makes_room_once() -> None:
    door = Door(max_queue_requests=2)
    door.measure(1000)
    door.come(), door.come()
    gone = door.waiting.pop()
    door.admission.leave(gone, 0)
    door.admission.on_step(StepOutputs(finished=[Finish(gone.request_id, "abort")]))
    door.admission.on_step(StepOutputs(started=[Started(gone.request_id, 0, 0.0)]))
    assert door.admission.num_waiting == 1
    assert door.come() is None
    assert code(door.come()) == "queue_full"


def test_clients_are_counted_by_name_up_to_a_bound() -> None:
    door = Door(max_queue_requests=1)
    for i in range(3000):
        while door.come(client=f"c{i}") is None:
            pass
    counts = door.admission.num_refused_by_client
    assert len(counts) == 1001
    assert counts["others"] == 2000


def test_counts_return_to_zero() -> None:
    door = Door()
    for i in range(40):
        door.come(client=f"c{i % 3}")
    while door.waiting or door.running:
        door.step(10)
        door.end()
    admission = door.admission
    assert (admission.num_waiting, admission.num_waiting_tokens) == (0, 0)
    assert admission.predicted_wait_s() == 0
    assert not admission._by_client
    assert not admission._sequences


def test_the_wait_is_predicted_from_the_measured_rate() -> None:
    door = Door(max_queue_requests=0)
    door.measure(1000)
    for _ in range(100):  # learn what an output comes to
        door.end(90), door.come(), door.step(100)
    assert door.admission.tokens_per_s == pytest.approx(1000, rel=0.01)
    for _ in range(50):
        door.come(tokens=10)
    # 50 sequences of 10 + 90 tokens at 1,000 a second.
    assert door.admission.predicted_wait_s() == pytest.approx(5.0, rel=0.15)
    # A client with nothing waiting has the next turn but one.
    assert door.admission.predicted_wait_s("new") < 0.2
    assert door.admission.predicted_wait_s("") == door.admission.predicted_wait_s()


def test_idle_time_does_not_count_as_slow() -> None:
    door = Door()
    door.measure(1000)
    while door.running:
        door.end()
    door.step(1)
    door.now_s += 3600
    door.come()
    door.step(100)
    assert door.admission.tokens_per_s == pytest.approx(1000, rel=0.05)


def test_time_without_steps_under_load_does() -> None:
    door = Door()
    door.measure(1000)
    door.now_s += 30
    door.step(100)
    assert door.admission.tokens_per_s < 400


def test_retry_after_is_bounded_and_grows_with_those_who_were_told_before() -> None:
    door = Door(max_queue_requests=40)
    door.measure(1000)
    while (error := door.come()) is None:
        pass
    waits = [retry_s(error), *(retry_s(door.come()) for _ in range(1000))]
    assert waits[0] == 1.0
    assert waits == sorted(waits)
    # Each is told a time of its own, as far apart as the engine takes for one, 110 tokens.
    assert waits[200] - waits[100] == pytest.approx(11.0, rel=0.01)
    assert 45 <= waits[-1] <= 60
    door.now_s += 300
    assert retry_s(door.come()) == 1.0


def test_retry_after_headers_agree_and_are_spread() -> None:
    waits = set()
    for jitter in (0.0, 0.5, 0.999):
        door = Door(jitter=jitter, max_queue_requests=1)
        door.measure(1000)
        door.come()
        error = door.come()
        assert error is not None
        assert error.status == 429
        assert error.error.type == "rate_limit_error"
        assert int(error.headers["retry-after"]) == math.ceil(retry_s(error))
        assert 1 <= retry_s(error) <= 60
        waits.add(retry_s(error))
    assert len(waits) == 3


def test_nothing_measured_is_a_second() -> None:
    door = Door(max_queue_requests=1)
    for _ in range(ROWS + 1):
        door.come()
    assert retry_s(door.come()) == 1.0


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    door = Door(max_queue_requests=0)
    door.measure(1000)
    for _ in range(100):
        door.come()
    wait_s = door.admission.predicted_wait_s()
    assert wait_s > 5
    error = door.come(timeout_s=wait_s - 4)
    assert code(error) == "deadline_unreachable"
    assert retry_s(error) == pytest.approx(4, abs=0.5)
    assert door.come(timeout_s=wait_s + 1) is None
    assert door.come(timeout_s=1.0, client="another") is None  # whose turn comes sooner
    late = door.come(timeout_s=-1.0)
    assert late is not None
    assert late.status == 504


def test_by_priority_nobody_can_tell_who_will_be_late() -> None:
    door = Door(policy="priority", max_queue_requests=0)
    door.measure(1000)
    for _ in range(100):
        door.come()
    assert door.come(timeout_s=1.0) is None


def test_with_rows_free_a_sequence_waits_for_prompts_only() -> None:
    door = Door()
    door.come()
    for _ in range(100):
        door.step(100)
    door.come(3, 500)
    assert door.admission.predicted_wait_s() == pytest.approx(1.5, rel=0.05)
    door.step(100, kv_usage=0.95)  # memory is what is short
    door.come(1, 500)
    assert door.admission.predicted_wait_s() == pytest.approx(0.6, rel=0.1)

"""The order of the waiting queue: fair between clients, by rank within each, in bounded memory."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from octavo.sched.request import Request
from octavo.sched.waiting_queue import WaitingQueue
from octavo.types import EngineRequest, SamplingParams


class Line:
    """A queue and the requests in it; `serve` runs one request from start to end."""

    def __init__(self, **options: object) -> None:
        self.queue = WaitingQueue(**{"policy": "fcfs", **options})  # type: ignore[arg-type]
        self.num_arrived = 0
        self.tokens: Counter[str] = Counter()

    def add(self, client: str = "", prompt_len: int = 10, **fields: object) -> Request:
        spec = EngineRequest(
            request_id=self.num_arrived,
            prompt_token_ids=(1,) * prompt_len,
            params=SamplingParams(),
            max_total_len=1000,
            client=client,
            **fields,  # type: ignore[arg-type]
        )
        request = Request(spec, self.num_arrived)
        self.num_arrived += 1
        self.queue.push(request)
        return request

    def start(self) -> Request:
        assert self.queue.peek() is not None
        request = self.queue.pop()
        request.start(0, None, 0.0)  # type: ignore[arg-type]
        return request

    def end(self, request: Request, num_output: int = 0) -> None:
        self.queue.settle(request, num_output)
        request.finish()
        self.tokens[request.spec.client] += request.prompt_len + num_output

    def abort(self, request: Request) -> None:
        self.queue.discard(request)
        self.queue.settle(request, 0)
        request.finish()

    def serve(self, num_output: int = 0) -> Request:
        request = self.start()
        self.end(request, num_output)
        return request


def test_a_thousand_requests_of_one_client_do_not_delay_anothers() -> None:
    line = Line()
    for _ in range(1000):
        line.add("many")
    for _ in range(100):
        line.serve(20)
    single = line.add("one")
    assert single in [line.serve(20), line.serve(20)]


def test_equal_shares_whatever_the_sizes() -> None:
    line = Line()
    for _ in range(1000):
        line.add("short", 5)
        line.add("long", 100)
    for _ in range(300):
        client = line.queue.peek().spec.client  # type: ignore[union-attr]
        line.serve(100 if client == "short" else 10)
    assert abs(line.tokens["short"] - line.tokens["long"]) <= 120


def test_a_client_that_comes_back_has_no_credit_for_its_absence() -> None:
    line = Line()
    line.add("early")
    for _ in range(100):
        line.add("steady")
    for _ in range(50):
        line.serve()
    for _ in range(50):
        line.add("early")
    turns = Counter(line.serve().spec.client for _ in range(20))
    assert turns["steady"] >= 9


def test_aborted_requests_cost_their_client_nothing() -> None:
    line = Line()
    for request in [line.add("a", 500) for _ in range(50)]:
        line.abort(request)
    line.add("b"), line.add("b"), line.add("a")
    assert [line.serve().spec.client for _ in range(2)] == ["b", "a"]


def test_a_preempted_request_is_its_clients_next_and_pays_once() -> None:
    line = Line()
    first = line.add("a", 10)
    line.add("a", 10), line.add("b", 10)
    assert line.start() is first
    first.preempt(first.token_ids)
    line.queue.push(first)
    assert [line.serve().spec.client for _ in range(2)] == ["b", "a"]
    assert first.num_preemptions == 1
    assert len(line.queue) == 1


def test_no_priority_can_starve_another_for_ever() -> None:
    line = Line(policy="priority", priority_ageing_s=10.0)
    patient = line.add(priority=3, arrival_s=0.0)
    served = []
    for second in range(100):
        line.add(priority=0, arrival_s=float(second))
        served.append(line.serve())
    assert served.index(patient) == 30


def test_priority_is_a_clients_own_affair() -> None:
    line = Line(policy="priority", priority_ageing_s=10.0)
    for _ in range(10):
        line.add("pushy", priority=-1000)
    line.add("modest", priority=5)
    assert "modest" in [line.serve().spec.client for _ in range(2)]


def test_ten_thousand_clients_cost_bounded_memory() -> None:
    line = Line()
    line.add("anchor", 1)
    anchor = line.start()  # always one alive: the queue is never reset
    for i in range(10_000):
        line.add(f"client-{i}")
        if i % 2:
            line.serve(5)
        else:
            line.abort(line.queue.peek())  # type: ignore[arg-type]
    queue = line.queue
    assert queue.num_clients <= 1100
    assert len(queue._turns) + len(queue._idle) <= 4000
    line.end(anchor)
    assert queue.num_clients == 0


def test_aborts_behind_a_head_that_does_not_move_cost_bounded_memory() -> None:
    line = Line()
    line.add("x")
    for i in range(5000):
        line.abort(line.add(f"client-{i}" if i % 2 else "x"))
    queue = line.queue
    entries = sum(len(client.heap) for client in queue._clients.values()) + len(queue._turns)
    assert entries <= 2 * queue.num_clients + 100
    assert len(queue) == 1


events = st.lists(
    st.tuples(
        st.sampled_from(["add", "add", "serve", "start", "end", "preempt", "abort"]),
        st.sampled_from("abcd"),
        st.integers(1, 50),
        st.integers(-2, 2),
    ),
    max_size=120,
)


@examples(300)
@given(events, st.sampled_from(["fcfs", "priority"]), st.sampled_from([0.0, 3.0]))
def test_the_next_is_always_the_one_of_lowest_rank(
    events: list[tuple[str, str, int, int]], policy: str, ageing_s: float
) -> None:
    """Against the plain definition: of the client that was given least, the first by its key."""
    line = Line(policy=policy, priority_ageing_s=ageing_s)
    waiting: list[Request] = []
    running: list[Request] = []
    for now, (event, client, size, priority) in enumerate(events):
        if event == "add":
            waiting.append(line.add(client, size, priority=priority, arrival_s=float(now)))
        elif event in ("serve", "start") and waiting:
            assert line.queue.peek() is min(waiting, key=line.queue.rank)
            request = line.start()
            waiting.remove(request)
            if event == "start":
                running.append(request)
            else:
                line.end(request, size)
        elif event == "end" and running:
            line.end(running.pop(0), size)
        elif event == "preempt" and running:
            request = running.pop()
            request.preempt(request.token_ids)
            line.queue.push(request)
            waiting.append(request)
        elif event == "abort" and waiting:
            line.abort(waiting.pop(size % len(waiting)))
        assert len(line.queue) == len(waiting)
    while waiting:
        waiting.remove(line.serve())
    assert line.queue.peek() is None

"""`WaitingQueue`: requests that have no row yet, in order of policy."""

from __future__ import annotations

import heapq

from octavo.config.sections import SchedulingPolicy
from octavo.sched.request import Request, Status


class WaitingQueue:
    """A heap by (priority, arrival); under "fcfs" priorities are ignored.

    A preempted request keeps its place in line by its arrival, so it comes before all who came
    later. Aborted requests are dropped lazily, when they reach the top.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._by_priority = policy == "priority"
        self._heap: list[tuple[int, int, Request]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def rank(self, request: Request) -> tuple[int, int]:
        """Place in line, lower first; also decides who is preempted (the highest)."""
        priority, arrival = request.order
        return (priority if self._by_priority else 0, arrival)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (*self.rank(request), request))
        self._num_waiting += 1

    def peek(self) -> Request | None:
        while self._heap and self._heap[0][2].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Request:
        request = self.peek()
        assert request is not None, "pop from an empty queue"
        heapq.heappop(self._heap)
        self._num_waiting -= 1
        return request

    def discard(self, request: Request) -> None:
        """Forget a waiting request that is about to be finished."""
        assert request.status is Status.WAITING
        self._num_waiting -= 1

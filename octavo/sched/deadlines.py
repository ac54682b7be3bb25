"""`Deadlines`: live requests that must be done by some time, the soonest first."""

from __future__ import annotations

import heapq

from octavo.sched.request import Request, Status

_SLACK = 64


class Deadlines:
    """A heap; requests that have finished are dropped lazily."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._limit = _SLACK

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, request: Request) -> None:
        deadline_s = request.spec.deadline_s
        if deadline_s is None:
            return
        heapq.heappush(self._heap, (deadline_s, request.arrival_index, request))
        if len(self._heap) > self._limit:  # most have finished long before their time
            self._heap = [e for e in self._heap if e[2].status is not Status.FINISHED]
            heapq.heapify(self._heap)
            self._limit = 2 * len(self._heap) + _SLACK

    def take_expired(self, now_s: float) -> list[Request]:
        """Live requests whose time is up; each is given once."""
        expired = []
        while self._heap and self._heap[0][0] <= now_s:
            request = heapq.heappop(self._heap)[2]
            if request.status is not Status.FINISHED:
                expired.append(request)
        return expired

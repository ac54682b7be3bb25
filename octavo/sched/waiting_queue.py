"""`WaitingQueue`: requests that have no row yet; fair between clients, in order within each."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from octavo.config.sections import SchedulingPolicy
from octavo.sched.request import Request, Status

# Clients without a request whose account is ahead of the others are remembered, so many at most.
_MAX_IDLE = 1024
# A heap is rebuilt when it holds twice as many entries as are alive, and so many more.
_SLACK = 16


@dataclass(slots=True, eq=False)
class _Client:
    """One client's requests and account.

    `served` is virtual time: the tokens that it was given, counted from where the others stood
    when it came. It grows only.
    """

    name: str
    index: int  # in order of appearance: breaks ties
    served: int
    num_live: int = 0  # requests, waiting or running
    num_waiting: int = 0
    heap: list[tuple[float, int, Request]] = field(default_factory=list)
    is_listed: bool = False  # has its entry in the queue's heap


class WaitingQueue:
    """Start-time fair queueing: the next request is one of the client that was given the least.

    A client pays with the tokens of its prompt when a request starts, and with those of its output
    when it ends; after a preemption nothing is paid twice. A client that comes, or comes back,
    begins where the one now served stands: it has the next turn, and no credit for the past.

    Within a client: by arrival, or under "priority" by arrival plus `priority_ageing_s` for each
    level. That rank does not change while a request waits, yet each second of waiting counts as
    much against all who come later. 0 seconds: strictly by priority.

    Aborted requests, and entries that are out of date, are dropped lazily. All operations are
    O(log n).
    """

    def __init__(self, policy: SchedulingPolicy, priority_ageing_s: float = 0.0) -> None:
        self._by_priority = policy == "priority"
        self._ageing_s = priority_ageing_s
        self._clients: dict[str, _Client] = {}
        self._turns: list[tuple[int, int, _Client]] = []  # heap by (served, index)
        self._idle: list[tuple[int, int, _Client]] = []  # heap by (served, index)
        self._now = 0  # virtual time: `served` of the client that had the last turn
        self._num_waiting = 0
        self._num_live = 0
        self._num_clients_seen = 0

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def num_clients(self) -> int:
        """Clients that are remembered."""
        return len(self._clients)

    def rank(self, request: Request) -> tuple[int, int, float, int]:
        """Place in line, lower first; also decides who is preempted (the highest): of the client
        that was given the most, the last in its line.
        """
        client = self._clients[request.spec.client]
        return (client.served, client.index, *self._key(request))

    def push(self, request: Request) -> None:
        """A new request, or one that was preempted: it keeps its place in its client's line."""
        client = self._client(request.spec.client)
        if request.num_preemptions == 0:
            client.num_live += 1
            self._num_live += 1
        if client.num_waiting == 0:
            client.served = max(client.served, self._now)
        heapq.heappush(client.heap, (*self._key(request), request))
        client.num_waiting += 1
        self._num_waiting += 1
        if not client.is_listed:
            self._list(client)

    def peek(self) -> Request | None:
        client = self._next_client()
        return None if client is None else self._head(client)

    def pop(self) -> Request:
        client = self._next_client()
        assert client is not None, "pop from an empty queue"
        request = self._head(client)
        heapq.heappop(client.heap)
        client.num_waiting -= 1
        self._num_waiting -= 1
        self._now = max(self._now, client.served)
        if request.num_preemptions == 0:
            client.served += request.prompt_len
        return request

    def discard(self, request: Request) -> None:
        """Forget a waiting request that is about to be finished."""
        assert request.status is Status.WAITING
        client = self._clients[request.spec.client]
        client.num_waiting -= 1
        self._num_waiting -= 1
        if len(client.heap) > 2 * client.num_waiting + _SLACK:
            client.heap = [
                entry
                for entry in client.heap
                if entry[2] is not request and entry[2].status is Status.WAITING
            ]
            heapq.heapify(client.heap)

    def settle(self, request: Request, num_output_tokens: int) -> None:
        """A request ends: its client pays for the output."""
        client = self._clients[request.spec.client]
        client.served += num_output_tokens
        client.num_live -= 1
        self._num_live -= 1
        if self._num_live == 0:  # nobody to be compared with
            self._clients.clear()
            self._turns.clear()
            self._idle.clear()
            self._now = 0
        elif client.num_live == 0:
            heapq.heappush(self._idle, (client.served, client.index, client))
            self._forget_idle()

    def _key(self, request: Request) -> tuple[float, int]:
        spec = request.spec
        if not self._by_priority:
            return (0.0, request.arrival_index)
        if self._ageing_s == 0.0:
            return (float(spec.priority), request.arrival_index)
        return (spec.arrival_s + spec.priority * self._ageing_s, request.arrival_index)

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            client = _Client(name, self._num_clients_seen, self._now)
            self._clients[name] = client
            self._num_clients_seen += 1
        return client

    def _list(self, client: _Client) -> None:
        if len(self._turns) > 2 * len(self._clients) + _SLACK:
            for _, _, other in self._turns:
                other.is_listed = other.num_waiting > 0
            self._turns = [
                (other.served, other.index, other) for _, _, other in self._turns if other.is_listed
            ]
            heapq.heapify(self._turns)
        client.is_listed = True
        heapq.heappush(self._turns, (client.served, client.index, client))

    def _next_client(self) -> _Client | None:
        """The client whose turn it is; what stands before it and is out of date goes."""
        while self._turns:
            served, _, client = self._turns[0]
            if client.num_waiting == 0:
                heapq.heappop(self._turns)
                client.is_listed = False
            elif served < client.served:
                heapq.heapreplace(self._turns, (client.served, client.index, client))
            else:
                return client
        return None

    def _head(self, client: _Client) -> Request:
        while client.heap[0][2].status is not Status.WAITING:
            heapq.heappop(client.heap)
        return client.heap[0][2]

    def _forget_idle(self) -> None:
        """Drop clients that the others have caught up with: they would begin anew just the same.
        Of too many, those go that are the least ahead.
        """
        while self._idle and (len(self._idle) > _MAX_IDLE or self._idle[0][0] <= self._now):
            _, _, client = heapq.heappop(self._idle)
            if client.num_live == 0 and self._clients.get(client.name) is client:
                del self._clients[client.name]

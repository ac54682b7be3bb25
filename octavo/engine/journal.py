"""The journal of live requests: what each asked for and what it has received, and with that the
means to go on in another engine process when one has died.

Which requests go on, and when, is decided here, too. A death may be a request's own doing, so after
two of them without progress the requests that were there both times are tried in halves, each after
the one before it has got past the point where the engine died. The half that kills is halved again
until one request is left, and dies alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from octavo.types import (
    MAX_CHUNKS,
    Chunk,
    EngineRequest,
    Finish,
    RequestUpdate,
    StepOutputs,
)

# Tokens beyond what was received before the engine died, after which a request is past the point of
# that death: the engine may have been computing the next ones already.
_PAST = 4
_SUSPECT = 2  # deaths without progress between them


class Entry:
    """One request: its outputs gathered until its reader takes them, and its part in deaths."""

    __slots__ = (
        "_arrived",
        "_update",
        "in_engine",
        "is_ending",
        "num_deaths",
        "num_known",
        "num_prompt_logprobs",
        "num_skip",
        "request",
        "started",
        "token_ids",
    )

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.token_ids = array("i")  # received so far, over all engines
        self.num_prompt_logprobs = 0  # received so far
        self.num_skip = 0  # prompt logprobs that the present engine will send again
        self.started = False
        self.in_engine = False
        self.is_ending = False  # an abort is on its way
        self.num_deaths = 0  # of engines it was in, without progress between them
        self.num_known = 0  # tokens received when the last of them died
        self._update = RequestUpdate()
        self._arrived = asyncio.Event()

    async def next(self) -> RequestUpdate:
        """Everything received since the last call; waits for at least one event."""
        await self._arrived.wait()
        self._arrived.clear()
        update, self._update = self._update, RequestUpdate()
        return update

    def put(self) -> RequestUpdate:
        """The update to add to; wakes the reader."""
        self._arrived.set()
        return self._update

    def add_chunk(self, chunk: Chunk) -> None:
        """Nothing to wake the reader for."""
        before = self._update.chunks
        if len(before) == MAX_CHUNKS:
            before, last = before[:-1], before[-1]
            num_tokens, step_s = last.num_tokens + chunk.num_tokens, last.step_s + chunk.step_s
            chunk = Chunk(num_tokens, chunk.end_s, step_s)
        self._update.chunks = (*before, chunk)

    @property
    def is_past(self) -> bool:
        """Has it got further than it had when the engine died?"""
        return len(self.token_ids) >= self.num_known + _PAST

    def enter(self) -> EngineRequest:
        """The request as an engine that knows nothing of it must be asked."""
        self.in_engine = True
        self.num_skip = self.num_prompt_logprobs
        if self.num_deaths:
            self._update.resumed_s += (time.monotonic(),)
        if not self.token_ids:
            return self.request
        return dataclasses.replace(self.request, output_token_ids=tuple(self.token_ids))

    def die(self) -> None:
        """The engine it was in has died."""
        self.num_deaths = 1 if self.is_past else self.num_deaths + 1
        self.num_known = len(self.token_ids)
        self.in_engine = False


class Journal:
    """The live requests of a server. Only the supervisor writes it."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._groups: deque[list[Entry]] = deque()  # held back, to enter one after the other
        self._on_trial: list[Entry] = []  # in the engine; must get past before others enter

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    @property
    def num_in_engine(self) -> int:
        return sum(entry.in_engine for entry in self._entries.values())

    @property
    def has_waiting(self) -> bool:
        """Are there requests for `admit` to look at?"""
        return bool(self._groups)

    @property
    def is_waiting_for_trial(self) -> bool:
        """Are there suspects that have yet to show whether they kill?"""
        return any(entry.num_deaths >= _SUSPECT for group in self._groups for entry in group)

    def add(self, request: EngineRequest) -> Entry:
        """A new request; it enters an engine with the next `admit`."""
        entry = self._entries[request.request_id] = Entry(request)
        self._groups.append([entry])
        return entry

    def get(self, request_id: int) -> Entry | None:
        return self._entries.get(request_id)

    def admit(self) -> list[Entry]:
        """Those that may enter the engine now, in order."""
        admitted: list[Entry] = []
        while self._groups and self._trial_is_over():
            group = [entry for entry in self._groups.popleft() if self._is_live(entry)]
            self._on_trial += [entry for entry in group if entry.num_deaths >= _SUSPECT]
            admitted += group
        return admitted

    def _trial_is_over(self) -> bool:
        self._on_trial = [e for e in self._on_trial if self._is_live(e) and not e.is_past]
        return not self._on_trial

    def record(self, outputs: StepOutputs) -> None:
        """Hand a step's outputs to their requests."""
        entries = self._entries
        for started in outputs.started:
            entry = entries.get(started.request_id)
            if entry is not None and not entry.started:
                entry.started = True
                entry.put().started = started
        for request_id, num_tokens in outputs.chunks:
            if (entry := entries.get(request_id)) is not None:
                step_s = outputs.stats.step_s
                entry.add_chunk(Chunk(num_tokens, time.monotonic(), step_s))
        for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            if (entry := entries.get(request_id)) is not None:
                entry.token_ids.append(token_id)
                entry.put().token_ids.append(token_id)
        for request_id, logprobs in outputs.logprobs.items():
            if (entry := entries.get(request_id)) is not None:
                entry.put().logprobs.append(logprobs)
        for request_id, positions in outputs.prompt_logprobs.items():
            if (entry := entries.get(request_id)) is not None:
                fresh = positions[entry.num_skip :]
                entry.num_skip -= len(positions) - len(fresh)
                entry.num_prompt_logprobs += len(fresh)
                entry.put().prompt_logprobs.extend(fresh)
        for finish in outputs.finished:
            self.finish(finish)

    def finish(self, finish: Finish) -> None:
        """The request's terminal message; unknown ids are ignored."""
        if (entry := self._entries.pop(finish.request_id, None)) is not None:
            entry.put().finish = finish

    def bury(self) -> Entry | None:
        """The engine has died. Its requests wait for `admit`, suspects in halves; the one that is
        found to have killed it is returned instead, for the caller to finish.
        """
        for entry in self:
            if entry.in_engine and entry.is_ending:
                self.finish(Finish(entry.request.request_id, "abort"))
        dead = [entry for entry in self if entry.in_engine]
        for entry in dead:
            entry.die()
        suspects = [entry for entry in dead if entry.num_deaths >= _SUSPECT]
        others = [entry for entry in dead if entry.num_deaths < _SUSPECT]
        self._on_trial = []
        if suspects and len(dead) == 1:
            [killer] = suspects
            return killer
        middle = (len(suspects) + 1) // 2
        # Those that had got on come last: a suspect that is left alone with a death has caused it.
        groups = [suspects[:middle], suspects[middle:], others]
        self._groups.extendleft(group for group in reversed(groups) if group)
        return None

    def _is_live(self, entry: Entry) -> bool:
        return self._entries.get(entry.request.request_id) is entry


def requests_of(entries: Sequence[Entry]) -> list[EngineRequest]:
    """What to send an engine for each of them."""
    return [entry.enter() for entry in entries]

"""The journal of live requests: what each asked for and what it has received, and with that the
means to go on in another engine process when one has died.

Which requests go on, and when, is decided here, too. A death may be the doing of a request in the
steps that did not end. After two of them without progress, those that were there both times are
tried in halves, each after the one before it has got past the point where the engine died. The half
that kills is halved again until one request is left, and is alone in the step that kills a third
time. Where the engine was killed by a signal that anybody may have sent, that must have happened to
it more often.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping

from octavo.engine.tape import Span
from octavo.types import (
    MAX_CHUNKS,
    Chunk,
    EngineRequest,
    Finish,
    RequestUpdate,
    StepOutputs,
)

# Tokens beyond those received before the engine died, after which a request is past the point of
# that death: the engine is ahead of what has been received by the step that it is in, and by those
# that it has scheduled ahead (none on a CPU, one on a GPU).
_PAST = 4
_SLACK = 16  # groups that may have emptied before they are looked through
_SUSPECT = 2  # deaths without progress between them
_KILLS = 4  # signals from who knows where that must have hit a request when it was alone


class Entry:
    """One request: its outputs gathered until its reader takes them, and its part in deaths."""

    __slots__ = (
        "_arrived",
        "_update",
        "has_entered",
        "heard_s",
        "in_engine",
        "num_alone",
        "num_deaths",
        "num_known",
        "num_prompt_logprobs",
        "num_skip",
        "reached",
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
        self.has_entered = False  # an engine, be it dead by now
        self.heard_s = time.monotonic()  # when its last token came
        self.num_deaths = 0  # of engines in a step of its own, without progress between them
        self.num_alone = 0  # those of them in which the step was nobody else's
        self.num_known = 0  # tokens received when the last of them died
        self.reached = 0  # position to which that step would have brought it
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
        self.num_skip = self.num_prompt_logprobs
        if self.has_entered:
            self._update.resumed_s += (time.monotonic(),)
        self.in_engine = self.has_entered = True
        if not self.token_ids:
            return self.request
        return dataclasses.replace(self.request, output_token_ids=tuple(self.token_ids))

    def die(self, span: Span | None, is_alone: bool) -> None:
        """The engine has died in a step that was to compute these positions of it, if that is
        known, and of nobody else if it `is_alone`.
        """
        if self.is_past if span is None else span[0] >= self.reached:
            self.num_deaths = self.num_alone = 0
        self.num_deaths += 1
        self.num_alone += is_alone
        self.num_known = len(self.token_ids)
        self.reached = 0 if span is None else span[1]

    def is_guilty(self, was_killed: bool) -> bool:
        """Has it, alone in the last step, ended too many engines for a coincidence?"""
        return self.num_deaths > _SUSPECT and self.num_alone >= (_KILLS if was_killed else 1)


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
        entries, now_s = self._entries, time.monotonic()
        for started in outputs.started:
            entry = entries.get(started.request_id)
            if entry is not None and not entry.started:
                entry.started = True
                entry.put().started = started
        for request_id, num_tokens in outputs.chunks:
            if (entry := entries.get(request_id)) is not None:
                step_s = outputs.stats.step_s
                entry.add_chunk(Chunk(num_tokens, now_s, step_s))
        for request_id, token_id in zip(outputs.request_ids, outputs.token_ids, strict=True):
            if (entry := entries.get(request_id)) is not None:
                entry.heard_s = now_s
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
            if len(self._groups) > 2 * len(self._entries) + _SLACK:
                groups = [[e for e in group if self._is_live(e)] for group in self._groups]
                self._groups = deque(group for group in groups if group)

    def shows_success(self, outputs: StepOutputs) -> bool:
        """Has a request got past its point, or come to a good end? To be asked before `record`."""
        entries = (self._entries.get(request_id) for request_id in outputs.request_ids)
        return any(finish.reason in ("stop", "length") for finish in outputs.finished) or any(
            entry.is_past for entry in entries if entry is not None
        )

    def bury(
        self, in_flight: Mapping[int, Span] | None, *, was_killed: bool = False
    ) -> Entry | None:
        """The engine has died. Its requests wait for `admit`, suspects in halves, the others by how
        long they have heard nothing; the one that is found to have killed it is returned instead,
        for the caller to finish.

        Args:
            in_flight: the requests in the steps that did not end: no other can have killed it. None
                if that is not known.
            was_killed: by a signal that may have come from anybody.
        """
        dead = [entry for entry in self if entry.in_engine]
        dead.sort(key=lambda entry: entry.heard_s)
        spans = (
            dict.fromkeys(e.request.request_id for e in dead) if in_flight is None else in_flight
        )
        blamed = [entry for entry in dead if entry.request.request_id in spans]
        is_alone = len(spans) == 1  # of those that have been aborted since, too
        for entry in dead:
            entry.in_engine = False
        for entry in blamed:
            entry.die(spans[entry.request.request_id], is_alone)
        suspects = [entry for entry in blamed if entry.num_deaths >= _SUSPECT]
        self._on_trial = []
        # Two deaths may be an operator's or the kernel's doing; a third, tried alone, is its own.
        if is_alone and suspects and suspects[0].is_guilty(was_killed):
            [killer] = suspects
            self._hold([entry for entry in dead if entry is not killer])
            return killer
        others = [entry for entry in dead if entry not in suspects]
        middle = (len(suspects) + 1) // 2
        # Those that had got on come last: a suspect that is left alone with a death has caused it.
        self._hold(suspects[:middle], suspects[middle:], others)
        return None

    def _hold(self, *groups: list[Entry]) -> None:
        """Before all who wait already."""
        self._groups.extendleft(group for group in reversed(groups) if group)

    def _is_live(self, entry: Entry) -> bool:
        return self._entries.get(entry.request.request_id) is entry

"""Stop strings in streamed text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache


class StopMatcher:
    """Finds the stop string that is complete first, in text that comes in pieces.

    Of several that are complete at the same character, the longest counts. Text is held back only
    while it may be the beginning of a stop string, and no longer.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        self._include_stop = include_stop
        self._automaton = _automaton(tuple(stops))
        self._node = 0
        self._held = ""

    def push(self, delta: str) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string that was found.

        After a match the text ends before it (or after it, with `include_stop`) and nothing more
        may be pushed.
        """
        automaton = self._automaton
        text = self._held + delta
        for end, char in enumerate(delta, start=len(self._held) + 1):
            self._node = automaton.step(self._node, char)
            stop = automaton.match[self._node]
            if stop is not None:
                self._held = ""
                return text[: end if self._include_stop else end - len(stop)], stop
        cut = len(text) - automaton.depth[self._node]
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        held, self._held, self._node = self._held, "", 0
        return held


class _Automaton:
    """Aho and Corasick's: it reads each character once, so neither the pieces nor the number of
    stop strings matter. Nothing changes after it is made.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.depth = [0]  # characters from the root, i.e. how much of a stop string has begun
        self.match: list[str | None] = [None]  # the longest stop string that ends here
        self._children: list[dict[str, int]] = [{}]
        for stop in stops:
            self._insert(stop)
        self._fallback = [0] * len(self._children)
        self._link()

    def step(self, node: int, char: str) -> int:
        while node and char not in self._children[node]:
            node = self._fallback[node]
        return self._children[node].get(char, 0)

    def _insert(self, stop: str) -> None:
        node = 0
        for char in stop:
            if char not in self._children[node]:
                self._children[node][char] = len(self._children)
                self._children.append({})
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = self._children[node][char]
        self.match[node] = stop

    def _link(self) -> None:
        """Lead each node to the one of its longest proper suffix; nearest to the root first."""
        queue = deque(self._children[0].values())
        while queue:
            node = queue.popleft()
            suffix = self._fallback[node]
            if self.match[node] is None:
                self.match[node] = self.match[suffix]
            for char, child in self._children[node].items():
                self._fallback[child] = self.step(suffix, char)
                queue.append(child)


# Long stop strings take milliseconds, which a request's many outputs must not each take again.
_automaton = lru_cache(maxsize=4)(_Automaton)

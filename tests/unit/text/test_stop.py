from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from octavo.text.stop import StopMatcher

ALPHABET = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=5)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Look at the whole text after every character."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(text: str, stops: list[str], include: bool, cuts: list[int]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    edges = [0, *sorted(c for c in cuts if c < len(text)), len(text)]
    shown = ""
    for start, end in pairwise(edges):
        piece, stop = matcher.push(text[start:end])
        shown += piece
        if stop is not None:
            return shown, stop
    return shown + matcher.flush(), None


@given(text=ALPHABET, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 30)))
def test_equals_a_search_of_the_whole_text(text, stops, include, cuts):
    assert stream(text, stops, include, cuts) == naive(text, stops, include)


@given(text=ALPHABET, stops=STOPS)
def test_holds_back_no_more_than_it_must(text, stops):
    if naive(text, stops, False)[1] is not None:
        return
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(char)[0] for char in text)
    may_begin = [
        length
        for length in range(len(text) + 1)
        if any(stop.startswith(text[len(text) - length :]) for stop in stops) or length == 0
    ]
    assert len(text) - len(shown) == max(may_begin)


def test_include_stop():
    assert StopMatcher(["END"], include_stop=True).push("the ENDing") == ("the END", "END")
    assert StopMatcher(["END"]).push("the ENDing") == ("the ", "END")


def test_the_first_complete_one_wins():
    assert StopMatcher(["abcd", "bc"]).push("abcd") == ("a", "bc")
    assert StopMatcher(["b", "ab"]).push("ab") == ("", "ab")


def test_held_text_comes_out_at_the_end():
    matcher = StopMatcher(["###"])
    assert matcher.push("a##") == ("a", None)
    assert matcher.push("b#") == ("##b", None)
    assert matcher.flush() == "#"
    assert matcher.flush() == ""


def test_the_outputs_of_a_request_share_the_work():
    stops = ["x" * 16_000]
    one, other = StopMatcher(stops), StopMatcher(tuple(stops), include_stop=True)
    assert one._automaton is other._automaton
    assert one.push("x" * 9)[0] == other.push("y")[0][:-1] == ""  # but nothing else
    assert one.flush() == "x" * 9

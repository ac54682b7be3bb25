"""`share_prefill_budget`: who gets how much of a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from octavo.sched.share import share_prefill_budget

remaining_lists = st.lists(st.integers(1, 5000), max_size=12).map(lambda r: list(enumerate(r)))
budgets = st.integers(0, 2048)
thresholds = st.sampled_from([0, 0, 1, 7, 256])


@given(remaining_lists, budgets, thresholds)
def test_every_grant_is_fair_and_nothing_is_left_over(
    remaining: list[tuple[int, int]], budget: int, threshold: int
) -> None:
    chunks = share_prefill_budget(remaining, budget, threshold)
    grants = dict(chunks)
    wants = {row: min(left, threshold or left) for row, left in remaining}
    assert len(grants) == len(chunks)
    assert [row for row, _ in remaining if row in grants] == [row for row, _ in chunks]  # order
    assert all(0 < granted <= wants[row] for row, granted in chunks)
    assert sum(grants.values()) == min(budget, sum(wants.values()))


@given(remaining_lists.filter(bool), st.integers(1, 2048), thresholds)
def test_the_oldest_never_starves(
    remaining: list[tuple[int, int]], budget: int, threshold: int
) -> None:
    oldest, left = remaining[0]
    granted = dict(share_prefill_budget(remaining, budget, threshold)).get(oldest, 0)
    assert granted >= min(left, threshold or left, budget - budget // 4)


@given(st.lists(st.integers(1000, 10_000), min_size=1, max_size=6), st.integers(8, 512))
def test_a_short_prompt_passes_long_ones(long_prompts: list[int], budget: int) -> None:
    """The youngest prompt, of `short` tokens, has a quarter of each step to itself."""
    short = 64
    left = dict(enumerate([*long_prompts, short]))
    row, steps = len(long_prompts), 0
    while row in left:
        for got, granted in share_prefill_budget(list(left.items()), budget):
            left[got] -= granted
        left = {r: n for r, n in left.items() if n}
        steps += 1
    assert steps <= -(-short // (budget // 4))


@given(remaining_lists.filter(bool), st.integers(1, 512), thresholds)
def test_everybody_gets_through(
    remaining: list[tuple[int, int]], budget: int, threshold: int
) -> None:
    left, total, steps = dict(remaining), sum(n for _, n in remaining), 0
    while left:
        for row, granted in share_prefill_budget(list(left.items()), budget, threshold):
            left[row] -= granted
        left = {row: n for row, n in left.items() if n}
        steps += 1
        assert steps <= total


def test_nothing_to_share() -> None:
    assert share_prefill_budget([], 100) == []
    assert share_prefill_budget([(3, 5)], 0) == []

"""How the prompts being computed share what a step's budget has left."""

from __future__ import annotations

from collections.abc import Sequence

# What the oldest prompt leaves to the others if it could take everything: one part in so many.
_RESERVE = 4


def share_prefill_budget(
    remaining: Sequence[tuple[int, int]], budget: int, threshold: int = 0
) -> list[tuple[int, int]]:
    """Chunks (row, num_tokens) for prompts (row, tokens remaining), which come oldest first.

    The oldest gets all it needs, except that a quarter of the budget stays for the others while
    they want it. That quarter goes to those with the least left to do, so a short prompt passes a
    long one; and as everybody becomes the oldest some day, nobody starves. What is left over goes
    to the oldest again.

    Args:
        remaining: tokens still to compute, all positive.
        budget: most tokens to hand out.
        threshold: most tokens for one prompt; 0: no limit.
    """
    if not remaining or budget <= 0:
        return []
    wants = [(row, min(left, threshold) if threshold else left) for row, left in remaining]
    (oldest, oldest_wants), others = wants[0], sorted(wants[1:], key=lambda want: want[1])
    reserve = min(budget // _RESERVE, sum(want for _, want in others))
    grants = {oldest: min(oldest_wants, budget - reserve)}
    left = budget - grants[oldest]
    for row, want in others:
        grants[row] = min(want, left)
        left -= grants[row]
    grants[oldest] += min(left, oldest_wants - grants[oldest])
    return [(row, grants[row]) for row, _ in remaining if grants[row]]

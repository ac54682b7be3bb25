"""Which rows of a step are of prompts, and which were generated."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.paged import PagedCache

from octavo.attention import AttentionSpec
from octavo.attention.cpu_backend import role_ends

SPEC = AttentionSpec(num_heads=1, num_kv_heads=1, head_dim=16, scale=1.0)
CHUNKS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 20)), min_size=1)


def is_prompt(ends: list[int]) -> list[bool]:
    """By row."""
    begins = [0, *ends[:-1]]
    return [
        bool(i % 2) for i, pair in enumerate(zip(begins, ends, strict=True)) for _ in range(*pair)
    ]


@given(CHUNKS)
def test_a_role_follows_from_the_position(chunks: list[tuple[int, int, int]]) -> None:
    """chunks: (context, length, prompt) of sequences 0, 1, ..."""
    cache = PagedCache([SPEC], num_blocks=400)
    for seq, (context, _, prompt_len) in enumerate(chunks):
        cache.prompt_lens[seq] = prompt_len
        if context:
            cache.step([(seq, context)])
    batch = cache.step([(seq, length) for seq, (_, length, _) in enumerate(chunks)])
    expected = [
        context + i < prompt_len for context, length, prompt_len in chunks for i in range(length)
    ]
    ends = role_ends(batch)
    assert is_prompt(ends) == expected
    assert ends[1:] == sorted({*ends[1:]})  # neighbours of one role are multiplied together
    last = cache.ends(batch, [len(chunks) - 1])
    assert is_prompt(role_ends(last)) == expected[-1:]

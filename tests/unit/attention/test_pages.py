"""Compressed rows of a batch's chunks, against the block tables they come from."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paged import PagedCache

from octavo.attention import AttentionSpec
from octavo.attention.pages import find_pages

SPEC = AttentionSpec(1, 1, 1, 1.0)
CHUNKS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=6)


@given(CHUNKS, st.integers(0, 3), st.sampled_from([1, 4, 16]))
def test_pages_are_those_of_the_block_tables(
    chunks: list[tuple[int, int]], num_decodes: int, block_size: int
) -> None:
    cache = PagedCache([SPEC], 512, block_size)
    steps = [(9 + i, 1) for i in range(num_decodes)]
    steps += [(seq, length) for seq, (_, length) in enumerate(chunks)]
    contexts = [(seq, context) for seq, (context, _) in enumerate(chunks) if context]
    cache.step([(9, 3), *contexts])
    batch = cache.step(steps, num_decodes)
    pages = find_pages(batch, block_size)
    lens = [length for _, length in chunks]
    assert pages.rows == slice(num_decodes, num_decodes + sum(lens))
    assert pages.query_starts.diff().tolist() == lens
    assert pages.seq_lens.tolist() == [cache.lens[seq] for seq in range(len(chunks))]
    starts = pages.page_starts.tolist()
    assert starts[0] == pages.query_starts[0] == 0
    assert starts[-1] == len(pages.page_ids)
    for seq in range(len(chunks)):
        own = pages.page_ids[starts[seq] : starts[seq + 1]].tolist()
        assert own == cache.tables[seq]
        last = int(pages.last_page_lens[seq])
        assert 1 <= last <= block_size
        assert (len(own) - 1) * block_size + last == cache.lens[seq]


def test_what_a_planner_reads_has_its_types() -> None:
    cache = PagedCache([SPEC])
    pages = find_pages(cache.step([(0, 1), (1, 9), (2, 4)]), 4)
    on_host = pages.query_starts, pages.page_starts, pages.last_page_lens, pages.seq_lens
    for tensor in (*on_host, pages.page_ids):
        assert tensor.dtype is torch.int32
        assert tensor.is_contiguous()

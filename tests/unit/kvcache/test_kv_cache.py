"""`KVCache`: tables, the prefix index and what becomes of released blocks."""

from __future__ import annotations

import numpy as np
import pytest

from octavo.kvcache import BlockTable, KVCache, PrefixMatch, extend_chain

BLOCK = 4


def chain_of(tokens: list[int], salt: str = "") -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, np.array(tokens, np.int32), BLOCK, salt)
    return chain


def opened(cache: KVCache, tokens: list[int], salt: str = "") -> BlockTable:
    """A table for the tokens, all of its full blocks published."""
    chain = chain_of(tokens, salt)
    table = cache.try_open(cache.match(chain, len(tokens)), chain, len(tokens))
    assert table is not None
    cache.commit(table, len(chain))
    return table


def make(num_blocks: int = 9, caching: bool = True) -> KVCache:
    return KVCache(num_blocks, BLOCK, enable_prefix_caching=caching)


def test_a_chain_grows_in_steps_to_what_it_would_be_at_once() -> None:
    tokens = np.arange(23, dtype=np.int32)
    chain: list[bytes] = []
    for length in (3, 4, 11, 23):
        extend_chain(chain, tokens[:length], BLOCK, "salt")
    assert chain == chain_of(list(range(23)), "salt")
    assert len(chain) == 5
    assert len(set(chain)) == 5


def test_a_block_hash_depends_on_all_that_stands_before_it() -> None:
    assert chain_of([1, 2, 3, 4, 5, 6, 7, 8])[1] != chain_of([0, 2, 3, 4, 5, 6, 7, 8])[1]


def test_a_salt_does_not_run_into_the_tokens() -> None:
    tokens = [int.from_bytes(b"abcd", "little")] * BLOCK
    assert len({*chain_of(tokens), *chain_of(tokens, "a"), *chain_of(tokens, "ab")}) == 3
    assert chain_of(tokens, "\ud800")  # half a surrogate pair is a salt like any other


def test_a_released_prefix_is_found_again() -> None:
    cache = make()
    first = opened(cache, list(range(10)))
    blocks = list(first.block_ids)
    assert len(blocks) == 3
    cache.release(first)
    assert cache.num_free_blocks == cache.num_usable_blocks
    match = cache.match(chain_of(list(range(10))), 10)
    assert match.block_ids == tuple(blocks[:2])
    again = opened(cache, list(range(10)))
    assert again.block_ids[:2] == blocks[:2]
    assert again.num_committed == 2
    cache.check_integrity([again])


def test_the_last_token_is_never_matched() -> None:
    """Something must be computed to sample from."""
    cache = make()
    opened(cache, list(range(8)))
    assert len(cache.match(chain_of(list(range(8))), 8).block_ids) == 1
    assert len(cache.match(chain_of(list(range(8))), 9).block_ids) == 2


def test_running_requests_share_blocks() -> None:
    cache = make()
    tables = [opened(cache, list(range(9))) for _ in range(3)]
    assert len({tuple(table.block_ids[:2]) for table in tables}) == 1
    assert cache.num_free_blocks == 8 - 2 - 3
    assert cache.usage == pytest.approx(5 / 8)
    cache.check_integrity(tables)
    for table in tables:
        cache.release(table)
    cache.check_integrity([])


def test_salts_separate() -> None:
    cache = make()
    opened(cache, list(range(9)), "a")
    assert cache.match(chain_of(list(range(9)), "b"), 9) == PrefixMatch()
    assert len(cache.match(chain_of(list(range(9)), "a"), 9).block_ids) == 2


def test_the_least_recently_released_content_is_evicted_first() -> None:
    cache = make(num_blocks=5)
    tables = {name: opened(cache, [name * 10 + i for i in range(4)]) for name in (1, 2, 3)}
    for name in (2, 1, 3):
        cache.release(tables[name])
    filler = opened(cache, [90, 91, 92, 93])  # the block that never held anything
    for expected_gone in (2, 1, 3):
        assert all(_cached(cache, n) for n in (2, 1, 3)[(2, 1, 3).index(expected_gone) :])
        cache.extend(filler)
        assert not _cached(cache, expected_gone)
        cache.check_integrity([filler])


def _cached(cache: KVCache, name: int) -> bool:
    tokens = [name * 10 + i for i in range(4)]
    return bool(cache.match(chain_of(tokens), 5).block_ids)


def test_a_sequences_end_is_evicted_before_its_beginning() -> None:
    cache = make(num_blocks=4)
    cache.release(opened(cache, list(range(12))))
    table = cache.try_open(PrefixMatch(), [], BLOCK)
    assert table is not None
    assert len(cache.match(chain_of(list(range(12))), 13).block_ids) == 2


def test_a_revived_block_is_neither_evicted_nor_counted_twice() -> None:
    cache = make(num_blocks=4)
    first = opened(cache, list(range(4)))
    [kept] = first.block_ids
    cache.release(first)
    match = cache.match(chain_of(list(range(4))), 5)
    # 3 free blocks: 1 to revive and 3 new ones do not fit, 1 and 2 do.
    assert cache.try_open(match, chain_of(list(range(4))), 16) is None
    assert cache.num_free_blocks == 3
    table = cache.try_open(match, chain_of(list(range(4))), 12)
    assert table is not None
    assert table.block_ids[0] == kept
    assert kept not in table.block_ids[1:]
    cache.check_integrity([table])


def test_spare_blocks_stay_free() -> None:
    cache = make(num_blocks=5)
    assert cache.try_open(PrefixMatch(), [], 9, spare=2) is None
    assert cache.num_free_blocks == 4
    assert cache.try_open(PrefixMatch(), [], 9, spare=1) is not None


def test_what_two_compute_at_once_stays_private_to_the_second() -> None:
    cache = make()
    chain = chain_of(list(range(8)))
    one = cache.try_open(cache.match(chain, 8), chain, 8)
    two = cache.try_open(cache.match(chain, 8), chain, 8)
    assert one is not None
    assert two is not None
    assert not set(one.block_ids) & set(two.block_ids)
    cache.commit(one, 2)
    cache.commit(two, 2)
    assert cache.match(chain, 9).block_ids == tuple(one.block_ids)
    cache.check_integrity([one, two])
    private = two.block_ids[-1]
    cache.release(two)
    # Nothing in them can be found, so they are the first to be reused.
    assert cache.extend(one) in range(1, 9)
    assert private not in cache.match(chain, 9).block_ids
    cache.check_integrity([one])


def test_extend_takes_one_block() -> None:
    cache = make(num_blocks=3)
    table = cache.try_open(PrefixMatch(), [], 1)
    assert table is not None
    assert cache.extend(table) == table.block_ids[-1]
    assert cache.num_free_blocks == 0
    with pytest.raises(IndexError):
        cache.extend(table)


def test_reset_forgets_content_and_leaves_blocks_with_their_owners() -> None:
    cache = make()
    running, released = opened(cache, list(range(9))), opened(cache, list(range(50, 59)))
    cache.release(released)
    blocks = list(running.block_ids)
    cache.reset_prefix_index()
    assert cache.match(chain_of(list(range(9))), 9) == PrefixMatch()
    assert cache.match(chain_of(list(range(50, 59))), 9) == PrefixMatch()
    assert running.block_ids == blocks
    cache.check_integrity([running])
    cache.release(running)
    cache.check_integrity([])
    assert cache.num_free_blocks == cache.num_usable_blocks


def test_without_prefix_caching_nothing_is_found() -> None:
    cache = make(caching=False)
    cache.release(opened(cache, list(range(9))))
    assert cache.match(chain_of(list(range(9))), 9) == PrefixMatch()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, t: c._pool.retain(t.block_ids[0]), "wrong count"),
        (lambda c, t: t.block_ids.append(t.block_ids[0]), "twice in one table"),
        (lambda c, t: t.block_ids.pop(), "wrong count"),
        (lambda c, t: t.block_ids.append(0), "block 0"),
        (lambda c, t: c._hash_of.popitem(), "index and inverse"),
        (lambda c, t: c._block_of.clear(), "index and inverse"),
        (lambda c, t: setattr(c._pool, "num_free", 0), "free list"),
        (lambda c, t: c._pool.release(t.block_ids[0], is_cached=True), "wrong count"),
    ],
)
def test_the_integrity_check_finds_damage(damage, message: str) -> None:
    cache = make()
    table = opened(cache, list(range(9)))
    cache.check_integrity([table])
    damage(cache, table)
    with pytest.raises(AssertionError, match=message):
        cache.check_integrity([table])

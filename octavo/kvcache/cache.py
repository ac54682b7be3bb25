"""`KVCache`: block tables of running requests over one pool, with prefix reuse.

A request's blocks, by position:

    [0, num_shared)          found in the prefix index: read only, held by reference
    [num_shared, num_full)   written by this request; published in the index by `commit` once full
    [num_full, end)          being written by this request alone

Only full blocks are ever published, and a published block is never written again, so no block has
two writers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from octavo.kvcache.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that already hold the beginning of a sequence."""

    block_ids: tuple[int, ...] = ()
    # The first block that was looked for and not found: a longer match needs it.
    missing: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class BlockTable:
    """One running request's blocks, in order of position."""

    block_ids: list[int]
    num_committed: int  # leading blocks that are shared or published
    chain: list[bytes] = field(repr=False)  # hashes of the full blocks known so far


class KVCache:
    """Owns block ids, reference counts and the prefix index."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._pool = BlockPool(num_blocks)
        self._block_of: dict[bytes, int] = {}  # the prefix index
        self._hash_of: dict[int, bytes] = {}  # its inverse: published blocks, free or in use

    @property
    def num_usable_blocks(self) -> int:
        return self._pool.num_blocks - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now; those with cached content count, as they can be
        evicted.
        """
        return self._pool.num_free

    @property
    def usage(self) -> float:
        """Share of the blocks that running requests hold, 0..1."""
        return 1.0 - self._pool.num_free / self.num_usable_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, chain: list[bytes], num_tokens: int) -> PrefixMatch:
        """The longest cached prefix, short of the last token: something must be computed to sample
        from.
        """
        if not self.enable_prefix_caching:
            return PrefixMatch()
        block_ids: list[int] = []
        for block_hash in chain[: (num_tokens - 1) // self.block_size]:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                return PrefixMatch(tuple(block_ids), missing=block_hash)
            block_ids.append(block_id)
        return PrefixMatch(tuple(block_ids))

    def holds(self, block_hash: bytes | None) -> bool:
        """Whether that block is in the index."""
        return block_hash in self._block_of

    def num_wanted_blocks(self, match: PrefixMatch, num_tokens: int) -> int:
        """Free blocks that `try_open` would take: new ones, and matched ones that nobody holds."""
        num_new = self.num_blocks_for(num_tokens) - len(match.block_ids)
        return num_new + sum(self._pool.ref_count(block_id) == 0 for block_id in match.block_ids)

    def try_open(
        self, match: PrefixMatch, chain: list[bytes], num_tokens: int, *, spare: int = 0
    ) -> BlockTable | None:
        """Reserve blocks for `num_tokens` tokens, the matched ones included.

        None, and nothing changed, if fewer than `spare` blocks would be left free.
        """
        if self.num_wanted_blocks(match, num_tokens) + spare > self._pool.num_free:
            return None
        num_new = self.num_blocks_for(num_tokens) - len(match.block_ids)
        for block_id in match.block_ids:
            self._pool.retain(block_id)
        table = BlockTable(list(match.block_ids), len(match.block_ids), chain)
        table.block_ids.extend(self._take() for _ in range(num_new))
        return table

    def extend(self, table: BlockTable) -> int:
        """One more block at the end of the table. Check `num_free_blocks` first."""
        block_id = self._take()
        table.block_ids.append(block_id)
        return block_id

    def commit(self, table: BlockTable, num_full_blocks: int) -> None:
        """Publish the table's first `num_full_blocks` blocks; `table.chain` must cover them.

        A block whose content is published already, by a request that computed the same, stays
        private.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(table.num_committed, num_full_blocks):
            block_hash, block_id = table.chain[index], table.block_ids[index]
            if block_hash not in self._block_of:
                self._block_of[block_hash] = block_id
                self._hash_of[block_id] = block_hash
        table.num_committed = max(table.num_committed, num_full_blocks)

    def release(self, table: BlockTable) -> None:
        """Give the table's blocks back, the end of the sequence first: it is evicted before its
        beginning.
        """
        for block_id in reversed(table.block_ids):
            self._pool.release(block_id, is_cached=block_id in self._hash_of)
        table.block_ids.clear()

    def reset_prefix_index(self) -> None:
        """Forget all cached content; blocks in use stay with their owners."""
        self._block_of.clear()
        self._hash_of.clear()

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise AssertionError unless pool, index and `tables` (all that are open) agree. For tests
        and idle times.
        """
        owners: dict[int, int] = {}
        for table in tables:
            assert len(set(table.block_ids)) == len(table.block_ids), "a block twice in one table"
            for block_id in table.block_ids:
                owners[block_id] = owners.get(block_id, 0) + 1
        free = set(self._pool.free_blocks())
        assert len(free) == self._pool.num_free, "free list and its length disagree"
        assert not ({0} & (owners.keys() | free)), "block 0 was handed out"
        for block_id in range(1, self._pool.num_blocks):
            expected = owners.get(block_id, 0)
            assert self._pool.ref_count(block_id) == expected, f"block {block_id}: wrong count"
            assert (block_id in free) == (expected == 0), f"block {block_id}: leaked or doubly used"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of, (
            "index and inverse differ"
        )

    def _take(self) -> int:
        block_id = self._pool.take()
        if (block_hash := self._hash_of.pop(block_id, None)) is not None:
            del self._block_of[block_hash]
        return block_id

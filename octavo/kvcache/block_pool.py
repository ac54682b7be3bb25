"""`BlockPool`: reference counts and the free list of the KV cache's blocks.

Free blocks form a doubly linked list in two plain lists, so that a block can leave the middle in
O(1) when a prefix hit revives it; a deque would need a scan. The head is reused first: blocks
without cached content go there, cached ones go to the tail in the order in which they were
released, which makes reuse least-recently-used.
"""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Blocks 1 .. num_blocks-1. Block 0 is never handed out: padding points at it.

    A block is either free (reference count 0, in the list) or in use (count >= 1, not in the list).
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks, got {num_blocks}")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self._ref_counts = [0] * num_blocks
        # Index 0 doubles as the sentinel of the circular list, as block 0 is never free.
        self._next: list[int] = [*range(1, num_blocks), 0]
        self._prev: list[int] = [num_blocks - 1, *range(num_blocks - 1)]

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def take(self) -> int:
        """Hand out the least recently used free block with one reference. The pool must not be
        empty.
        """
        block_id: int = self._next[0]
        if block_id == 0:
            raise IndexError("no free block")
        self._unlink(block_id)
        self._ref_counts[block_id] = 1
        return block_id

    def retain(self, block_id: int) -> None:
        """One more reference to a block, which may be free (revived by a prefix hit) or in use."""
        if self._ref_counts[block_id] == 0:
            self._unlink(block_id)
        self._ref_counts[block_id] += 1

    def release(self, block_id: int, *, is_cached: bool) -> None:
        """One reference less. At zero the block becomes free: last in line if its content is
        cached.
        """
        self._ref_counts[block_id] -= 1
        if self._ref_counts[block_id] == 0:
            after = self._prev[0] if is_cached else 0
            self._link(block_id, after)

    def free_blocks(self) -> Iterable[int]:
        """The free blocks, first to be reused first."""
        block_id = self._next[0]
        while block_id:
            yield block_id
            block_id = self._next[block_id]

    def _unlink(self, block_id: int) -> None:
        before, after = self._prev[block_id], self._next[block_id]
        self._next[before] = after
        self._prev[after] = before
        self.num_free -= 1

    def _link(self, block_id: int, before: int) -> None:
        after = self._next[before]
        self._next[before] = block_id
        self._prev[block_id] = before
        self._next[block_id] = after
        self._prev[after] = block_id
        self.num_free += 1

"""`BlockPool` against the same thing written with a plain list."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.examples import examples

from octavo.kvcache import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """The model: a list of free blocks, next to be reused first, and a dict of counts."""

    @initialize(num_blocks=st.integers(2, 9))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = list(range(1, num_blocks))
        self.counts: dict[int, int] = {}

    @precondition(lambda self: self.free)
    @rule()
    def take(self) -> None:
        expected = self.free.pop(0)
        assert self.pool.take() == expected
        self.counts[expected] = 1

    @precondition(lambda self: not self.free)
    @rule()
    def take_from_nothing(self) -> None:
        with pytest.raises(IndexError):
            self.pool.take()

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        """Any block: a free one is revived, wherever it is in the list."""
        block = data.draw(st.sampled_from(sorted([*self.free, *self.counts])))
        self.pool.retain(block)
        if block in self.free:
            self.free.remove(block)
        self.counts[block] = self.counts.get(block, 0) + 1

    @precondition(lambda self: self.counts)
    @rule(data=st.data(), is_cached=st.booleans())
    def release(self, data: st.DataObject, is_cached: bool) -> None:
        block = data.draw(st.sampled_from(sorted(self.counts)))
        self.pool.release(block, is_cached=is_cached)
        self.counts[block] -= 1
        if self.counts[block] == 0:
            del self.counts[block]
            self.free.insert(len(self.free) if is_cached else 0, block)

    @invariant()
    def agrees(self) -> None:
        assert list(self.pool.free_blocks()) == self.free
        assert self.pool.num_free == len(self.free)
        for block in range(1, self.pool.num_blocks):
            assert self.pool.ref_count(block) == self.counts.get(block, 0)


TestPool = PoolMachine.TestCase
TestPool.settings = examples(60, stateful_step_count=40)


def test_block_0_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take() for _ in range(4)) == [1, 2, 3, 4]


def test_a_pool_needs_a_block_besides_the_padding() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        BlockPool(1)

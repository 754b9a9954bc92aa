"""Blocks and tables: every block is free or owned once, whatever happens."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables


class Tables(RuleBasedStateMachine):
    """Random growth and release of slots, beside a dictionary of what should be there."""

    @initialize(num_blocks=st.integers(1, 40), block_size=st.integers(1, 7), num_slots=st.integers(1, 6))
    def make(self, num_blocks: int, block_size: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.tables = BlockTables(
            BlockPool(num_blocks), block_size=block_size, num_slots=num_slots, max_model_len=num_blocks * block_size
        )
        self.lengths: dict[int, int] = {}

    @precondition(lambda self: len(self.lengths) < self.num_slots)
    @rule()
    def take(self) -> None:
        slot = self.tables.take_slot()
        assert slot not in self.lengths
        self.lengths[slot] = 0

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), by=st.integers(1, 30))
    def grow(self, data: st.DataObject, by: int) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        tokens = self.lengths[slot] + by
        free = self.tables.pool.num_free
        missing = self.tables.blocks_for(tokens) - self.tables.blocks_for(self.lengths[slot])
        assert self.tables.grow(slot, tokens) == (missing <= free)
        if missing <= free:
            self.lengths[slot] = tokens
        else:
            assert self.tables.pool.num_free == free

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.lengths)))
        self.tables.release(slot)
        del self.lengths[slot]

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "tables"):
            return
        self.tables.check()
        for slot, tokens in self.lengths.items():
            assert self.tables.num_owned(slot) == self.tables.blocks_for(tokens)
        assert self.tables.num_free_slots == self.num_slots - len(self.lengths)


Tables.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTables = Tables.TestCase


def test_the_pool_never_hands_out_block_zero() -> None:
    assert sorted(BlockPool(5).allocate(5)) == [1, 2, 3, 4, 5]


def test_too_many_blocks_are_refused_with_the_numbers() -> None:
    pool = BlockPool(3)
    with pytest.raises(IndexError, match="4 blocks asked, 3 of 3 free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_a_block_released_twice_is_an_error() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(blocks)

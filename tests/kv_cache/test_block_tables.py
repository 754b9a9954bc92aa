"""Tables and pool agree on every holder, whatever happens, and a slot keeps what its queries can see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import KVGroup

FULL, WINDOW, WIDE, CHUNK = KVGroup(), KVGroup(window=3), KVGroup(window=7), KVGroup(chunk=6)


def last_seen(group: KVGroup, token: int) -> float:
    """The last query that sees a token."""
    if group.window is not None:
        return token + group.window - 1
    return float("inf") if group.chunk is None else token // group.chunk * group.chunk + group.chunk - 1


def needed(group: KVGroup, block: int, block_size: int, position: int) -> bool:
    """Whether a query at the position or later sees a token of a block before it."""
    return any(last_seen(group, token) >= position for token in range(block * block_size, (block + 1) * block_size))


class Tables(RuleBasedStateMachine):
    """Random calls, beside a plain list of blocks for each row and a count of their holders."""

    @initialize(
        num_blocks=st.integers(1, 40),
        block_size=st.integers(1, 5),
        num_slots=st.integers(1, 5),
        groups=st.sampled_from([(FULL,), (WINDOW,), (FULL, WINDOW), (CHUNK, FULL, WIDE)]),
    )
    def make(self, num_blocks: int, block_size: int, num_slots: int, groups: tuple[KVGroup, ...]) -> None:
        self.num_blocks, self.size, self.num_slots, self.groups = num_blocks, block_size, num_slots, groups
        self.width = 12
        self.tables = BlockTables(
            BlockPool(num_blocks),
            block_size=block_size,
            num_slots=num_slots,
            max_model_len=self.width * block_size,
            groups=groups,
        )
        self.rows: dict[int, list[list[int]]] = {}
        """Of the slots that are taken, for each group."""
        self.trimmed: dict[int, int] = {}
        """The position each slot was trimmed for."""
        self.retired: dict[int, int] = {}
        self.retired_slots: dict[int, int] = {}
        self.planned = self.ended = 0

    def slot(self, data: st.DataObject, *, empty: bool = False) -> int | None:
        slots = sorted(slot for slot, rows in self.rows.items() if not empty or not rows[0])
        return data.draw(st.sampled_from(slots)) if slots else None

    def let_go(self, blocks: list[int]) -> None:
        for block in blocks:
            if not self.holders()[block] and self.planned > self.ended:
                self.retired[block] = self.planned

    def holders(self) -> Counter[int]:
        return Counter(block for rows in self.rows.values() for row in rows for block in row if block)

    @property
    def num_free(self) -> int:
        return self.num_blocks - len(self.holders()) - len(self.retired)

    def extend(self, slot: int, count: int) -> None:
        """Read what the slot was given."""
        for row, entries in zip(self.rows[slot], self.tables.array[:, slot].tolist(), strict=True):
            given = entries[len(row) : len(row) + count]
            assert len(given) == count
            assert not set(given) & {0, *self.holders(), *self.retired}, "given what is not free"
            row += given

    @rule()
    def take(self) -> None:
        if len(self.rows) + len(self.retired_slots) == self.num_slots:
            with pytest.raises(IndexError):
                self.tables.take_slot()
            return
        slot = self.tables.take_slot()
        assert 0 <= slot < self.num_slots
        assert slot not in self.rows
        assert slot not in self.retired_slots, "a step in flight reads its row"
        self.rows[slot], self.trimmed[slot] = [[] for _ in self.groups], 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), tokens=st.integers(0, 60))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        slot = self.slot(data)
        assert slot is not None
        tokens = min(tokens, self.width * self.size)
        missing = max(0, -(-tokens // self.size) - len(self.rows[slot][0]))
        fits = missing * len(self.groups) <= self.num_free
        assert self.tables.grow(slot, tokens) == fits
        if fits:
            self.extend(slot, missing)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def grow_by_one(self, data: st.DataObject) -> None:
        able = sorted(slot for slot, rows in self.rows.items() if len(rows[0]) < self.width)
        slots = data.draw(st.lists(st.sampled_from(able), unique=True)) if able else []
        fits = len(slots) * len(self.groups) <= self.num_free
        assert self.tables.grow_by_one(np.array(slots, dtype=np.int64)) == fits
        if fits:
            for slot in slots:
                self.extend(slot, 1)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def trim(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        assert slot is not None
        rows = self.rows[slot]
        position = data.draw(st.integers(self.trimmed[slot], max(self.trimmed[slot], len(rows[0]) * self.size)))
        self.tables.trim(slot, position)
        self.trimmed[slot] = position
        for group, row in zip(self.groups, rows, strict=True):
            for i, block in enumerate(row):
                if block and i < position // self.size and not needed(group, i, self.size, position):
                    row[i] = 0
                    self.let_go([block])

    @rule(data=st.data(), length=st.integers(0, 6))
    def adopt(self, data: st.DataObject, length: int) -> None:
        slot = self.slot(data, empty=True)
        if slot is None or self.trimmed[slot]:
            return
        position = length * self.size
        wanted = [[needed(group, i, self.size, position) for i in range(length)] for group in self.groups]
        if sum(map(sum, wanted)) > self.num_free:
            return
        blocks = np.zeros((len(self.groups), length), dtype=np.int32)
        blocks[np.array(wanted, dtype=bool)] = self.tables.pool.allocate(sum(map(sum, wanted)))
        self.tables.adopt(slot, blocks)
        self.rows[slot], self.trimmed[slot] = blocks.tolist(), position

    @precondition(lambda self: len(self.rows) > 1)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        target = self.slot(data, empty=True)
        source = self.slot(data)
        assert source is not None
        if target is None or source == target or self.trimmed[target]:
            return
        rows = self.rows[source]
        tokens = data.draw(st.integers(self.trimmed[source], max(self.trimmed[source], len(rows[0]) * self.size)))
        full, partial = divmod(tokens, self.size)
        free = self.num_free
        copies = self.tables.fork(source, target, tokens)
        if partial and len(self.groups) > free:
            assert copies is None
            return
        assert copies is not None
        self.rows[target], self.trimmed[target] = [row[:full] for row in rows], self.trimmed[source]
        if not partial:
            assert copies == []
            return
        self.extend(target, 1)
        last = [row[full] for row in self.rows[target]]
        assert copies == list(zip([row[full] for row in rows], last, strict=True))

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = self.slot(data)
        assert slot is not None
        self.tables.release(slot)
        blocks = [block for row in self.rows.pop(slot) for block in row if block]
        del self.trimmed[slot]
        self.let_go(blocks)
        if self.planned > self.ended:
            self.retired_slots[slot] = self.planned

    @rule()
    def plan_step(self) -> None:
        self.tables.plan_step()
        self.planned += 1

    @precondition(lambda self: self.planned > self.ended)
    @rule()
    def end_step(self) -> None:
        self.tables.end_step()
        self.ended += 1
        self.retired = {block: step for block, step in self.retired.items() if step > self.ended}
        self.retired_slots = {slot: step for slot, step in self.retired_slots.items() if step > self.ended}

    @invariant()
    def as_modelled(self) -> None:
        if not hasattr(self, "tables"):
            return
        tables, pool = self.tables, self.tables.pool
        tables.check()
        empty = [[] for _ in self.groups]
        for slot in range(self.num_slots):
            rows = self.rows.get(slot, empty)
            padded = [row + [0] * (self.width - len(row)) for row in rows]
            assert tables.array[:, slot].tolist() == padded
            assert tables.lengths[slot] == len(rows[0])
            held = [block for at in reversed(range(len(rows[0]))) for row in rows if (block := row[at])]
            assert tables.blocks(slot) == held
        holders = self.holders()
        assert {block: pool.holders(block) for block in range(1, self.num_blocks + 1) if pool.holders(block)} == holders
        assert (pool.num_free, pool.num_retired) == (self.num_free, len(self.retired))
        assert tables.num_free_slots == self.num_slots - len(self.rows) - len(self.retired_slots)
        assert tables.steps_in_flight == self.planned - self.ended


Tables.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestTables = Tables.TestCase


def tables_of(num_blocks: int, *groups: KVGroup, num_slots: int = 3, block_size: int = 4) -> BlockTables:
    return BlockTables(
        BlockPool(num_blocks), block_size=block_size, num_slots=num_slots, max_model_len=80, groups=groups or (FULL,)
    )


def test_blocks_for_rounds_up() -> None:
    tables = tables_of(4)
    assert [tables.blocks_for(tokens) for tokens in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert tables.array.shape == (1, 3, 20)
    assert tables.array.dtype == np.int32, "what the kernels read"


def test_too_little_room_changes_nothing() -> None:
    tables = tables_of(5, FULL, WINDOW)
    slot, other = tables.take_slot(), tables.take_slot()
    assert tables.grow(slot, 8)
    before = tables.array.copy()
    assert not tables.grow(slot, 9)
    assert not tables.grow_by_one(np.array([slot]))
    assert tables.fork(slot, other, 7) is None
    assert np.array_equal(tables.array, before)
    assert tables.pool.num_free == 1
    tables.check()


def test_the_last_blocks_are_enough() -> None:
    tables = tables_of(6, FULL, WINDOW)
    slot, target, other = (tables.take_slot() for _ in range(3))
    assert tables.grow(slot, 4)
    assert tables.grow_by_one(np.array([slot]))
    assert tables.fork(slot, target, 7) is not None
    assert tables.pool.num_free == 0
    assert tables.fork(slot, other, 8) == [], "full blocks take no room"
    tables.release(target)
    assert tables.grow_by_one(np.array([slot]))
    assert tables.pool.num_free == 0
    tables.check()


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    tables = tables_of(12, FULL, WINDOW)
    source, target, other = (tables.take_slot() for _ in range(3))
    tables.grow(source, 10)
    copies = tables.fork(source, target, 9)
    assert np.array_equal(tables.array[:, target, :2], tables.array[:, source, :2])
    assert copies == list(zip(tables.array[:, source, 2].tolist(), tables.array[:, target, 2].tolist(), strict=True))
    assert not set(tables.array[:, target, 2]) & set(tables.array[:, source, 2])
    assert tables.pool.num_used == 6 + 2
    assert tables.fork(source, other, 8) == [], "nothing is partial"
    assert [tables.pool.holders(block) for block in tables.array[0, source, :3]] == [3, 3, 1]
    tables.release(source)
    assert tables.pool.num_used == 4 + 2, "the others keep theirs"
    tables.check()


def test_a_fork_of_a_trimmed_slot_is_trimmed_on_from_there() -> None:
    tables = tables_of(20, FULL, WINDOW)
    source, target = tables.take_slot(), tables.take_slot()
    tables.grow(source, 16)
    tables.trim(source, 13)
    tables.fork(source, target, 13)
    tables.trim(target, 16)
    tables.check()
    assert (tables.array[1, target, :4] > 0).tolist() == [False, False, False, True]
    assert (tables.array[1, source, :4] > 0).tolist() == [False, False, True, True]
    assert (tables.array[0, target, :4] > 0).all()


@pytest.mark.parametrize("group", [WINDOW, WIDE, CHUNK])
def test_trim_gives_back_exactly_what_is_seen_no_more(group: KVGroup) -> None:
    tables = tables_of(40, FULL, group)
    slot = tables.take_slot()
    tables.grow(slot, 40)
    for position in range(41):
        tables.trim(slot, position)
        kept = [i for i in range(10) if needed(group, i, 4, position) or i * 4 >= position]
        assert np.flatnonzero(tables.array[1, slot]).tolist() == kept
        assert tables.pool.num_used == 10 + len(kept)
        tables.check()
    assert tables.lengths[slot] == 10, "rows of a slot stay equally long"


def test_released_blocks_are_evicted_from_the_end_of_the_prefix_in_all_groups() -> None:
    """What is evicted first must be of least use: without its first blocks, a prefix is of no use at all."""
    evicted: list[bytes] = []
    pool = BlockPool(8, on_evict=lambda block, key: evicted.append(key))
    tables = BlockTables(pool, block_size=4, num_slots=1, max_model_len=80, groups=(FULL, FULL))
    slot = tables.take_slot()
    tables.grow(slot, 16)
    for index in range(2):
        for i in range(4):
            pool.register(int(tables.array[index, slot, i]), bytes([i, index]))
    tables.release(slot)
    pool.allocate(8)
    assert [key[0] for key in evicted] == [3, 3, 2, 2, 1, 1, 0, 0]


def test_a_slot_released_during_a_step_is_taken_again_only_when_that_ends() -> None:
    tables = tables_of(8, num_slots=2)
    first, second = tables.take_slot(), tables.take_slot()
    with pytest.raises(IndexError):
        tables.take_slot()
    tables.plan_step()
    tables.release(first)
    tables.plan_step()
    tables.release(second)
    assert (tables.num_free_slots, tables.steps_in_flight) == (0, 2)
    tables.end_step()
    assert tables.take_slot() == first
    assert tables.num_free_slots == 0
    tables.end_step()
    assert (tables.num_free_slots, tables.steps_in_flight) == (1, 0)
    assert tables.take_slot() == second
    tables.release(second)
    assert tables.num_free_slots == 1, "at once: no step is in flight"

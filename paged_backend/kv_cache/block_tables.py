"""Which blocks each running request holds, as arrays the runner can hand to the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.groups import KVGroup


class BlockTables:
    """Rows ("slots") of block ids for each group of layers, one row per running request.

    `array[group, slot, i]` is the block holding tokens `i * block_size ..` of the request in that slot, 0 (the pool's
    unused block) where it holds none: past its last block, and where a windowed group needs the tokens no more. All
    groups of a slot are equally long.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        num_slots: int,
        max_model_len: int,
        groups: Sequence[KVGroup] = (KVGroup(),),
    ) -> None:
        self.pool, self.block_size, self.groups = pool, block_size, tuple(groups)
        self.array: npt.NDArray[np.int32] = np.zeros(
            (len(self.groups), num_slots, self.blocks_for(max_model_len)), dtype=np.int32
        )
        self.lengths: npt.NDArray[np.int64] = np.zeros(num_slots, dtype=np.int64)
        """Blocks in each row of a slot, those given back by windowed groups included."""
        self._first = np.zeros((len(self.groups), num_slots), dtype=np.int64)
        self._windowed = [(index, group) for index, group in enumerate(self.groups) if not group.keeps_all]
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._retired_slots: deque[tuple[int, int]] = deque()
        self._planned = self._ended = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` in one group."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free_slots(self) -> int:
        """Slots no request runs in."""
        return len(self._free_slots)

    def blocks(self, slot: int) -> list[int]:
        """The blocks the slot holds in all groups, first positions last: in order of least use to others."""
        held = self.array[:, slot, : self.lengths[slot]].T[::-1]
        found: list[int] = held[held > 0].tolist()
        return found

    def take_slot(self) -> int:
        """A free slot, holding no block. Raises IndexError when every slot is taken."""
        return self._free_slots.pop()

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Make the slot hold `num_tokens`; False, and nothing changed, when the pool has too few blocks."""
        length = int(self.lengths[slot])
        missing = self.blocks_for(num_tokens) - length
        if missing <= 0:
            return True
        if missing * len(self.groups) > self.pool.num_free:
            return False
        blocks = self.pool.allocate(missing * len(self.groups))
        self.array[:, slot, length : length + missing] = np.array(blocks).reshape(len(self.groups), -1)
        self.lengths[slot] += missing
        return True

    def grow_by_one(self, slots: npt.NDArray[np.int64]) -> bool:
        """One more block in every group of each of these slots; False, and nothing changed, when they are too few."""
        count = len(slots) * len(self.groups)
        if count > self.pool.num_free:
            return False
        self.array[:, slots, self.lengths[slots]] = np.array(self.pool.allocate(count), dtype=np.int32).reshape(
            len(self.groups), -1
        )
        self.lengths[slots] += 1
        return True

    def trim(self, slot: int, position: int) -> None:
        """Give back the blocks that no query at `position` or later can see."""
        for index, group in self._windowed:
            first = group.first_needed(position) // self.block_size
            row = self.array[index, slot, self._first[index, slot] : first]
            if row.size:
                self.pool.release(row[row > 0][::-1].tolist())
                row[:] = 0
                self._first[index, slot] = first

    def adopt(self, slot: int, blocks: npt.NDArray[np.int32]) -> None:
        """Begin an empty slot with `[groups, n]` blocks that the caller holds for it (0: not needed)."""
        length = blocks.shape[1]
        self.array[:, slot, :length] = blocks
        self.lengths[slot] = length
        for index, group in self._windowed:
            self._first[index, slot] = group.first_needed(length * self.block_size) // self.block_size

    def fork(self, source: int, target: int, num_tokens: int) -> list[tuple[int, int]] | None:
        """Let an empty slot share the first `num_tokens` of another: full blocks are shared, a partial one copied.

        Returns the pairs of blocks (from, to) that the device must copy before its next step; None, and nothing
        changed, when the pool has too few blocks.
        """
        full, partial = divmod(num_tokens, self.block_size)
        if partial and len(self.groups) > self.pool.num_free:
            return None
        shared = self.array[:, source, :full]
        for block in shared[shared > 0].tolist():
            self.pool.share(block)
        self.array[:, target, :full] = shared
        self._first[:, target] = self._first[:, source]
        self.lengths[target] = full + bool(partial)
        if not partial:
            return []
        copies = self.pool.allocate(len(self.groups))
        self.array[:, target, full] = copies
        return list(zip(self.array[:, source, full].tolist(), copies, strict=True))

    def release(self, slot: int) -> None:
        """Give the slot and all its blocks back."""
        self.pool.release(self.blocks(slot))
        self.array[:, slot, : self.lengths[slot]] = 0
        self.lengths[slot] = 0
        self._first[:, slot] = 0
        if self._planned > self._ended:
            self._retired_slots.append((self._planned, slot))
        else:
            self._free_slots.append(slot)

    @property
    def steps_in_flight(self) -> int:
        """Steps planned and not ended."""
        return self._planned - self._ended

    def plan_step(self) -> None:
        """A step is planned; see `BlockPool`. Slots released before it ends become free when it does."""
        self._planned += 1
        self.pool.plan_step()

    def end_step(self) -> None:
        """The oldest step in flight has ended."""
        self._ended += 1
        self.pool.end_step()
        while self._retired_slots and self._retired_slots[0][0] <= self._ended:
            self._free_slots.append(self._retired_slots.popleft()[1])

    def check(self) -> None:
        """Raise AssertionError unless tables and pool agree on every holder. For tests; linear in the blocks."""
        self.pool.check()
        holders = np.bincount(self.array.ravel(), minlength=self.pool.num_blocks + 1)
        for block in range(1, self.pool.num_blocks + 1):
            assert holders[block] == self.pool.holders(block), f"block {block} is leaked, or held and not counted"
        past = np.arange(self.array.shape[2]) >= self.lengths[:, None]
        assert not self.array[:, past].any(), "stale entries past the last block"
        before = np.arange(self.array.shape[2]) < self._first[:, :, None]
        assert not self.array[before].any(), "stale entries before the window"
        assert not self.lengths[self._free_slots].any(), "a free slot holds blocks"

"""Which blocks each running request owns, as one array the runner can hand to the device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from paged_backend.kv_cache.block_pool import BlockPool


class BlockTables:
    """Rows ("slots") of block ids, one row per running request.

    `array[slot, i]` is the block holding tokens `i * block_size ..` of the request in that slot; entries past its
    last block are 0, the pool's unused block.
    """

    def __init__(self, pool: BlockPool, *, block_size: int, num_slots: int, max_model_len: int) -> None:
        self.pool, self.block_size = pool, block_size
        width = self.blocks_for(max_model_len)
        self.array: npt.NDArray[np.int32] = np.zeros((num_slots, width), dtype=np.int32)
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    @property
    def num_free_slots(self) -> int:
        """Slots no request runs in."""
        return len(self._free_slots)

    def blocks(self, slot: int) -> list[int]:
        """The blocks the slot owns, in order of position."""
        return list(self._owned[slot])

    def num_owned(self, slot: int) -> int:
        """Blocks the slot owns."""
        return len(self._owned[slot])

    def take_slot(self) -> int:
        """A free slot, owning no block. Raises IndexError when every slot is taken."""
        return self._free_slots.pop()

    def grow(self, slot: int, num_tokens: int) -> bool:
        """Make the slot hold `num_tokens`; False, and nothing changed, when the pool has too few blocks."""
        owned = self._owned[slot]
        missing = self.blocks_for(num_tokens) - len(owned)
        if missing <= 0:
            return True
        if missing > self.pool.num_free:
            return False
        blocks = self.pool.allocate(missing)
        self.array[slot, len(owned) : len(owned) + missing] = blocks
        owned.extend(blocks)
        return True

    def release(self, slot: int) -> None:
        """Give the slot and all its blocks back."""
        owned = self._owned[slot]
        self.pool.release(owned)
        self.array[slot, : len(owned)] = 0
        self._owned[slot] = []
        self._free_slots.append(slot)

    def check(self) -> None:
        """Raise AssertionError unless every used block is owned exactly once. For tests; linear in the blocks."""
        owned = [block for blocks in self._owned for block in blocks]
        assert len(owned) == len(set(owned)) == self.pool.num_used, "a block is owned twice, or leaked"
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks
        for slot, blocks in enumerate(self._owned):
            assert self.array[slot, : len(blocks)].tolist() == blocks
            assert not self.array[slot, len(blocks) :].any(), "stale entries past the last block"
        for slot in self._free_slots:
            assert not self._owned[slot], "a free slot owns blocks"

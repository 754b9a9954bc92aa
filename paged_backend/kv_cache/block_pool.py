"""The free list of KV blocks."""

from __future__ import annotations


class BlockPool:
    """Hands out block ids 1..num_blocks, each owned by at most one holder.

    Block 0 exists in the storage and is never handed out: unused block-table entries point at it, so reading through
    a padded table is harmless.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks, 0, -1))
        self._used = bytearray(num_blocks + 1)

    @property
    def num_free(self) -> int:
        """Blocks nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks somebody owns; free + used = total, always."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks; the caller has checked `num_free`. Raises IndexError when there are not enough."""
        if count > len(self._free):
            raise IndexError(f"{count} blocks asked, {len(self._free)} of {self.num_blocks} free")
        if count == 0:
            return []
        blocks = self._free[-count:]
        del self._free[-count:]
        for block in blocks:
            self._used[block] = 1
        return blocks

    def release(self, blocks: list[int]) -> None:
        """Give blocks back. Raises ValueError for one that is not owned: that would be an engine bug."""
        for block in blocks:
            if not self._used[block]:
                raise ValueError(f"block {block} released twice")
            self._used[block] = 0
        self._free.extend(blocks)

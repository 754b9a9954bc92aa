"""Who holds which KV block, and which of the others still cache something."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from paged_backend.kv_cache.eviction import EvictionPolicy, LeastRecentlyUsed


class BlockPool:
    """Hands out block ids 1..num_blocks, counts their holders, and finds blocks by the key of their content.

    A block is free, cached (nobody holds it, its content can be found and is evicted when room is needed), or used.
    Block 0 exists in the storage and is never handed out: unused block-table entries point at it, so reading through
    a padded table is harmless.

    Steps may be planned while earlier ones still run on the device: between `plan_step` and the `end_step` that
    answers it, released blocks stay used, because the running step may write to them.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        eviction: EvictionPolicy | None = None,
        on_evict: Callable[[int, bytes], None] | None = None,
    ) -> None:
        """`on_evict` gets a block and its key just before the block is handed out for other content."""
        self.num_blocks = num_blocks
        self.on_evict = on_evict
        self._free = list(range(num_blocks, 0, -1))
        self._holders = [0] * (num_blocks + 1)
        self._keys: list[bytes | None] = [None] * (num_blocks + 1)
        self._by_key: dict[bytes, int] = {}
        self._cached = LeastRecentlyUsed() if eviction is None else eviction
        self._retired: dict[int, int] = {}
        """Released blocks that a step in flight may write to, by that step, in order."""
        self._planned = self._ended = 0
        self._tainted: set[int] = set()
        self._to_clear: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks nobody holds whose content can be found."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks somebody holds, or a step in flight may write to."""
        return self.num_blocks - self.num_free

    @property
    def num_retired(self) -> int:
        """Blocks that become free when the steps in flight end."""
        return len(self._retired)

    def holders(self, block: int) -> int:
        """How many hold the block."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, evicting cached content when there is no other; the caller has checked `num_free`.

        Raises IndexError when there are not enough.
        """
        if count > self.num_free:
            raise IndexError(f"{count} blocks asked, {self.num_free} of {self.num_blocks} free")
        at = max(0, len(self._free) - count)
        blocks = self._free[at:]
        del self._free[at:]
        while len(blocks) < count:
            block = self._cached.pop()
            key = self._forget(block)
            if self.on_evict is not None:
                self.on_evict(block, key)
            blocks.append(block)
        for block in blocks:
            self._holders[block] = 1
        if self._tainted:
            self._to_clear += self._tainted.intersection(blocks)
            self._tainted.difference_update(blocks)
        return blocks

    def share(self, block: int) -> None:
        """One more holder of a used, retired or cached block."""
        if self._holders[block] == 0 and self._retired.pop(block, None) is None:
            self._cached.remove(block)
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less of each. Raises ValueError for one nobody holds: that would be an engine bug."""
        for block in blocks:
            if not self._holders[block]:
                raise ValueError(f"block {block} released twice")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if self._planned > self._ended:
                self._retired[block] = self._planned
            else:
                self._settle(block)

    def _settle(self, block: int) -> None:
        """A block that nobody holds and no step writes to is free or cached again."""
        if self._keys[block] is not None:
            self._cached.add(block)
        else:
            self._free.append(block)

    # ---- steps in flight

    def plan_step(self) -> None:
        """One more step may write to any block that is held now."""
        self._planned += 1

    def end_step(self) -> None:
        """The oldest step in flight has ended: what was released since before it was planned is free."""
        self._ended += 1
        while self._retired and self._retired[block := next(iter(self._retired))] <= self._ended:
            del self._retired[block]
            self._settle(block)

    # ---- cached content

    def find(self, key: bytes) -> int:
        """The block with this content, 0 if there is none."""
        return self._by_key.get(key, 0)

    def register(self, block: int, key: bytes) -> None:
        """Let a held block, whose content is complete or will be after the planned step, be found by `key`.

        Does nothing when another block has the key already, or when the block may hold NaN.
        """
        if key not in self._by_key and block not in self._tainted:
            self._by_key[key] = block
            self._keys[block] = key

    def reset(self) -> None:
        """Forget all cached content."""
        for block in self._by_key.values():
            self._keys[block] = None
            if not self._holders[block] and block not in self._retired:
                self._cached.remove(block)
                self._free.append(block)
        self._by_key.clear()

    def _forget(self, block: int) -> bytes:
        key = self._keys[block]
        assert key is not None
        self._keys[block] = None
        del self._by_key[key]
        return key

    # ---- content that is not finite

    def taint(self, blocks: Iterable[int]) -> None:
        """Held blocks may hold NaN: nobody may find them, and they are cleared before anybody gets them again."""
        for block in blocks:
            if self._keys[block] is not None:
                self._forget(block)
            self._tainted.add(block)

    def taint_unheld(self) -> None:
        """So may any block that nobody holds: it was given back before the NaN was seen."""
        self._tainted.update(self._free, self._retired, (b for b in self._by_key.values() if not self._holders[b]))
        self.reset()

    def take_to_clear(self) -> list[int]:
        """Blocks handed out since the last call that must be made all zero before they are written."""
        blocks, self._to_clear = self._to_clear, []
        return blocks

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state. For tests; linear in the blocks."""
        held = {block for block, holders in enumerate(self._holders) if holders}
        cached = {block for block in self._by_key.values() if block not in held and block not in self._retired}
        states = [held, cached, set(self._free), set(self._retired)]
        assert sum(map(len, states)) == self.num_blocks == len(set().union(*states)), (
            "a block is lost, or in two states"
        )
        assert len(self._free) + len(self._retired) + len(self._cached) + len(held) == self.num_blocks
        assert all(self._keys[block] == key for key, block in self._by_key.items())
        assert sum(key is not None for key in self._keys) == len(self._by_key)

"""Finds the K and V of a prompt's beginning among the blocks, on the device or in the host tier.

Automatic prefix caching by chained block hashes, as in vLLM (https://docs.vllm.ai/en/latest/design/prefix_caching).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.host_tier import HostTier


class PrefixCache:
    """Lookup and registration of full blocks by the hashes of `hashing`.

    A block is registered as soon as the step that fills it is planned: an attention backend writes a whole step's K
    and V before it reads any, so requests of the same step already share it.
    """

    def __init__(self, tables: BlockTables, host: HostTier | None) -> None:
        self._tables, self._pool, self._host = tables, tables.pool, host
        self._registered = np.zeros(tables.array.shape[1], dtype=np.int64)
        """Blocks of each slot that are registered already."""
        self._stale = np.zeros(tables.array.shape[1], dtype=bool)
        """Slots that held blocks at the last reset: nobody else may find them, nor what is computed from them."""

    def match(self, hashes: Sequence[bytes], most: int) -> int:
        """How many blocks, at most `most`, a new request need not compute."""
        tables, length = self._tables, min(most, len(hashes))
        for index, group in enumerate(tables.groups):
            if group.keeps_all:
                length = next((i for i in range(length) if not self._has(index, hashes[i])), length)
        while length:
            shorter = length
            for index, group in enumerate(tables.groups):
                if not group.keeps_all:
                    shorter = self._window_ends(index, hashes, shorter)
            if shorter == length:
                break
            length = shorter
        return length

    def _window_ends(self, index: int, hashes: Sequence[bytes], length: int) -> int:
        """The longest prefix, at most `length`, of which a windowed group has all that the next token sees."""
        end = at = length
        while at > self._first(index, end):
            at -= 1
            if not self._has(index, hashes[at]):
                end = at
        return end

    def _first(self, index: int, length: int) -> int:
        """The first of `length` blocks that the token after them sees."""
        tables = self._tables
        return tables.groups[index].first_needed(length * tables.block_size) // tables.block_size

    def num_held(self, hashes: Sequence[bytes], length: int) -> int:
        """How many of the blocks that `adopt` shares are held already, and so take no room."""
        pool = self._pool
        return sum(
            pool.holders(pool.find(_key(index, hashes[i]))) > 0  # nobody holds block 0
            for index in range(len(self._tables.groups))
            for i in range(self._first(index, length), length)
        )

    def adopt(self, slot: int, hashes: Sequence[bytes], length: int) -> None:
        """Begin an empty slot with the first `length` blocks, which `match` found. The caller has checked the room."""
        tables, pool = self._tables, self._pool
        blocks = np.zeros((len(tables.groups), length), dtype=np.int32)
        fetched: list[tuple[int, int, int]] = []
        for index in range(len(tables.groups)):
            for i in range(self._first(index, length), length):
                key = _key(index, hashes[i])
                if block := pool.find(key):
                    pool.share(block)
                    blocks[index, i] = block
                else:
                    assert self._host is not None, "match found what is in no tier"
                    fetched.append((index, i, self._host.pin(key)))
        # Only now, with all that was found held in both tiers, so that nothing of it is evicted.
        for (index, i, host), block in zip(fetched, pool.allocate(len(fetched)), strict=True):
            assert self._host is not None
            self._host.fetch(host, block)
            pool.register(block, _key(index, hashes[i]))
            blocks[index, i] = block
        tables.adopt(slot, blocks)
        self._registered[slot] = length

    def register(self, slot: int, hashes: Sequence[bytes], length: int) -> None:
        """Let the first `length` blocks of a slot be found, unless they are older than the last reset."""
        if self._stale[slot]:
            return
        done, length = int(self._registered[slot]), min(length, len(hashes))
        if done >= length:
            return
        for index, row in enumerate(self._tables.array[:, slot, done:length].tolist()):
            for i, block in enumerate(row, start=done):
                if block:
                    self._pool.register(block, _key(index, hashes[i]))
        self._registered[slot] = length

    def store(self, slot: int, hashes: Sequence[bytes]) -> list[int]:
        """Keep the registered blocks of a slot in the host tier; the host blocks, held for the caller.

        Stops where the host is full: what follows the first missing block would be of no use.
        """
        held: list[int] = []
        if self._host is not None and not self._stale[slot]:
            for i in range(int(self._registered[slot])):
                for index, block in enumerate(self._tables.array[:, slot, i].tolist()):
                    host = self._host.store(block, _key(index, hashes[i])) if block else 0
                    if block and not host:
                        return held
                    held += [host] if host else []
        return held

    def forked(self, source: int, target: int) -> None:
        """A slot now shares the blocks of another."""
        self._stale[target] = self._stale[source]
        self._registered[target] = min(self._registered[source], self._tables.lengths[target])

    def released(self, slot: int) -> None:
        """A slot is empty again."""
        self._registered[slot], self._stale[slot] = 0, False

    def reset(self) -> None:
        """Forget all content, as when the weights have changed. Running requests go on with theirs, for themselves."""
        self._stale[:] = self._tables.lengths > 0
        self._pool.reset()
        if self._host is not None:
            self._host.pool.reset()

    def _has(self, index: int, block_hash: bytes) -> bool:
        key = _key(index, block_hash)
        return bool(self._pool.find(key) or (self._host is not None and self._host.pool.find(key)))


def _key(index: int, block_hash: bytes) -> bytes:
    """What a group's block with this hash is found by."""
    return block_hash if index == 0 else block_hash + bytes((index,))

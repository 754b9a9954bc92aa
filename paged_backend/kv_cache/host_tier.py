"""A second tier of blocks in host memory: preempted requests' and evicted prefixes'."""

from __future__ import annotations

from paged_backend.kv_cache.block_pool import BlockPool
from paged_backend.kv_cache.eviction import EvictionPolicy


class HostTier:
    """Decides which block contents are kept in host memory, and plans the copies.

    Contents are found by the same keys as on the device. A host block that is held stays (a preempted request holds
    its own); the others are a cache.
    """

    def __init__(self, num_blocks: int, eviction: EvictionPolicy | None = None) -> None:
        self.pool = BlockPool(num_blocks, eviction=eviction)
        self._stores: list[tuple[int, int]] = []
        self._fetches: list[tuple[int, int]] = []
        self.num_stored = self.num_fetched = 0
        """Blocks copied to and from the host since the start."""

    def store(self, block: int, key: bytes) -> int:
        """Keep the content of a device block and hold it; 0 when every host block is held."""
        host = self.pool.find(key)
        if host:
            self.pool.share(host)
            return host
        if not self.pool.num_free:
            return 0
        (host,) = self.pool.allocate(1)
        self.pool.register(host, key)
        self._stores.append((block, host))
        return host

    def keep_evicted(self, block: int, key: bytes) -> None:
        """Give the content of a device block that is being evicted a second chance."""
        if host := self.store(block, key):
            self.pool.release([host])

    def pin(self, key: bytes) -> int:
        """The host block with the content, held until the plan is complete; it must be there."""
        host = self.pool.find(key)
        self.pool.share(host)
        return host

    def fetch(self, host: int, block: int) -> None:
        """Bring the content of a pinned host block to a device block."""
        self._fetches.append((host, block))

    def take(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The stores and fetches planned since the last call."""
        self.pool.release(host for host, _ in self._fetches)
        stores, fetches = self._stores, self._fetches
        self._stores, self._fetches = [], []
        self.num_stored += len(stores)
        self.num_fetched += len(fetches)
        return stores, fetches

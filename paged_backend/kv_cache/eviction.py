"""Which cached block goes first when room is needed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol


class EvictionPolicy(Protocol):
    """Made by the hook `paged_eviction_policy`. Keeps the cached blocks that nobody holds."""

    def __len__(self) -> int:
        """Blocks kept."""
        ...

    def add(self, block: int) -> None:
        """Keep a block; within one request, later blocks are added before earlier ones."""
        ...

    def remove(self, block: int) -> None:
        """A kept block is held again, or no longer cached."""
        ...

    def pop(self) -> int:
        """Remove and return the block whose content is worth least."""
        ...


class LeastRecentlyUsed:
    """The block that was held longest ago goes first; of one request, the end of its prefix."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, block: int) -> None:
        """See `EvictionPolicy.add`."""
        self._blocks[block] = None

    def remove(self, block: int) -> None:
        """See `EvictionPolicy.remove`."""
        del self._blocks[block]

    def pop(self) -> int:
        """See `EvictionPolicy.pop`."""
        return self._blocks.popitem(last=False)[0]

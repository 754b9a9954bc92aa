"""Layers that need the same tokens share block tables."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol


class LayerShape(Protocol):
    """What grouping needs of `paged_kernels.attention.LayerSpec`."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        ...

    @property
    def key_dim(self) -> int:
        """Of one head."""
        ...

    @property
    def value_dim(self) -> int:
        """Of one head."""
        ...

    @property
    def window(self) -> int | None:
        """A query sees this many tokens, itself included."""
        ...

    @property
    def chunk(self) -> int | None:
        """A query sees its own chunk of this many tokens."""
        ...


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose K and V are kept for the same tokens, through one block table per request."""

    layers: tuple[int, ...] = (0,)
    """Attention calls of the model, in order. The i-th of each group lives in the i-th storage."""
    window: int | None = None
    chunk: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether every token stays needed."""
        return self.window is None and self.chunk is None

    def first_needed(self, position: int) -> int:
        """The first token that a query at `position`, or any later one, can see."""
        if self.window is not None:
            return max(0, position - self.window + 1)
        return 0 if self.chunk is None else position // self.chunk * self.chunk

    def most_blocks(self, block_size: int, step_tokens: int) -> int | None:
        """Blocks of one request at most, when a step computes up to `step_tokens` of it; None: all its tokens'."""
        span = self.window or self.chunk
        return None if span is None else -(-(span + step_tokens) // block_size) + 1


def group_layers(layers: Sequence[LayerShape]) -> tuple[KVGroup, ...]:
    """Groups of equally many layers, so that a block has the same bytes in each and all take from one pool.

    A model that mixes full and windowed attention (Gemma 2 and 3, GPT-OSS) gets groups of as many layers as its rarer
    kind has. Layers of different shape cannot share storage: such a model is one group that keeps all tokens.
    """
    kinds: dict[tuple[int | None, int | None], list[int]] = {}
    shapes: set[Hashable] = set()
    for index, layer in enumerate(layers):
        kinds.setdefault((layer.window, layer.chunk), []).append(index)
        shapes.add((layer.num_kv_heads, layer.key_dim, layer.value_dim))
    if len(kinds) > 1 and len(shapes) > 1:
        return (KVGroup(tuple(range(len(layers)))),)
    size = min(map(len, kinds.values()))
    return tuple(
        KVGroup(tuple(indices[at : at + size]), window, chunk)
        for (window, chunk), indices in kinds.items()
        for at in range(0, len(indices), size)
    )


def blocks_needed(groups: Sequence[KVGroup], num_tokens: int, block_size: int, step_tokens: int) -> int:
    """Blocks, in all groups together, that a request of so many tokens holds at most."""
    count = -(-num_tokens // block_size)
    most = (group.most_blocks(block_size, step_tokens) for group in groups)
    return sum(count if limit is None else min(count, limit) for limit in most)

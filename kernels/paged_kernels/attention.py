"""Attention over a paged KV cache: what a layer needs, what a step is, and the plain PyTorch reference.

Causal attention of flat batches of tokens through block tables (PagedAttention, Kwon et al., SOSP 2023), with
grouped-query heads, sliding window, local chunks, logit soft-capping and attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from paged_kernels.memory import zeros

T = TypeVar("T")

_GATHER_BYTES = 1 << 28  # of K and V gathered at once


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """Geometry and masking of one attention call of a model."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    """A query sees this many tokens, itself included."""
    chunk: int | None = None
    """A query sees only its own chunk of this many tokens (Llama 4)."""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)` (Gemma 2)."""

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


class LayerCache(NamedTuple):
    """K and V of one layer, `[num_blocks + 1, ...]`, laid out as the backend likes; block 0 is never read unmasked."""

    key: Tensor
    value: Tensor


@dataclass(slots=True)
class AttentionBatch:
    """One step, as attention sees it. Row i holds `counts[i]` consecutive tokens of one request, after `starts[i]`."""

    slot_mapping: Tensor
    """`[num_tokens]` int64: where each token's K and V go, `block * block_size + offset`."""
    block_tables: Tensor
    """`[num_rows, max_blocks]` int32."""
    starts: list[int]
    counts: list[int]
    num_single: int
    """Rows of one token; they come first."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a backend derives once per step and uses in every layer."""

    def derive(self, key: Any, make: Callable[[], T]) -> T:
        """`make()`, called once per step for `key`."""
        if key not in self.memo:
            self.memo[key] = make()
        value: T = self.memo[key]
        return value


class AttentionBackend(Protocol):
    """Writes a step's K and V into the cache and attends through the block tables."""

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """Storage of one layer for blocks 0..num_blocks, finite everywhere."""
        ...

    def forward(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
    ) -> Tensor:
        """Attention output `[num_tokens, num_heads, value_dim]`, contiguous.

        `query` is `[num_tokens, num_heads, key_dim]`, `key` and `value` are `[num_tokens, num_kv_heads, dim]`, any
        strides; `sinks` is `[num_heads]`: extra logits that take probability and give nothing (GPT-OSS).
        """
        ...


class ReferenceAttention:
    """Plain PyTorch on any device: gather the blocks, then scaled_dot_product_attention. Slow, and always right.

    Blocks are `[block_size, num_kv_heads, dim]`.
    """

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """See `AttentionBackend.allocate`."""
        shape = (num_blocks + 1, block_size, spec.num_kv_heads)
        return LayerCache(*(zeros((*shape, dim), dtype, device) for dim in (spec.key_dim, spec.value_dim)))

    def forward(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
    ) -> Tensor:
        """See `AttentionBackend.forward`."""
        for stored, new in zip(cache, (key, value), strict=True):
            stored.flatten(0, 1).index_copy_(0, batch.slot_mapping, new)
        out = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        singles = batch.num_single
        if singles:
            longest = (max(batch.starts[:singles]) + 1) * spec.num_kv_heads * (spec.key_dim + spec.value_dim)
            together = max(1, _GATHER_BYTES // (longest * cache.key.element_size()))
            for first in range(0, singles, together):
                rows = slice(first, min(first + together, singles))
                out[rows] = self._singles(spec, cache, rows, query[rows], sinks, batch)
        at = singles
        for row in range(singles, len(batch.counts)):
            end = at + batch.counts[row]
            out[at:end] = self._chunk(spec, cache, row, query[at:end], key[at:end], value[at:end], sinks, batch)
            at = end
        return out

    def _singles(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        rows: slice,
        query: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
    ) -> Tensor:
        """Rows of one token, together: every row padded to the longest."""
        starts, count, block_size = batch.starts[rows], query.shape[0], cache.key.shape[1]
        width = -(-(max(starts) + 1) // block_size)
        # int64, because int32 indices gather several times slower on a CPU.
        blocks = batch.derive(rows.start, lambda: batch.block_tables[rows, :width].reshape(-1).long())
        key, value = (
            stored.view(stored.shape[0], -1)
            .index_select(0, blocks)
            .view(count, width * block_size, *stored.shape[2:])
            .transpose(1, 2)
            for stored in cache
        )

        def make_mask() -> Tensor:
            query_at = torch.tensor(starts, device=query.device).view(-1, 1)
            return _visible(spec, query_at, torch.arange(width * block_size, device=query.device)).view(count, 1, 1, -1)

        mask = batch.derive((rows.start, spec.window, spec.chunk), make_mask)
        if spec.window is not None or spec.chunk is not None:
            # A request outlives NaN that its window has passed, and gives the blocks back: they may lie behind the end
            # of another's. Masked scores do not hide NaN.
            key, value = (x.masked_fill(~mask.view(count, 1, -1, 1), 0) for x in (key, value))
        # Query heads of one KV head become query positions of it: no K/V is repeated.
        grouped = query.view(count, spec.num_kv_heads, -1, spec.key_dim)
        sinks = None if sinks is None else sinks.view(1, spec.num_kv_heads, -1, 1)
        return _attend(spec, grouped, key, value, mask, sinks).reshape(count, spec.num_heads, spec.value_dim)

    def _chunk(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        row: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
    ) -> Tensor:
        """One row of several tokens. The first chunk of a prompt attends to its own K and V, no gather needed."""
        start, count = batch.starts[row], batch.counts[row]
        if start > 0:
            block_size = cache.key.shape[1]
            width = -(-(start + count) // block_size)
            blocks = batch.derive(("chunk", row), lambda: batch.block_tables[row, :width].long())
            key, value = (stored.index_select(0, blocks).flatten(0, 1)[: start + count] for stored in cache)
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        plain = spec.softcap is None and sinks is None
        if start == 0 and plain and count <= (spec.window or count) and count <= (spec.chunk or count):
            grouped = spec.num_heads != spec.num_kv_heads
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=spec.scale, enable_gqa=grouped
            )
        else:

            def make_mask() -> Tensor:
                positions = torch.arange(start + count, device=query.device)
                return _visible(spec, positions[start:].view(-1, 1), positions)

            mask = batch.derive(("chunk", row, spec.window, spec.chunk), make_mask)
            out = _attend(spec, query, key, value, mask, None if sinks is None else sinks.view(1, -1, 1, 1))
        return out.squeeze(0).transpose(0, 1)


def _visible(spec: LayerSpec, query_at: Tensor, key_at: Tensor) -> Tensor:
    """Boolean mask: which positions `key_at` a query at `query_at` sees."""
    mask = key_at <= query_at
    if spec.window is not None:
        mask = mask & (key_at > query_at - spec.window)
    if spec.chunk is not None:
        mask = mask & (key_at // spec.chunk == query_at // spec.chunk)
    return mask


def _attend(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Masked attention over `[batch, heads, tokens, dim]`, with soft-capping and sinks where the layer has them."""
    groups = query.shape[1] // key.shape[1]
    if spec.softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=spec.scale, enable_gqa=groups > 1
        )
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:-1], 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[-2]].to(value.dtype) @ value

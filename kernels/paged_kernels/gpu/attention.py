"""The attention backend of a GPU: a cache laid out for the kernels, and the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from paged_kernels.attention import AttentionBatch, LayerCache, LayerSpec, ReferenceAttention
from paged_kernels.gpu.decode_attention import DecodeRows, decode_attention, plan_work, tile_of
from paged_kernels.gpu.prefill_attention import ROWS, PrefillRows, plan_tiles, prefill_attention
from paged_kernels.memory import zeros


class TritonAttention:
    """K and V as `[num_blocks + 1, num_kv_heads, block_size, dim]`: a head's tokens of a block are contiguous.

    Heads whose keys and values have different sizes, or larger ones than 256, and groups of more than 128 heads are
    left to `ReferenceAttention`.
    """

    block_size = 64
    """Unless another is asked for: a tile of keys then lies in one block, and prefill is a quarter faster."""
    has_device_steps = True
    """`DeviceRunner` knows this layout."""

    def __init__(self) -> None:
        self._reference = ReferenceAttention()

    def layer_kernels(self, specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> ModuleType:
        """What fused models take for all but attention."""
        from paged_kernels.gpu import layers

        return layers

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """See `AttentionBackend.allocate`."""
        if not supports(spec):
            return self._reference.allocate(spec, num_blocks, block_size, dtype, device)
        shape = (num_blocks + 1, spec.num_kv_heads, block_size, spec.key_dim)
        return LayerCache(zeros(shape, dtype, device), zeros(shape, dtype, device))

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
        if not supports(spec):
            return self._reference.forward(spec, cache, query, key, value, sinks, batch)
        block_size, device = cache.key.shape[2], query.device
        singles = batch.num_single

        def on_device(values: object) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(device)

        def make_decodes() -> DecodeRows:
            counters = torch.zeros(singles * spec.num_kv_heads, dtype=torch.int32, device=device)
            return DecodeRows(on_device(range(singles)), on_device(batch.starts[:singles]), counters)

        def make_chunks() -> PrefillRows:
            starts, counts = np.array(batch.starts[singles:]), np.array(batch.counts[singles:])
            rows, offsets = np.arange(len(counts)) + singles, np.cumsum(counts) - counts + singles
            return PrefillRows(
                *map(on_device, (rows, starts, counts, offsets, *plan_tiles(starts, counts, spec.group)))
            )

        if singles:  # ahead of other kernels, as `decode_attention` asks
            rows = batch.derive(("decodes", spec.num_kv_heads), make_decodes)
            work = batch.derive(
                ("work", spec.num_kv_heads, spec.window, spec.chunk, tile_of(spec)), lambda: plan_work(rows, spec)
            )
        block, offset = batch.derive(
            "places", lambda: (batch.slot_mapping // block_size, batch.slot_mapping % block_size)
        )
        for stored, new in zip(cache, (key, value), strict=True):
            stored[block, :, offset] = new
        qkv = torch.cat([query, key, value], dim=1).flatten(1)
        out = qkv.new_empty(qkv.shape[0], spec.num_heads * spec.value_dim)
        if singles:
            decode_attention(qkv, cache, batch.block_tables, rows, work, spec, sinks, out)
        if singles < len(batch.counts):
            chunks = batch.derive(("chunks", spec.group), make_chunks)
            prefill_attention(qkv, cache, batch.block_tables, chunks, spec, sinks, out)
        return out.view(-1, spec.num_heads, spec.value_dim)


def supports(spec: LayerSpec) -> bool:
    """Whether the kernels can do these heads."""
    return spec.key_dim == spec.value_dim <= 256 and spec.group <= ROWS

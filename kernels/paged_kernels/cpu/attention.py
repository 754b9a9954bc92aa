"""The attention backend of a CPU: a cache laid out for the compiled kernels, and the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from paged_kernels.attention import AttentionBatch, LayerCache, LayerSpec, ReferenceAttention
from paged_kernels.cpu import library
from paged_kernels.cpu.structures import Attention, Batch
from paged_kernels.memory import zeros
from paged_kernels.rope import Rope


class CpuAttention:
    """K as `[num_blocks + 1, num_kv_heads, key_dim / P, block_size, P]`, V as `[..., block_size / P, value_dim, P]`.

    P is 2 in bfloat16 and 1 in float32. Other dtypes, head sizes that are no multiple of 16 and block sizes other than
    16, 32, 64 and 128 are left to `ReferenceAttention`.
    """

    def __init__(self, variant: str | None = None) -> None:
        """`variant` is one of `library.VARIANTS`; the best for this CPU unless given."""
        self._reference, self._library = ReferenceAttention(), library.load(variant)

    def layer_kernels(self, specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> ModuleType | None:
        """What fused models take for all but attention; None if the kernels do not support a layer."""
        from paged_kernels.cpu import layers

        supported = all(self._supports(spec, block_size, dtype, torch.device("cpu")) for spec in specs)
        return layers if supported else None

    def allocate(
        self, spec: LayerSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCache:
        """See `AttentionBackend.allocate`."""
        if not self._supports(spec, block_size, dtype, device):
            return self._reference.allocate(spec, num_blocks, block_size, dtype, device)
        pack, heads = 4 // dtype.itemsize, (num_blocks + 1, spec.num_kv_heads)
        return LayerCache(
            zeros((*heads, spec.key_dim // pack, block_size, pack), dtype, device),
            zeros((*heads, block_size // pack, spec.value_dim, pack), dtype, device),
        )

    def _supports(self, spec: LayerSpec, block_size: int, dtype: torch.dtype, device: torch.device) -> bool:
        return (
            self._library is not None
            and device.type == "cpu"
            and dtype in (torch.float32, torch.bfloat16)
            and spec.key_dim % 16 == spec.value_dim % 16 == 0
            and spec.key_dim <= 512
            and block_size in (16, 32, 64, 128)
        )

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
        if cache.key.dim() == 4:  # the reference's
            return self._reference.forward(spec, cache, query, key, value, sinks, batch)
        return self._forward(spec, cache, query, key, value, sinks, batch, None, None, None, 0.0)

    def rotate_and_attend(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        qkv: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
        rope: Rope | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        norm_eps: float,
    ) -> Tensor:
        """`[num_tokens, num_heads * value_dim]`, after `rope_and_write_reference` has turned `qkv`, in place."""
        heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        query, key, value = torch.split(qkv.view(len(qkv), sum(heads), -1), heads, 1)
        return self._forward(spec, cache, query, key, value, sinks, batch, rope, q_norm, k_norm, norm_eps).flatten(1)

    def _forward(
        self,
        spec: LayerSpec,
        cache: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        batch: AttentionBatch,
        rope: Rope | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        norm_eps: float,
    ) -> Tensor:
        assert self._library is not None
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        out = query.new_empty(query.shape[0], spec.num_heads, spec.value_dim)
        layer, _kept = layer_of(spec, cache, sinks, rope, q_norm, k_norm, norm_eps)
        layer.batch = ctypes.pointer(batch_of(batch))
        layer.query, layer.key, layer.value, layer.out = (x.data_ptr() for x in (query, key, value, out))
        layer.query_strides[:], layer.key_strides[:] = query.stride()[:2], key.stride()[:2]
        layer.value_strides[:] = value.stride()[:2]
        name = "paged_attention_float32" if query.dtype == torch.float32 else "paged_attention_bfloat16"
        getattr(self._library, name)(ctypes.byref(layer), torch.get_num_threads())
        return out


def layer_of(
    spec: LayerSpec,
    cache: LayerCache,
    sinks: Tensor | None,
    rope: Rope | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
) -> tuple[Attention, list[Tensor | None]]:
    """Attention of a layer, but for the batch and what goes in and out; and tensors that must live as long as it."""
    kept = [None if x is None else x.float().contiguous() for x in (sinks, q_norm, k_norm)]
    layer = Attention(
        key_cache=cache.key.data_ptr(),
        value_cache=cache.value.data_ptr(),
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        key_dim=spec.key_dim,
        value_dim=spec.value_dim,
        block_size=cache.key.shape[3],
        window=spec.window or 0,
        chunk=spec.chunk or 0,
        scale=spec.scale,
        softcap=spec.softcap or 0.0,
        norm_eps=norm_eps,
    )
    layer.sinks, layer.query_norm, layer.key_norm = (None if x is None else x.data_ptr() for x in kept)
    if rope is not None:
        layer.cos_sin = rope.cos_sin.data_ptr()
        layer.rotated, layer.interleaved = rope.cos_sin.shape[1], rope.interleaved
    return layer, kept


def batch_of(batch: AttentionBatch) -> Batch:
    """What the layers of a step have in common; the arrays live as long as `batch`."""
    return batch.derive("cpu", lambda: _batch_of(batch))


def _batch_of(batch: AttentionBatch) -> Batch:
    counts = np.array(batch.counts, dtype=np.int32)
    arrays = {
        "slot_mapping": batch.slot_mapping.contiguous().numpy(),
        "tables": batch.block_tables.contiguous().numpy(),
        "starts": np.array(batch.starts, dtype=np.int32),
        "counts": counts,
        "offsets": (np.cumsum(counts) - counts).astype(np.int32),
    }
    batch.derive("cpu arrays", lambda: arrays)
    sizes = {"tokens": batch.slot_mapping.shape[0], "table_width": batch.block_tables.shape[1]}
    return Batch(rows=len(counts), **sizes, **{name: array.ctypes.data for name, array in arrays.items()})

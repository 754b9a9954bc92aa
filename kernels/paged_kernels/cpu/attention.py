"""The attention backend of a CPU: a cache laid out for the compiled kernels, and the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from paged_kernels.attention import AttentionBatch, LayerCache, LayerSpec, ReferenceAttention, _zeros
from paged_kernels.cpu import library
from paged_kernels.rope import Rope

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class _Step(ctypes.Structure):
    """`Step` of attention.cpp: keep both alike."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value", "key_cache", "value_cache", "out", "sinks")),
        *((name, _POINTER) for name in ("slot_mapping", "tables", "starts", "counts", "offsets")),
        *((name, _INT64 * 2) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, _INT32) for name in ("rows", "tokens", "table_width", "threads")),
        *((name, _INT32) for name in ("heads", "kv_heads", "key_dim", "value_dim", "block_size", "window", "chunk")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, _POINTER) for name in ("query_norm", "key_norm", "cos_sin")),
        ("norm_eps", ctypes.c_float),
        *((name, _INT32) for name in ("rotated", "interleaved")),
    )


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
            _zeros((*heads, spec.key_dim // pack, block_size, pack), dtype, device),
            _zeros((*heads, block_size // pack, spec.value_dim, pack), dtype, device),
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
        step: _Step = batch.derive("cpu step", lambda: _step_of(batch))
        step.query, step.key, step.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        step.key_cache, step.value_cache, step.out = cache.key.data_ptr(), cache.value.data_ptr(), out.data_ptr()
        step.query_strides[:], step.key_strides[:] = query.stride()[:2], key.stride()[:2]
        step.value_strides[:] = value.stride()[:2]
        step.heads, step.kv_heads = spec.num_heads, spec.num_kv_heads
        step.key_dim, step.value_dim = spec.key_dim, spec.value_dim
        step.block_size = cache.key.shape[3]
        step.window, step.chunk = spec.window or 0, spec.chunk or 0
        step.scale, step.softcap = spec.scale, spec.softcap or 0.0
        # Kept until the call is over.
        floats = [None if x is None else x.float().contiguous() for x in (sinks, q_norm, k_norm)]
        step.sinks, step.query_norm, step.key_norm = (None if x is None else x.data_ptr() for x in floats)
        step.cos_sin = None if rope is None else rope.cos_sin.data_ptr()
        step.rotated, step.interleaved = (0, 0) if rope is None else (rope.cos_sin.shape[1], rope.interleaved)
        step.norm_eps = norm_eps
        name = "paged_attention_float32" if query.dtype == torch.float32 else "paged_attention_bfloat16"
        getattr(self._library, name)(ctypes.byref(step))
        return out


def _step_of(batch: AttentionBatch) -> _Step:
    """What all layers of a step have in common; the arrays live as long as the batch."""
    counts = np.array(batch.counts, dtype=np.int32)
    arrays = {
        "slot_mapping": batch.slot_mapping.contiguous().numpy(),
        "tables": batch.block_tables.contiguous().numpy(),
        "starts": np.array(batch.starts, dtype=np.int32),
        "counts": counts,
        "offsets": (np.cumsum(counts) - counts).astype(np.int32),
    }
    batch.derive("cpu arrays", lambda: arrays)
    step = _Step(rows=len(counts), tokens=batch.slot_mapping.shape[0], threads=torch.get_num_threads())
    step.table_width = batch.block_tables.shape[1]
    for name, array in arrays.items():
        setattr(step, name, array.ctypes.data)
    return step

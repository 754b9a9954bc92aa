"""The tensors behind the block ids, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from paged_kernels.attention import AttentionBackend, LayerCache, LayerSpec
from torch import Tensor

from paged_backend.kv_cache.groups import KVGroup


def stored_layers(groups: Sequence[KVGroup]) -> list[int]:
    """One layer for each storage: the i-th layers of all groups share the i-th, since they never share a block."""
    return [
        next(group.layers[at] for group in groups if at < len(group.layers))
        for at in range(max(len(group.layers) for group in groups))
    ]


def block_bytes(specs: Sequence[LayerSpec], groups: Sequence[KVGroup], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block."""
    stored = [specs[layer] for layer in stored_layers(groups)]
    return sum(spec.num_kv_heads * (spec.key_dim + spec.value_dim) for spec in stored) * block_size * dtype.itemsize


class KVStorage:
    """K and V of blocks 0..num_blocks."""

    def __init__(
        self,
        backend: AttentionBackend,
        specs: Sequence[LayerSpec],
        groups: Sequence[KVGroup],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates zeros."""
        stored = [
            backend.allocate(specs[layer], num_blocks, block_size, dtype, device) for layer in stored_layers(groups)
        ]
        at = {layer: index for group in groups for index, layer in enumerate(group.layers)}
        self.layers: list[LayerCache] = [stored[at[layer]] for layer in range(len(specs))]
        """One for each attention call of the model."""
        self.tensors: list[Tensor] = [tensor for cache in stored for tensor in cache]
        """Each once; dimension 0 is the block."""

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to)."""
        source, target = self.indices([pair[0] for pair in pairs]), self.indices([pair[1] for pair in pairs])
        for tensor in self.tensors:
            tensor.index_copy_(0, target, tensor.index_select(0, source))

    def clear(self, blocks: Sequence[int]) -> None:
        """Make blocks all zero again."""
        at = self.indices(blocks)
        for tensor in self.tensors:
            tensor.index_fill_(0, at, 0)

    def indices(self, blocks: Sequence[int]) -> Tensor:
        """Block ids as an int64 tensor on the device."""
        return torch.tensor(blocks, dtype=torch.int64, device=self.tensors[0].device)

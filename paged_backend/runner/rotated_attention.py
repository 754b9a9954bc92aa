"""Attention of one step of a fused model on a CPU: rotation, cache and attention in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paged_kernels.attention import AttentionBatch, LayerCache
from torch import Tensor

if TYPE_CHECKING:
    from paged_kernels.layer import FusedLayer


@dataclass(slots=True)
class RotatedAttention:
    """See `fused.Attend`."""

    backend: Any
    """A `CpuAttention`."""
    caches: Sequence[LayerCache]
    group_of: Sequence[int]
    """Of each layer."""
    batches: Sequence[AttentionBatch]
    """Of each group of layers."""
    sampled_at: Tensor
    """`[rows]` int64: the tokens of the step that sample."""

    def __call__(self, index: int, layer: FusedLayer, qkv: Tensor) -> Tensor:
        """Rotate, write K and V, attend; in the last layer only for the tokens that sample."""
        out: Tensor = self.backend.rotate_and_attend(
            layer.spec,
            self.caches[index],
            qkv,
            layer.sinks,
            self.batches[self.group_of[index]],
            layer.rope,
            layer.q_norm,
            layer.k_norm,
            layer.norm_eps,
        )
        return out[self.sampled_at] if index == len(self.caches) - 1 else out

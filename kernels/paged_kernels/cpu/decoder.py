"""All layers of a decoder in one call of the compiled kernels.

Between kernels, threads only wait for each other's tasks: no interpreter runs, and no threads are started, which cost
more than the small kernels themselves. A thread whose core is busy with something else is helped by the others.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paged_kernels.attention import AttentionBatch, LayerCache
from paged_kernels.cpu import int8, library, structures
from paged_kernels.cpu.attention import batch_of, layer_of
from paged_kernels.cpu.layers import Linears
from paged_kernels.layer import GLU, FusedLayer, Linear


class _Built(NamedTuple):
    caches: Sequence[LayerCache]
    version: int
    """Of packed weights."""
    structure: structures.Decoder
    kept: list[Any]
    """Whose addresses are in there."""


class Decoder:
    """Layers, the last norm and the head, over the weights that `linears` packs."""

    def __init__(self, layers: Sequence[FusedLayer], norm: Tensor, head: Linear, eps: float, linears: Linears) -> None:
        self._layers, self._norm, self._head, self._eps, self._linears = layers, norm, head, eps, linears
        weights, self._has_plain_mlps = [head.weight], True
        for layer in layers:
            if isinstance(layer.mlp, GLU) and layer.mlp.activation in ("silu", "gelu_tanh"):
                weights += [linear.weight for linear in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)]
            else:
                self._has_plain_mlps = False
        self._are_in_panels = all(map(linears.is_in_panels, weights))
        self._built: _Built | None = None
        self.seconds: structures.Seconds | None = None
        """If not None, what steps spend on each kind of kernel is added to it."""

    def can_compute(self) -> bool:
        """Whether the kernels have all that the layers need."""
        return self._has_plain_mlps and (self._linears.quantized or self._are_in_panels)

    def __call__(
        self,
        embeddings: Tensor,
        caches: Sequence[LayerCache],
        group_of: Sequence[int],
        batches: Sequence[AttentionBatch],
        sampled_at: Tensor,
    ) -> Tensor:
        """Logits `[rows, vocab]` of the tokens `sampled_at` `[rows]` int64 of `embeddings` `[tokens, hidden]`, which
        become the residual stream, in place. `group_of` says which of `batches` each layer has.
        """
        if self._built is None or self._built.caches is not caches or self._built.version != self._linears.version:
            self._built = self._build(caches, group_of)
        logits = embeddings.new_empty(len(sampled_at), len(self._head.weight))
        rows = (structures.Batch * len(batches))(*map(batch_of, batches))
        step = self._built.structure
        step.threads, step.sampled = torch.get_num_threads(), len(sampled_at)
        step.residual, step.logits, step.sampled_at = (x.data_ptr() for x in (embeddings, logits, sampled_at))
        step.batches = ctypes.addressof(rows)
        step.seconds = None if self.seconds is None else ctypes.addressof(self.seconds)
        kernels = library.load()
        assert kernels is not None
        name = "paged_decoder_float32" if embeddings.dtype == torch.float32 else "paged_decoder_bfloat16"
        getattr(kernels, name)(ctypes.byref(step))
        return logits

    def _build(self, caches: Sequence[LayerCache], group_of: Sequence[int]) -> _Built:
        kept: list[Any] = []

        def norm(weight: Tensor | None) -> int | None:
            if weight is None:
                return None
            kept.append(weight.float())
            address: int = kept[-1].data_ptr()
            return address

        layers = (structures.Layer * len(self._layers))()
        for built, layer, cache, group in zip(layers, self._layers, caches, group_of, strict=True):
            assert isinstance(layer.mlp, GLU)
            built.qkv, built.out = self._linears.structure(*layer.qkv), self._linears.structure(*layer.out)
            built.gate_up = self._linears.structure(*layer.mlp.gate_up)
            built.down = self._linears.structure(*layer.mlp.down)
            built.input_norm, built.attention_norm = norm(layer.input_norm), norm(layer.attention_norm)
            built.mlp_norm, built.mlp_out_norm = norm(layer.mlp_norm), norm(layer.mlp_out_norm)
            norms = layer.q_norm, layer.k_norm, layer.norm_eps
            built.attention, floats = layer_of(layer.spec, cache, layer.sinks, layer.rope, *norms)
            kept.append(floats)
            built.group, built.is_gelu = group, layer.mlp.activation == "gelu_tanh"
        kept.append(layers)
        head = self._linears.structure(*self._head)
        structure = structures.Decoder(
            layers=ctypes.addressof(layers),
            norm=norm(self._norm),
            head=head,
            num_layers=len(layers),
            hidden=self._head.weight.shape[1],
            int8_kind=int8.KINDS.index(int8.best()) if head.scales else 0,
            eps=self._eps,
        )
        return _Built(caches, self._linears.version, structure, kept)

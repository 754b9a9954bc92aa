"""A transformers model over a paged KV cache: flat batches of tokens in, logits out."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels.attention import AttentionBackend, AttentionBatch
from torch import Tensor

from paged_backend.kv_cache.groups import group_layers
from paged_backend.kv_cache.storage import KVStorage
from paged_backend.runner.attention import ForwardContext, attach, detach, handling
from paged_backend.runner.batch import FlatBatch
from paged_backend.runner.loader import keeps_logits
from paged_backend.runner.probe import probe
from paged_backend.runner.rotated_attention import RotatedAttention
from paged_backend.runner.step import PagedAttention, StepInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from paged_backend.runner.fused import FusedModel

logger = logging.getLogger(__name__)


class PagedModel:
    """A transformers model over a paged KV cache."""

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        self.model, self.backend = model, backend
        self.device, self.dtype = model.device, model.dtype
        self.storage: KVStorage | None = None
        self.fused: FusedModel | None = None
        """Computes the same with packed weights and fused kernels, where the model's structure is known."""
        self._keeps_logits = keeps_logits(model)
        # Any 4-D mask makes transformers skip building one.
        self._no_mask = torch.empty(1, 1, 1, 1, device=self.device)
        attach(model)
        try:
            self.layers = probe(model)
        except BaseException:
            detach(model)
            raise
        self.groups = group_layers([layer.spec for layer in self.layers])
        self._group_of = [
            next(index for index, group in enumerate(self.groups) if layer in group.layers)
            for layer in range(len(self.layers))
        ]

    def fuse(self, max_positions: int, layer_kernels: ModuleType, *, one_call: bool = True) -> None:
        """Use fused layers for up to `max_positions`, of these kernels; `one_call`: see `EngineConfig`.

        Raises `NotFusable`.
        """
        from paged_backend.runner.fused import FusedModel, NotFusable

        if len({layer.spec.group for layer in self.layers}) > 1:
            raise NotFusable("its layers have different numbers of query heads a KV head")
        self.fused = FusedModel(self.model, self.layers, max_positions, layer_kernels)
        if not one_call:
            self.fused.decoder = None

    @torch.inference_mode()
    def refresh(self) -> None:
        """See weights that have changed since."""
        if self.fused is not None:
            self.fused.refresh()

    def allocate(self, num_blocks: int, block_size: int) -> KVStorage:
        """Make the cache, of zeros."""
        self.storage = KVStorage(
            self.backend,
            [layer.spec for layer in self.layers],
            self.groups,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=self.dtype,
            device=self.device,
        )
        return self.storage

    def close(self) -> None:
        """Give the model its own attention back and drop the cache."""
        self.storage = self.fused = None
        detach(self.model)

    def make_counters(self, rows: int) -> Tensor:
        """What `DecodeRows` of up to `rows` need."""
        heads = max(layer.spec.num_kv_heads for layer in self.layers)
        return torch.zeros(rows * heads, dtype=torch.int32, device=self.device)

    def compute(self, inputs: StepInputs) -> Tensor:
        """Logits of the tokens that sample, `[rows, vocab]` in the model's dtype, by the fused model."""
        assert self.storage is not None
        assert self.fused is not None
        attention = PagedAttention(inputs, self.storage.layers, self._group_of)
        attention.plan([layer.spec for layer in self.layers])
        return self.fused(inputs.input_ids, attention, inputs.sampled_at)

    def forward(self, flat: FlatBatch, starts: list[int], counts: list[int]) -> Tensor:
        """Float32 logits `[len(flat.logits_at), vocab]` of one step. There must be a cache (`allocate`)."""
        assert self.storage is not None
        num_single = next((row for row, count in enumerate(counts) if count > 1), len(counts))
        if self.fused is not None and getattr(self.backend, "has_device_steps", False):
            with torch.inference_mode():
                return self.compute(self._inputs(flat, starts, counts, num_single)).float()
        batches = [
            AttentionBatch(self._on_device(slot_mapping), self._on_device(block_tables), starts, counts, num_single)
            for slot_mapping, block_tables in zip(flat.slot_mapping, flat.block_tables, strict=True)
        ]
        at = self._on_device(flat.logits_at)
        if self.fused is not None:
            attention = RotatedAttention(self.backend, self.storage.layers, self._group_of, batches, at)
            with torch.inference_mode():
                return self.fused(self._on_device(flat.input_ids), attention, at).float()
        keep = {"logits_to_keep": at} if self._keeps_logits else {}
        context = ForwardContext(
            self.backend, self.layers, self.storage.layers, [batches[group] for group in self._group_of]
        )
        with handling(context), torch.inference_mode():
            logits: Tensor = self.model(
                input_ids=self._on_device(flat.input_ids).unsqueeze(0),
                position_ids=self._on_device(flat.positions).unsqueeze(0),
                attention_mask=self._no_mask,
                use_cache=False,
                **keep,
            ).logits[0]
            context.check()
            return (logits if keep else logits[at]).float()

    def _inputs(self, flat: FlatBatch, starts: list[int], counts: list[int], num_single: int) -> StepInputs:
        """The same step with block tables by row instead of by slot."""
        from paged_kernels.gpu.decode_attention import DecodeRows
        from paged_kernels.gpu.prefill_attention import PrefillRows, plan_tiles

        def ints(values: Any) -> Tensor:
            return self._on_device(np.ascontiguousarray(values, dtype=np.int32))

        offsets = np.cumsum(counts) - counts
        row_of = np.repeat(np.arange(len(counts)), counts)
        chunked = slice(num_single, None)
        decodes = chunks = None
        if num_single:
            counters = self.make_counters(num_single)
            decodes = DecodeRows(ints(np.arange(num_single)), ints(starts[:num_single]), counters)
        if num_single < len(counts):
            tiles = plan_tiles(starts[chunked], counts[chunked], self.layers[0].spec.group)
            rows = np.arange(num_single, len(counts))
            chunks = PrefillRows(*map(ints, (rows, starts[chunked], counts[chunked], offsets[chunked], *tiles)))
        at = flat.logits_at
        return StepInputs(
            ints(flat.input_ids),
            ints(flat.positions),
            self._on_device(np.ascontiguousarray(flat.slot_mapping)),
            self._on_device(np.ascontiguousarray(flat.block_tables)),
            decodes,
            chunks,
            DecodeRows(ints(row_of[at]), ints(flat.positions[at]), self.make_counters(len(at))),
            self._on_device(at),
        )

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

"""Runs step plans on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels.attention import AttentionBackend, AttentionBatch, LayerCache
from torch import Tensor

from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.request import Request
from paged_backend.runner.attention import ForwardContext, attach, detach, handling
from paged_backend.runner.batch import BatchState, FlatBatch
from paged_backend.runner.loader import keeps_logits
from paged_backend.runner.probe import probe
from paged_backend.runner.sampling import LogitsProcessor, Sampler
from paged_backend.scheduler.scheduler import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PagedModel:
    """A transformers model over a paged KV cache: flat batches of tokens in, logits out."""

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        self.model, self.backend = model, backend
        self.device, self.dtype = model.device, model.dtype
        self.caches: list[LayerCache] = []
        self._keeps_logits = keeps_logits(model)
        # Any 4-D mask makes transformers skip building one.
        self._no_mask = torch.empty(1, 1, 1, 1, device=self.device)
        attach(model)
        try:
            self.layers = probe(model)
        except BaseException:
            detach(model)
            raise

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Make the cache, of zeros."""
        self.caches = [
            self.backend.allocate(layer.spec, num_blocks, block_size, self.dtype, self.device) for layer in self.layers
        ]

    def clear(self, blocks: list[int]) -> None:
        """Make blocks all zero again."""
        for stored in itertools.chain.from_iterable(self.caches):
            stored[blocks] = 0

    def close(self) -> None:
        """Give the model its own attention back and drop the cache."""
        self.caches = []
        detach(self.model)

    def forward(self, flat: FlatBatch, starts: list[int], counts: list[int]) -> Tensor:
        """Float32 logits `[len(flat.logits_at), vocab]` of one step."""
        batch = AttentionBatch(
            slot_mapping=self._on_device(flat.slot_mapping),
            block_tables=self._on_device(flat.block_tables),
            starts=starts,
            counts=counts,
            num_single=next((row for row, count in enumerate(counts) if count > 1), len(counts)),
        )
        at = self._on_device(flat.logits_at)
        keep = {"logits_to_keep": at} if self._keeps_logits else {}
        context = ForwardContext(self.backend, self.layers, self.caches, batch)
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

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


class ModelRunner:
    """Turns step plans into tokens: batch state, forward, logits processors, sampling."""

    def __init__(
        self,
        paged_model: PagedModel,
        tables: BlockTables,
        *,
        max_model_len: int,
        sampler: Sampler,
        logits_processors: Sequence[LogitsProcessor],
    ) -> None:
        self.paged_model, self.tables = paged_model, tables
        self.state = BatchState(tables.array.shape[0], max_model_len)
        self._sampler, self._logits_processors = sampler, logits_processors

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[int]:
        """Run the step and return a token for each row that samples, in the order of the plan.

        -1 stands for a row whose logits are not finite; its blocks are cleared, lest their NaN outlive it.
        """
        for request in plan.admitted:
            self.state.load(request)
        flat = self.state.flatten(plan, self.tables.array, self.tables.block_size)
        logits = self.paged_model.forward(flat, plan.starts, plan.counts)
        sampling = [request for request, samples in zip(plan.requests, plan.samples, strict=True) if samples]
        if not sampling:
            return []
        for processor in self._logits_processors:
            processor(logits, sampling)
        _forbid_early_stops(logits, sampling)
        finite = logits.max(-1).values.isfinite().cpu().numpy()
        if not finite.all():
            logits[torch.from_numpy(~finite)] = 0.0
        slots = np.array([request.slot for request in sampling])
        positions = np.array([len(request.token_ids) for request in sampling])
        tokens = self._sampler(logits, self.state.sampling(slots, positions)).cpu().numpy()
        self.state.append(slots, positions, tokens)
        for slot in slots[~finite]:
            self.paged_model.clear(self.tables.blocks(slot))
        chosen: list[int] = np.where(finite, tokens, -1).tolist()
        return chosen


def _forbid_early_stops(logits: Tensor, requests: Sequence[Request]) -> None:
    """No stop token before `min_tokens`."""
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens and request.stop_token_ids:
            logits[row, list(request.stop_token_ids)] = float("-inf")

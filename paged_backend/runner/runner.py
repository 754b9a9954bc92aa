"""Runs step plans on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels.attention import AttentionBackend, AttentionBatch
from torch import Tensor

from paged_backend.beam import Candidates, num_candidates
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.groups import group_layers
from paged_backend.kv_cache.moves import BlockMoves
from paged_backend.kv_cache.storage import KVStorage
from paged_backend.kv_cache.swap import SwapSpace
from paged_backend.request import Request
from paged_backend.runner.attention import ForwardContext, attach, detach, handling
from paged_backend.runner.batch import BatchState, FlatBatch
from paged_backend.runner.loader import keeps_logits
from paged_backend.runner.probe import probe
from paged_backend.runner.sampling import LogitsProcessor, Sampler
from paged_backend.scheduler.plan import StepPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PagedModel:
    """A transformers model over a paged KV cache: flat batches of tokens in, logits out."""

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        self.model, self.backend = model, backend
        self.device, self.dtype = model.device, model.dtype
        self.storage: KVStorage | None = None
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
        self.storage = None
        detach(self.model)

    def forward(self, flat: FlatBatch, starts: list[int], counts: list[int]) -> Tensor:
        """Float32 logits `[len(flat.logits_at), vocab]` of one step. There must be a cache (`allocate`)."""
        assert self.storage is not None
        num_single = next((row for row, count in enumerate(counts) if count > 1), len(counts))
        batches = [
            AttentionBatch(self._on_device(slot_mapping), self._on_device(block_tables), starts, counts, num_single)
            for slot_mapping, block_tables in zip(flat.slot_mapping, flat.block_tables, strict=True)
        ]
        at = self._on_device(flat.logits_at)
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

    def _on_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


class ModelRunner:
    """Turns step plans into tokens: block moves, batch state, forward, logits processors, sampling."""

    def __init__(
        self,
        paged_model: PagedModel,
        tables: BlockTables,
        *,
        max_model_len: int,
        sampler: Sampler,
        logits_processors: Sequence[LogitsProcessor],
        swap: SwapSpace | None = None,
    ) -> None:
        self.paged_model, self.tables, self._swap = paged_model, tables, swap
        self.state = BatchState(tables.array.shape[1], max_model_len)
        self._sampler, self._logits_processors = sampler, logits_processors

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[int | Candidates]:
        """Run the step and return what each row that samples got, in the order of the plan.

        That is a token, or the likeliest candidates of a steered request; -1 if the row's logits are not finite.
        """
        self._move(plan.moves)
        for request in plan.loads:
            self.state.load(request)
        if not len(plan.slots):
            return []
        flat = self.state.flatten(plan, self.tables.array, self.tables.block_size)
        logits = self.paged_model.forward(flat, plan.starts.tolist(), plan.counts.tolist())
        requests = plan.sampling
        if not requests:
            return []
        for processor in self._logits_processors:
            processor(logits, requests)
        finite = logits.max(-1).values.isfinite().cpu().numpy()
        if not finite.all():
            logits[torch.from_numpy(~finite)] = 0.0
        candidates = {row: _candidates(logits[row], request) for row, request in enumerate(requests) if request.steered}
        _forbid_early_stops(logits, requests)
        slots = plan.slots[plan.samples]
        positions = (plan.starts + plan.counts)[plan.samples]
        tokens = self._sampler(logits, self.state.sampling(slots, positions)).cpu().numpy()
        self.state.append(slots, positions, tokens)
        chosen: list[int | Candidates] = np.where(finite, tokens, -1).tolist()
        for row, found in candidates.items():
            if finite[row]:
                chosen[row] = found
        return chosen

    def _move(self, moves: BlockMoves) -> None:
        storage = self.paged_model.storage
        assert storage is not None
        if self._swap is not None and moves.stores:
            self._swap.store(moves.stores)
        if moves.clears:
            storage.clear(moves.clears)
        if moves.copies:
            storage.copy(moves.copies)
        if self._swap is not None and moves.fetches:
            self._swap.fetch(moves.fetches)


def _candidates(logits: Tensor, request: Request) -> Candidates:
    """The likeliest next tokens of a beam; no stop token before `min_tokens`."""
    log_probabilities = logits.log_softmax(-1)
    if request.num_output_tokens < request.params.min_tokens:
        log_probabilities[list(request.stop_token_ids)] = float("-inf")
    best = log_probabilities.topk(min(num_candidates(request), len(logits)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _forbid_early_stops(logits: Tensor, requests: Sequence[Request]) -> None:
    """No stop token before `min_tokens`."""
    for row, request in enumerate(requests):
        if request.num_output_tokens < request.params.min_tokens and request.stop_token_ids:
            logits[row, list(request.stop_token_ids)] = float("-inf")

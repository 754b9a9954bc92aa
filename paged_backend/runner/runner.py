"""Runs step plans on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from paged_kernels import logits as logits_kernels
from torch import Tensor

from paged_backend.beam import Candidates, num_candidates
from paged_backend.kv_cache.block_tables import BlockTables
from paged_backend.kv_cache.moves import BlockMoves
from paged_backend.kv_cache.swap import SwapSpace
from paged_backend.request import Request
from paged_backend.runner.batch import BatchState
from paged_backend.runner.edits import LogitsEdits
from paged_backend.runner.logprobs import Logprobs, Sampled, asked
from paged_backend.runner.model import PagedModel
from paged_backend.runner.sampling import LogitsProcessor, Sampler
from paged_backend.runner.scored_prompts import ScoredPrompts
from paged_backend.scheduler.plan import StepPlan

Got = int | Sampled | Candidates
Score = tuple[Request, int, Sampled]
"""Of a request, the position of a token of its prompt, and how likely that was."""


class Launched(Protocol):
    """A step that the device runs, or has run."""

    def wait(self) -> list[Got]:
        """What each row that samples got, in the order of the plan, once it is on the host.

        That is a token, or -1 if the row's logits are not finite or forbid every token; with log-probabilities, if its
        request asks for them; or the likeliest candidates of a steered request.
        """
        ...

    def scores(self) -> list[Score]:
        """What tokens of prompts got that `plan.scoring` is about, after `wait`."""
        ...


@dataclass(slots=True)
class _Computed:
    """A step that has run."""

    tokens: list[Got]
    scored: list[Score] = field(default_factory=list)

    def wait(self) -> list[Got]:
        """See `Launched`."""
        return self.tokens

    def scores(self) -> list[Score]:
        """See `Launched`."""
        return self.scored


class ModelRunner:
    """Turns step plans into tokens: block moves, batch state, forward, logits processors, sampling."""

    logits_kernels = logits_kernels
    asynchronous = False
    """Whether `launch` returns before the step has run, so that there is something to be ahead of."""

    def prefers_whole(self, num_tokens: int) -> bool:
        """Whether a prompt of so many tokens is computed faster whole than in chunks."""
        return False

    def close(self) -> None:
        """Let go of what it holds on the device."""

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
        vocab_size = paged_model.model.get_input_embeddings().weight.shape[0]
        self._edits = LogitsEdits(tables.array.shape[1], vocab_size, paged_model.device, self.logits_kernels)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Run the step, after all that were launched before.

        Its rows may follow tokens that the step before sampled and nobody has waited for: they are taken from the batch
        state. Only beams and logits processors need all tokens of their requests.
        """
        self._move(plan.moves)
        for request in plan.loads:
            self.state.load(request)
            self._edits.load(request)
        return self._compute(plan) if len(plan.slots) else _Computed([])

    def _compute(self, plan: StepPlan) -> Launched:
        flat = self.state.flatten(plan, self.tables.array, self.tables.block_size)
        logits = self.paged_model.forward(flat, plan.starts.tolist(), plan.counts.tolist())
        requests, prompts = plan.sampling, ScoredPrompts(plan)
        prompts.look_up(logits[len(requests) :])
        if not requests:
            return _Computed([], prompts.scores())
        logits = logits[: len(requests)]
        logprobs = Logprobs(logits, asked(requests))
        for processor in self._logits_processors:
            processor(logits, requests)
        slots = plan.slots[plan.samples]
        positions = (plan.starts + plan.counts)[plan.samples]
        device_slots = torch.from_numpy(slots.astype(np.int32)).to(logits.device)
        candidates = {row: _candidates(logits[row], request) for row, request in enumerate(requests) if request.steered}
        if self._edits.wanted(slots, positions):
            self._edits.apply(logits, requests, slots, positions, device_slots)
        finite = logits.amax(-1).isfinite().cpu().numpy()
        if not finite.all():
            logits[torch.from_numpy(~finite)] = 0.0
        tokens = self._draw(logits, slots, positions)
        self.state.append(slots, positions, tokens)
        tokens = np.where(finite, tokens, -1)
        on_device = torch.from_numpy(tokens.astype(np.int32)).to(logits.device)
        self._edits.count(on_device, device_slots)
        logprobs.look_up(on_device)
        chosen: list[Got] = tokens.tolist()
        instead: dict[int, Got] = {**logprobs.of(tokens.tolist()), **candidates}
        for row, got in instead.items():
            if finite[row]:
                chosen[row] = got
        return _Computed(chosen, prompts.scores())

    def _draw(
        self, logits: Tensor, slots: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """A token a row for these positions of their slots."""
        tokens: npt.NDArray[np.int64] = self._sampler(logits, self.state.sampling(slots, positions)).cpu().numpy()
        return tokens

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

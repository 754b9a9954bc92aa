"""Tokens of prompts that get log-probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from paged_backend.request import Request
from paged_backend.runner.logprobs import Logprobs, Sampled
from paged_backend.scheduler.plan import StepPlan

_NONE = np.zeros(0, dtype=np.int64)


class ScoredPrompts:
    """Of one step; most steps have none. Where the model has a token, its logits tell of the next, which is known."""

    def __init__(self, plan: StepPlan) -> None:
        self._next: list[tuple[Request, int]] = []
        """Requests, and which tokens of their prompts."""
        self.places, self.slots, self.positions = [_NONE] * 3
        """`[tokens]` each: in the flat batch, and in the cache."""
        if not plan.scoring:
            return
        offsets, parts = np.cumsum(plan.counts) - plan.counts, []
        for row, request in plan.scoring:
            start = int(plan.starts[row])
            positions = np.arange(start, min(start + int(plan.counts[row]), request.num_prompt_tokens - 1))
            parts.append((positions + offsets[row] - start, np.full(len(positions), plan.slots[row]), positions))
            self._next += [(request, position + 1) for position in positions.tolist()]
        self.places, self.slots, self.positions = map(np.concatenate, zip(*parts, strict=True))

    def look_up(self, logits: Tensor) -> None:
        """`logits` `[tokens, vocab]` are those at `places`. Does not wait for them."""
        if self._next:
            self._tokens = [request.token_ids[position] for request, position in self._next]
            counts = [request.params.prompt_logprobs or 0 for request, _ in self._next]
            self._logprobs = Logprobs(logits, dict(enumerate(counts)))
            self._logprobs.look_up(torch.tensor(self._tokens, device=logits.device))

    def scores(self) -> list[tuple[Request, int, Sampled]]:
        """Request, position in its prompt, and how likely the token there is, once the device has them."""
        if not self._next:
            return []
        found = self._logprobs.of(self._tokens)
        return [(request, position, found[row]) for row, (request, position) in enumerate(self._next)]

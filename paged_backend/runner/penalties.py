"""What the penalties need to know: how often each token came."""

from __future__ import annotations

from collections import Counter
from types import ModuleType

import torch
from paged_kernels.logits import PenaltyTables
from torch import Tensor

from paged_backend.request import Request


class Penalties:
    """The penalties of the slots whose requests ask for some, and the tokens these have, counted on the device."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, kernels: ModuleType) -> None:
        self._kernels, self._row_of = kernels, dict[int, int]()
        self._free: list[int] = []
        """Rows of the counts that no slot has."""
        none, zeros = (
            torch.full((num_slots,), -1, dtype=torch.int32, device=device),
            torch.zeros(num_slots, device=device),
        )
        counts = torch.empty(0, vocab_size, dtype=torch.int32, device=device)
        self._tables = PenaltyTables(none, zeros, zeros.clone(), zeros.clone(), counts)

    def load(self, request: Request) -> None:
        """A request got its slot."""
        slot, params = request.slot, request.params
        if slot in self._row_of:
            self._free.append(self._row_of.pop(slot))
            self._tables.row[slot] = -1
        if not params.penalised:
            return
        if not self._free:
            self._grow()
        tables, row = self._tables, self._free.pop()
        self._row_of[slot] = row
        counts = Counter(dict.fromkeys(request.token_ids[: request.num_prompt_tokens], 1))
        for token in request.token_ids[request.num_prompt_tokens :]:
            counts[token] += 2
        tables.counts[row] = 0
        tokens, times = (torch.tensor(list(part), device=tables.row.device) for part in (counts, counts.values()))
        tables.counts[row, tokens] = times.int()
        tables.repetition[slot], tables.presence[slot] = params.repetition_penalty, params.presence_penalty
        tables.frequency[slot], tables.row[slot] = params.frequency_penalty, row

    def apply(self, logits: Tensor, slots: Tensor) -> None:
        """See `paged_kernels.logits.penalise`."""
        if self._row_of:
            self._kernels.penalise(logits, slots, self._tables)

    def count(self, tokens: Tensor, slots: Tensor) -> None:
        """See `paged_kernels.logits.count_tokens`."""
        if self._row_of:
            self._kernels.count_tokens(tokens, slots, self._tables)

    def _grow(self) -> None:
        """Twice the rows: each takes 4 bytes a token of the vocabulary, and most engines need none."""
        counts = self._tables.counts
        more = max(4, len(counts))
        self._free += range(len(counts), len(counts) + more)
        self._tables = self._tables._replace(counts=torch.cat([counts, counts.new_zeros(more, counts.shape[1])]))

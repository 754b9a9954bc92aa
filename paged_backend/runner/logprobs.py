"""Log-probabilities of the tokens chosen, and of the likeliest, for requests that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paged_backend.request import Request


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token, and how likely it and the likeliest were."""

    token: int
    logprob: float
    rank: int
    """1 is the likeliest of the vocabulary."""
    likeliest: list[tuple[int, float]]
    """As many token ids and log-probabilities as were asked for, the likeliest first."""


class Logprobs:
    """Of one step's rows whose requests ask for them, by the logits as the model gave them."""

    def __init__(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Row i of `logits` `[rows, vocab]` is of `requests[i]`; they may be changed afterwards."""
        asked = {row: request.params.logprobs for row, request in enumerate(requests)}
        self._asked = {row: count for row, count in asked.items() if count is not None}
        if self._asked:
            self._rows = torch.tensor(list(self._asked), device=logits.device)
            self._all = logits[self._rows].float().log_softmax(-1)
            most = max(self._asked.values())
            self._likeliest = self._all.topk(min(most, logits.shape[1]))

    def look_up(self, tokens: Tensor) -> None:
        """`tokens` `[rows]` were chosen. Does not wait for them."""
        if not self._asked:
            return
        chosen = tokens[self._rows].long().clamp(min=0)
        logprob = self._all.gather(1, chosen[:, None])
        rank = (self._all > logprob).sum(-1, keepdim=True) + 1
        values, indices = self._likeliest
        packed = torch.cat([logprob.double(), rank.double(), indices.double(), values.double()], 1)
        self._packed = torch.empty_like(packed, device="cpu", pin_memory=packed.is_cuda)
        self._packed.copy_(packed, non_blocking=True)
        self._done = torch.cuda.Event() if packed.is_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()
        del self._all, self._likeliest

    def add_to(self, tokens: list[int]) -> list[int | Sampled]:
        """The tokens of all rows, with what was asked for, once the device has it."""
        told: list[int | Sampled] = list(tokens)
        if not self._asked:
            return told
        if self._done is not None:
            self._done.synchronize()
        for (row, count), (logprob, rank, *likeliest) in zip(self._asked.items(), self._packed.tolist(), strict=True):
            half = len(likeliest) // 2
            pairs = list(zip(map(int, likeliest[:half]), likeliest[half:], strict=True))
            if tokens[row] >= 0:
                told[row] = Sampled(tokens[row], logprob, int(rank), pairs[:count])
        return told

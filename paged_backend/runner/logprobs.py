"""Log-probabilities of chosen tokens, and of the likeliest ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def asked(requests: Sequence[Request]) -> dict[int, int]:
    """How many of the likeliest tokens, by row, for the rows of requests that ask for log-probabilities."""
    return {row: request.params.logprobs for row, request in enumerate(requests) if request.params.logprobs is not None}


class Logprobs:
    """Of some rows of logits."""

    def __init__(self, logits: Tensor, asked: Mapping[int, int]) -> None:
        """`asked` says for which rows of `logits` `[rows, vocab]`, and how many of the likeliest tokens.

        The logits may be changed afterwards.
        """
        self._asked = asked
        if asked:
            self._rows = torch.tensor(list(asked), device=logits.device)
            self._all = logits[self._rows].float().log_softmax(-1)
            self._likeliest = self._all.topk(min(max(asked.values()), logits.shape[1]))

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

    def of(self, tokens: list[int]) -> dict[int, Sampled]:
        """By row, once the device has them; but for rows that got no token."""
        if not self._asked:
            return {}
        if self._done is not None:
            self._done.synchronize()
        found = {}
        for (row, count), (logprob, rank, *likeliest) in zip(self._asked.items(), self._packed.tolist(), strict=True):
            half = len(likeliest) // 2
            pairs = zip(map(int, likeliest[:count]), likeliest[half : half + count], strict=True)
            if tokens[row] >= 0:
                found[row] = Sampled(tokens[row], logprob, int(rank), list(pairs))
        return found

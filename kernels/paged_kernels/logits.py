"""What changes logits before a token is chosen, in place: masks and penalties. The plain PyTorch reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PenaltyTables(NamedTuple):
    """Device tensors with one entry a request slot, and the counts of the slots that ask for penalties."""

    row: Tensor
    """`[slots]` int32: which row of `counts` is the slot's; -1: no penalties."""
    repetition: Tensor
    """`[slots]` float32, 1 is none."""
    presence: Tensor
    """`[slots]` float32"""
    frequency: Tensor
    """`[slots]` float32"""
    counts: Tensor
    """`[penalty_rows, vocab]` int32: twice how often a token was generated, plus 1 if the prompt has it."""


def mask(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Forbid (-inf) the tokens of `logits[rows[i]]` whose bits in `allowed[i]` are 0.

    `logits` is `[rows, vocab]`, contiguous within a row; `rows` `[n]` int32, none twice; `allowed` `[n, words]` int32,
    where token t is bit `t % 32` of word `t // 32`.
    """
    bits = (allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=allowed.device)) & 1
    forbidden = bits.view(len(rows), -1)[:, : logits.shape[1]] == 0
    logits[rows.long()] = logits[rows.long()].masked_fill(forbidden, float("-inf"))


def penalise(logits: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """Apply the repetition, frequency and presence penalties of the rows whose slots ask for them.

    `logits` is `[rows, vocab]`, contiguous within a row, `slots` `[rows]` int32, -1 for padding. The logit of a token
    of the prompt or the output is divided by the repetition penalty, or multiplied if it is negative (Keskar et al.,
    2019). Then `frequency * times + presence` is subtracted for tokens generated so far.
    """
    count_rows = torch.where(slots >= 0, tables.row[slots.clamp(min=0).long()], -1)
    at = (count_rows >= 0).nonzero().squeeze(1)
    slot, counts, x = slots[at].long(), tables.counts[count_rows[at].long()], logits[at].float()
    factor = tables.repetition[slot, None]
    x = torch.where(counts == 0, x, torch.where(x > 0, x / factor, x * factor))
    times = counts >> 1
    x -= tables.frequency[slot, None] * times + tables.presence[slot, None] * (times > 0)
    logits[at] = x.to(logits.dtype)


def count_tokens(tokens: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """Count one generated token a row, `tokens` `[rows]` int32 of `slots` `[rows]` int32; -1 in either: none.

    No slot may come twice.
    """
    count_rows = torch.where(slots >= 0, tables.row[slots.clamp(min=0).long()], -1)
    counted = (tokens >= 0) & (count_rows >= 0)
    tables.counts[count_rows[counted].long(), tokens[counted].long()] += 2

"""What changes logits before a token is chosen: additions to single ones, and penalties."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add(logits, stride, rows, tokens, values, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.load(count)
    row = tl.load(rows + at, mask=inside, other=0).to(tl.int64)
    where = logits + row * stride + tl.load(tokens + at, mask=inside, other=0)
    value = tl.load(where, mask=inside, other=0.0).to(tl.float32) + tl.load(values + at, mask=inside, other=0.0)
    tl.store(where, value.to(logits.dtype.element_ty), mask=inside)


def add_to_logits(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor, count: Tensor) -> None:
    """Add `values[i]`, which may be -inf, to `logits[rows[i], tokens[i]]` for all i below `count[0]`.

    `rows`, `tokens` (int32) and `values` (float32) are `[capacity]`, `count` `[1]` int32. No pair may come twice.
    """
    capacity = rows.shape[0]
    _add[(triton.cdiv(capacity, 256),)](logits, logits.stride(0), rows, tokens, values, count, BLOCK=256, num_warps=4)


def add_to_logits_reference(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor, count: Tensor) -> None:
    """The same in plain PyTorch."""
    where = rows[: int(count)].long(), tokens[: int(count)].long()
    logits[where] = (logits[where].float() + values[: int(count)]).to(logits.dtype)


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
    """`[penalty_rows, vocab]` int16 or int32: twice how often a token was generated, plus 1 if the prompt has it."""


@triton.jit
def _penalise(
    logits, stride, slots, rows, repetition, presence, frequency, counts, count_stride, vocab, BLOCK: tl.constexpr
):
    row = tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    count_row = tl.load(rows + slot)
    if count_row < 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    count = tl.load(counts + count_row.to(tl.int64) * count_stride + at, mask=inside, other=0).to(tl.int32)
    where = logits + row.to(tl.int64) * stride + at
    x = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(repetition + slot)
    x = tl.where(count > 0, tl.where(x > 0, x / factor, x * factor), x)
    generated = count >> 1
    x -= tl.load(frequency + slot) * generated + tl.where(generated > 0, tl.load(presence + slot), 0.0)
    tl.store(where, x.to(logits.dtype.element_ty), mask=inside)


def penalise(logits: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """Apply, in place, the repetition, frequency and presence penalties of the rows whose slots ask for them.

    `logits` is `[rows, vocab]`, contiguous within a row, `slots` `[rows]` int32, -1 for padding. The logit of a token
    of the prompt or the output is divided by the repetition penalty, or multiplied if it is negative (Keskar et al.,
    2019). Then `frequency * times + presence` is subtracted for tokens generated so far.
    """
    rows, vocab = logits.shape
    *parameters, counts = tables
    _penalise[(triton.cdiv(vocab, 4096), rows)](
        logits, logits.stride(0), slots, *parameters, counts, counts.stride(0), vocab, BLOCK=4096, num_warps=4
    )


def penalise_reference(logits: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """The same in plain PyTorch."""
    for row, slot in enumerate(slots.tolist()):
        if slot < 0 or tables.row[slot] < 0:
            continue
        count, x = tables.counts[tables.row[slot]], logits[row].float()
        factor, generated = tables.repetition[slot], count >> 1
        x = x.where(count == 0, torch.where(x > 0, x / factor, x * factor))
        x -= tables.frequency[slot] * generated + tables.presence[slot] * (generated > 0)
        logits[row] = x.to(logits.dtype)


@triton.jit
def _count(tokens, slots, rows, counts, count_stride, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + at, mask=at < length, other=-1)
    token = tl.load(tokens + at, mask=slot >= 0, other=-1)
    row = tl.load(rows + slot, mask=token >= 0, other=-1)
    where = counts + row.to(tl.int64) * count_stride + token
    count = tl.load(where, mask=row >= 0, other=0)
    tl.store(where, count + 2, mask=row >= 0)


def count_tokens(tokens: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """Count one generated token a row, `tokens` `[rows]` int32 of `slots` `[rows]` int32; -1 in either: none.

    No slot may come twice.
    """
    rows, counts = tokens.shape[0], tables.counts
    _count[(triton.cdiv(rows, 128),)](tokens, slots, tables.row, counts, counts.stride(0), rows, BLOCK=128, num_warps=4)


def count_tokens_reference(tokens: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """The same in plain PyTorch."""
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        if token >= 0 and slot >= 0 and tables.row[slot] >= 0:
            tables.counts[tables.row[slot], token] += 2

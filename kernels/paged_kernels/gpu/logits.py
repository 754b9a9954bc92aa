"""Kernels that do what `paged_kernels.logits` does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from paged_kernels.logits import PenaltyTables


@triton.jit
def _mask(logits, stride, rows, allowed, words, vocab, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    word = tl.load(allowed + tl.program_id(1).to(tl.int64) * words + at // 32, mask=inside, other=-1)
    row = tl.load(rows + tl.program_id(1)).to(tl.int64)
    tl.store(logits + row * stride + at, float("-inf"), mask=inside & (((word >> (at % 32)) & 1) == 0))


def mask(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """See `paged_kernels.logits.mask`."""
    vocab = logits.shape[1]
    grid = triton.cdiv(vocab, 4096), len(rows)
    _mask[grid](logits, logits.stride(0), rows, allowed, allowed.shape[1], vocab, BLOCK=4096, num_warps=4)


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
    count = tl.load(counts + count_row.to(tl.int64) * count_stride + at, mask=inside, other=0)
    where = logits + row.to(tl.int64) * stride + at
    x = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(repetition + slot)
    x = tl.where(count > 0, tl.where(x > 0, x / factor, x * factor), x)
    generated = count >> 1
    x -= tl.load(frequency + slot) * generated + tl.where(generated > 0, tl.load(presence + slot), 0.0)
    tl.store(where, x.to(logits.dtype.element_ty), mask=inside)


def penalise(logits: Tensor, slots: Tensor, tables: PenaltyTables) -> None:
    """See `paged_kernels.logits.penalise`."""
    rows, vocab = logits.shape
    *parameters, counts = tables
    _penalise[(triton.cdiv(vocab, 4096), rows)](
        logits, logits.stride(0), slots, *parameters, counts, counts.stride(0), vocab, BLOCK=4096, num_warps=4
    )


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
    """See `paged_kernels.logits.count_tokens`."""
    rows, counts = tokens.shape[0], tables.counts
    _count[(triton.cdiv(rows, 128),)](tokens, slots, tables.row, counts, counts.stride(0), rows, BLOCK=128, num_warps=4)

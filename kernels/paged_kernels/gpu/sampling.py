"""Choosing one token a row from logits, with no sort.

The vocabulary is divided into groups of 128 tokens. A first kernel reads the logits once, in tiles of 32 groups, and
leaves the maximum and the mass (sum of exponentials) of each group. A second kernel has one program a row. Group
maxima bound the threshold of top-k or top-p from below, so that only the groups above the bound are read again: a
handful, unless the distribution is flat. What may be the threshold is copied together, then narrowed by four pivots a
pass. If the distribution is flat, a sample of the groups first tells about where the threshold is, and the copy proves
it. The draw is exact and has two levels: a group in proportion to the mass kept in it, then one of its kept tokens,
both by Gumbel-max (Gumbel, 1954) with counter-based noise (Philox 4x32-10, Salmon et al., 2011). A level of groups
replaces a random number a token, which would cost more than the read.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = tl.constexpr(128)
_TILE = tl.constexpr(32)  # groups
_HIGHEST = tl.constexpr(2**31 - 1)
_LOG2_E = tl.constexpr(1 / math.log(2))
_ROWS = 32  # groups that a program reads at a time
_DEPTH = 16  # reads' worth of candidates that fit their list
# Low bits of a float32 that are the same in all values of the dtype.
_UNUSED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


class SamplingTables(NamedTuple):
    """Device tensors with one entry a request slot."""

    temperature: Tensor
    """`[slots]` float32, 0 is greedy."""
    top_k: Tensor
    """`[slots]` int32, 0 or less keeps every token."""
    top_p: Tensor
    """`[slots]` float32"""
    min_p: Tensor
    """`[slots]` float32"""
    seed: Tensor
    """`[slots, 2]` int32, low and high half."""
    last_token: Tensor
    """`[slots]` int32, written."""


@triton.jit
def _summarise(
    logits, stride, slots, temperature, tile_max, tile_argmax, tile_sum, group_max, group_sum, vocab, n_tiles
):
    tile, row = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    heat = tl.load(temperature + slot)
    group = tile * _TILE + tl.arange(0, _TILE)
    index = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    x = tl.load(logits + row.to(tl.int64) * stride + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, 1)
    # A sum is NaN if any logit is NaN or +inf; a group of nothing but -inf must not make it so.
    x -= tl.where(highest == float("-inf"), 0.0, highest)[:, None]
    top = tl.max(highest, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    out = row * n_tiles + tile
    tl.store(tile_max + out, top)
    tl.store(tile_argmax + out, tl.min(tl.where((x == 0) & (highest == top)[:, None], index, _HIGHEST)))
    tl.store(tile_sum + out, tl.sum(tl.sum(tl.exp(x), 1) * tl.exp(highest - base), 0))
    if heat > 0:
        group += row * n_tiles * _TILE
        tl.store(group_max + group, highest)
        tl.store(group_sum + group, tl.sum(tl.exp2(x * (_LOG2_E / heat)), 1))


@triton.jit
def _key(x, UNUSED_BITS: tl.constexpr):
    """Integer of the same order as float32 `x`."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> UNUSED_BITS


@triton.jit
def _value(key, UNUSED_BITS: tl.constexpr):
    """Inverse of `_key`."""
    bits = key << UNUSED_BITS
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & (-1 << UNUSED_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(low, high, position, index, level):
    key = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
    word, _, _, _ = tl.philox(key, index, position, level, 0)
    uniform = ((word >> 9).to(tl.float32) + 0.5) * 2.0**-23  # strictly between 0 and 1
    return -tl.log(-tl.log(uniform))


@triton.jit
def _read(source, ids, start, count, limit, ROWS: tl.constexpr):
    """Listed groups of `source` from `start` on: their ids `[ROWS]`, their values `[ROWS, 128]`, -inf outside."""
    at = start + tl.arange(0, ROWS)
    group = tl.load(ids + at, mask=at < count, other=0)
    index = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    inside = (at < count)[:, None] & (index < limit)
    return group, tl.load(source + index, mask=inside, other=float("-inf"))


@triton.jit
def _fold(x, ROWS: tl.constexpr):
    """Sums of `[ROWS, 128]` over eight neighbours, which one thread has loaded."""
    return tl.sum(tl.reshape(x, [ROWS * _GROUP // 8, 8]), 1)


@triton.jit
def _sums(x0, x1, x2, x3):
    """`[4]`, the sum of each: one reduction over the program for all."""
    return tl.sum(tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [x0.shape[0], 4]), 0)


@triton.jit
def _pivots(low, high, UNUSED_BITS: tl.constexpr):
    """`[4]` keys between `low` and `high`, at fifths of the keys and of the values between them, by turns.

    Keys are dense near 0, values far from it: dividing only the one may take many passes.
    """
    fifth = tl.arange(0, 4) + 1
    low_value = _value(low, UNUSED_BITS)
    by_value = _key(low_value + (_value(high - 1, UNUSED_BITS) - low_value) * (fifth / 5.0), UNUSED_BITS)
    by_key = low + ((high.to(tl.int64) - low) * fifth // 5).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(fifth % 2 == 1, by_value, by_key), low + 1), high - 1)


@triton.jit
def _weigh(source, ids, count, limit, top, scale, pivots, MASS: tl.constexpr, ROWS: tl.constexpr):
    """Mass, or number, of the tokens that reach each of `pivots`, `[4]` logits."""
    i = tl.arange(0, 4)
    pivot0 = tl.sum(tl.where(i == 0, pivots, 0.0), 0)
    pivot1 = tl.sum(tl.where(i == 1, pivots, 0.0), 0)
    pivot2 = tl.sum(tl.where(i == 2, pivots, 0.0), 0)
    pivot3 = tl.sum(tl.where(i == 3, pivots, 0.0), 0)
    sum0 = tl.zeros([ROWS * _GROUP // 8], tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    _, ahead = _read(source, ids, 0, count, limit, ROWS)
    for start in range(0, count, ROWS):
        x = ahead.to(tl.float32)
        _, ahead = _read(source, ids, start + ROWS, count, limit, ROWS)
        weight = tl.exp2((x - top) * scale) if MASS else 1.0
        sum0 += _fold(tl.where(x >= pivot0, weight, 0.0), ROWS)
        sum1 += _fold(tl.where(x >= pivot1, weight, 0.0), ROWS)
        sum2 += _fold(tl.where(x >= pivot2, weight, 0.0), ROWS)
        sum3 += _fold(tl.where(x >= pivot3, weight, 0.0), ROWS)
    return _sums(sum0, sum1, sum2, sum3)


@triton.jit
def _search(
    source,
    ids,
    count,
    limit,
    top,
    scale,
    low,
    high,
    base,
    target,
    total,
    DOUBT: tl.constexpr,
    MASS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Narrow the keys from `low` to below `high` to the highest one such that the tokens at least that likely weigh
    `target`: returns it, the next key and the weight from that on. Tokens from `high` on weigh `base`.

    In a sample, of weight `total`, weights are known but for `DOUBT` standard errors of what lies below the key. The
    search ends with keys that are surely below and above.
    """
    above = base
    moved = low < high
    while (low + 1 < high) & moved:
        key = _pivots(low, high, UNUSED_BITS)
        pivots = _value(key, UNUSED_BITS)
        weight = base + _weigh(source, ids, count, limit, top, scale, pivots, MASS, ROWS)
        doubt = tl.zeros([4], tl.float32)
        if DOUBT > 0:
            most = tl.exp2((pivots - top) * scale)  # of one token below
            doubt = DOUBT * tl.sqrt((tl.maximum(total - weight, 0.0) + most) * most)
        enough, short = weight - doubt >= target, weight + doubt < target
        above = tl.max(tl.where(short, weight, above), 0)
        last_low, last_high = low, high
        low, high = tl.max(tl.where(enough, key, low), 0), tl.min(tl.where(short, key, high), 0)
        moved = (low > last_low) | (high < last_high)
    return low, high, above


@triton.jit
def _extract(
    logits,
    groups,
    count,
    vocab,
    top,
    scale,
    low,
    high,
    found,
    UNUSED_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Copy the logits strictly between two keys to `found` `[DEPTH, ROWS, 128]`.

    Eight neighbours, which one thread has loaded, go together if there is any among them, the others as -inf, to the
    next level of their column: that takes neither exchange nor order. Returns the number of levels, which may be more
    than fit, the mass from `high` on and the mass between.
    """
    low_value, high_value = _value(low, UNUSED_BITS), _value(high, UNUSED_BITS)
    LANES: tl.constexpr = ROWS * _GROUP // 8
    column = tl.arange(0, LANES)[:, None] * 8 + tl.arange(0, 8)[None, :]
    level = tl.zeros([LANES], tl.int32)
    above = tl.zeros([LANES], tl.float32)
    between = above
    _, ahead = _read(logits, groups, 0, count, vocab, ROWS)
    for start in range(0, count, ROWS):
        x = tl.reshape(ahead.to(tl.float32), [LANES, 8])
        _, ahead = _read(logits, groups, start + ROWS, count, vocab, ROWS)
        weight = tl.exp2((x - top) * scale)
        inside = (x > low_value) & (x < high_value)
        above += tl.sum(tl.where(x >= high_value, weight, 0.0), 1)
        between += tl.sum(tl.where(inside, weight, 0.0), 1)
        some = tl.max(inside.to(tl.int32), 1)
        x = tl.where(inside, x, float("-inf")).to(found.dtype.element_ty)
        tl.store(found + level[:, None] * (LANES * 8) + column, x, mask=((some > 0) & (level < DEPTH))[:, None])
        level += some
    levels = tl.max(level)
    for i in range(0, tl.minimum(levels, DEPTH)):
        tl.store(found + i * (LANES * 8) + column, float("-inf"), mask=(level <= i)[:, None])
    tl.debug_barrier()  # other threads read it
    return levels, tl.sum(above), tl.sum(between)


@triton.jit
def _middle(low, high, i):
    return (low * (4 - i) + high * (i + 1)) / 5


@triton.jit
def _reach(likely, mass, k, bound):
    """For each group, whether its maximum reaches `bound`; without top-k, what of its mass may lie below."""
    # Not the maximum, unless that does, too.
    below = tl.minimum(tl.where(likely >= bound, mass - tl.exp2(likely), mass), _GROUP * tl.exp2(bound))
    return tl.where(k > 0, (likely >= bound).to(tl.float32), below)


@triton.jit
def _bound(likely, mass, n_groups, k, p):
    """What every token kept reaches, by the groups alone: k groups do, or at most 1 - p of the mass lies below."""
    beyond = 0.99 * (1 - p) * tl.sum(mass, 0)  # short of 1 - p by more than rounding errors
    bound = tl.log2(beyond / (n_groups * _GROUP))
    if k > 0:
        finite = likely > float("-inf")
        bound = tl.where(tl.sum(finite.to(tl.int32), 0) < k, float("-inf"), tl.min(tl.where(finite, likely, 0.0), 0))
    ceiling = 0.0
    for _ in range(4):
        weight = _sums(
            _reach(likely, mass, k, _middle(bound, ceiling, 0)),
            _reach(likely, mass, k, _middle(bound, ceiling, 1)),
            _reach(likely, mass, k, _middle(bound, ceiling, 2)),
            _reach(likely, mass, k, _middle(bound, ceiling, 3)),
        )
        middle = _middle(bound, ceiling, tl.arange(0, 4))
        holds = tl.where(k > 0, weight >= k, weight <= beyond)
        bound = tl.maximum(bound, tl.max(tl.where(holds, middle, bound), 0))
        ceiling = tl.min(tl.where(holds, ceiling, middle), 0)
    return bound


@triton.jit
def _list(groups, group, listed):
    """Write the ids of the listed groups, in order; returns how many there are."""
    tl.store(groups + tl.cumsum(listed.to(tl.int32), 0) - 1, group, mask=listed)
    tl.debug_barrier()  # other threads read it
    return tl.sum(listed.to(tl.int32), 0)


@triton.jit
def _threshold(
    logits,
    groups,
    count,
    mass,
    vocab,
    top,
    scale,
    bound,
    k,
    p,
    whole,
    ids,
    found,
    UNUSED_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The logit of the least likely token that top-k and top-p keep, and how many equal to it are kept.

    `mass` is that of the `count` listed groups, `whole` of all. `ids` and `found` are scratch.
    """
    SAMPLE: tl.constexpr = 2 * ROWS
    least = bound / scale
    low = _key(top + least - 1e-5 * (tl.abs(top) - least), UNUSED_BITS)
    high = _key(top, UNUSED_BITS) + 1
    target = p * whole
    low_guess, high_guess = low, high
    guessed = (k <= 0) & (count > DEPTH * ROWS)
    if guessed:
        # There may be more candidates than fit. A sample of the groups tells about where the threshold is.
        sample = tl.arange(0, SAMPLE)
        tl.store(ids + sample, tl.load(groups + sample * count // SAMPLE))
        tl.debug_barrier()  # other threads read it
        everything = tl.full([4], float("-inf"), tl.float32)
        total = tl.max(_weigh(logits, ids, SAMPLE, vocab, top, scale, everything, True, ROWS), 0)
        goal = total - (mass - target) * SAMPLE / count
        low_guess, high_guess, _ = _search(
            logits, ids, SAMPLE, vocab, top, scale, low, high, 0.0, goal, total, 1.5, True, UNUSED_BITS, ROWS
        )
        low_guess -= 1
    levels, base, between = _extract(
        logits, groups, count, vocab, top, scale, low_guess, high_guess, found, UNUSED_BITS, ROWS, DEPTH
    )
    limit = vocab
    if (levels <= DEPTH) & ((guessed == 0) | ((base < target) & (base + between >= target))):
        every = tl.arange(0, DEPTH * ROWS)
        tl.store(ids + every, every)
        tl.debug_barrier()
        logits, groups, count, limit = found, ids, levels * ROWS, DEPTH * ROWS * _GROUP
        low, high = low_guess, high_guess
    else:
        base = 0.0
    ties = 1.0 * vocab
    if k > 0:
        low, _, above = _search(
            logits, groups, count, limit, top, scale, low, high, base, k, 0.0, 0, False, UNUSED_BITS, ROWS
        )
        ties = k - above
    if p < 1:
        kept = low
        if k > 0:
            next_value = tl.zeros([4], tl.float32) + _value(low + 1, UNUSED_BITS)
            reached = _weigh(logits, groups, count, limit, top, scale, next_value, True, ROWS)
            target = p * (tl.max(reached, 0) + ties * tl.exp2((_value(low, UNUSED_BITS) - top) * scale))
        low, _, above = _search(
            logits, groups, count, limit, top, scale, low, high, base, target, 0.0, 0, True, UNUSED_BITS, ROWS
        )
        enough = tl.maximum(tl.ceil((target - above) / tl.exp2((_value(low, UNUSED_BITS) - top) * scale)), 1.0)
        ties = tl.where((k > 0) & (low == kept), tl.minimum(ties, enough), enough)
    return _value(low, UNUSED_BITS), ties


@triton.jit
def _choose(
    logits,
    stride,
    slots,
    positions,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    last_token,
    tile_max,
    tile_argmax,
    tile_sum,
    group_max,
    group_sum,
    groups,
    found,
    kept_sums,
    tokens,
    logprobs,
    vocab,
    n_tiles,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if slot < 0:
        tl.store(tokens + row, -1)
        return
    tile = tl.arange(0, TILES)
    out = row * n_tiles + tile
    highest = tl.load(tile_max + out, mask=tile < n_tiles, other=float("-inf"))
    top = tl.max(highest, 0)
    total = tl.sum(tl.load(tile_sum + out, mask=tile < n_tiles, other=0.0) * tl.exp(highest - top), 0)
    if not total > 0:  # also NaN
        tl.store(tokens + row, -1)
        tl.store(logprobs + row, float("nan"))
        return
    heat = tl.load(temperature + slot)
    logits += row.to(tl.int64) * stride
    if heat > 0:
        k = tl.load(top_k + slot)
        k = tl.where(k < vocab, k, 0)
        p = tl.maximum(tl.load(top_p + slot), 0.0)
        least = tl.minimum(tl.load(min_p + slot), 1.0)
        scale = _LOG2_E / heat
        n_groups = n_tiles * _TILE
        group = tl.arange(0, TILES * _TILE)
        group_max += row * n_groups
        group_sum += row * n_groups
        likely = (tl.load(group_max + group, mask=group < n_groups, other=float("-inf")) - top) * scale
        mass = tl.load(group_sum + group, mask=group < n_groups, other=0.0) * tl.exp2(likely)
        threshold = float("-inf")
        ties = 0.0
        quota = tl.zeros([TILES * _TILE], tl.float32)  # how many of the tokens at the threshold a group may keep
        if (k > 0) | (p < 1) | (least > 0):
            whole = tl.sum(mass, 0)
            filtered = (k > 0) | (p < 1)
            bound = tl.log2(least) - 1e-3
            if filtered:
                bound = _bound(likely, mass, n_groups, k, p)
            listed = (likely >= bound) & (group < n_groups)
            groups += row * (n_groups + DEPTH * ROWS)
            count = _list(groups, group, listed)
            if filtered:
                threshold, ties = _threshold(
                    logits,
                    groups,
                    count,
                    tl.sum(tl.where(listed, mass, 0.0), 0),
                    vocab,
                    top,
                    scale,
                    bound,
                    k,
                    p,
                    whole,
                    groups + n_groups,
                    found + row.to(tl.int64) * (DEPTH * ROWS * _GROUP),
                    UNUSED_BITS,
                    ROWS,
                    DEPTH,
                )
                if count > ROWS:
                    listed = listed & (likely >= (threshold - top) * scale)
                    count = _list(groups, group, listed)

            both = tl.arange(0, 2)[None, :]
            kept_sums += row * n_groups * 2
            next_ids, ahead = _read(logits, groups, 0, count, vocab, ROWS)
            for start in range(0, count, ROWS):
                ids, x = next_ids, ahead.to(tl.float32)
                next_ids, ahead = _read(logits, groups, start + ROWS, count, vocab, ROWS)
                weight = tl.exp2((x - top) * scale)
                above = tl.where((x > threshold) & (weight >= least), weight, 0.0)
                # One store of both: each takes an exchange between warps.
                sums = tl.join(tl.sum(above, 1), tl.sum((x == threshold).to(tl.float32), 1))
                tl.store(kept_sums + ids[:, None] * 2 + both, sums, mask=(start + tl.arange(0, ROWS) < count)[:, None])
            tl.debug_barrier()
            sums = tl.load(kept_sums + group[:, None] * 2 + both, mask=listed[:, None], other=0.0)
            mass, tied = tl.split(sums)
            quota = ties - (tl.cumsum(tied, 0) - tied)
            weight = tl.exp2((threshold - top) * scale)
            mass += tl.where(weight >= least, tl.minimum(tl.maximum(quota, 0.0), tied) * weight, 0.0)
        position = tl.load(positions + row)
        seed_low = tl.load(seed + 2 * slot)
        seed_high = tl.load(seed + 2 * slot + 1)
        score = tl.log(mass) + _gumbel(seed_low, seed_high, position, group, 1)
        drawn = tl.argmax(score, 0)
        index = drawn * _GROUP + tl.arange(0, _GROUP)
        x = tl.load(logits + index, mask=index < vocab, other=float("-inf")).to(tl.float32)
        tied = (x == threshold).to(tl.float32)
        ties = tl.sum(tl.where(group == drawn, quota, 0.0), 0)
        kept = (x > threshold) | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
        score = (x - top) * scale
        kept = kept & (tl.exp2(score) >= least)
        score = tl.where(kept, score / _LOG2_E, float("-inf")) + _gumbel(seed_low, seed_high, position, index, 0)
        token = tl.min(index, 0) + tl.argmax(score, 0)
    else:
        token = tl.load(tile_argmax + row * n_tiles + tl.argmax(highest, 0))
    tl.store(tokens + row, token)
    tl.store(last_token + slot, token)
    tl.store(logprobs + row, tl.load(logits + token).to(tl.float32) - top - tl.log(total))


def sample(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: SamplingTables, tokens: Tensor, logprobs: Tensor
) -> None:
    """Choose a token a row, by the parameters of the row's slot.

    `logits` is `[rows, vocab]`, contiguous within a row; `slots` and `positions` (where the new token will stand) are
    `[rows]` int32. Written: `tokens` `[rows]` int32, `logprobs` `[rows]` float32, the log-softmax of the logits as they
    are, and `tables.last_token`. A row of slot -1 is padding: its token is -1, and nothing else is written. So is the
    token of a row with a NaN or no finite maximum, whose logprob is NaN.

    Temperature 0 takes the first maximum. Otherwise, the logits are divided by the temperature, and kept are the top_k
    most likely tokens (the first of equal ones), of those the smallest head whose renormalised probability reaches
    top_p, of those the ones at least min_p times as likely as the best. The draw depends on the row's logits and
    parameters, its seed and the position, never on other rows.
    """
    rows, vocab = logits.shape
    n_tiles = triton.cdiv(vocab, _TILE.value * _GROUP.value)
    tile_max, tile_sum = torch.empty(2, rows, n_tiles, dtype=torch.float32, device=logits.device)
    tile_argmax = torch.empty(rows, n_tiles, dtype=torch.int32, device=logits.device)
    group_max, group_sum = torch.empty(2, rows, n_tiles * _TILE.value, dtype=torch.float32, device=logits.device)
    groups = torch.empty(rows, n_tiles * _TILE.value + _DEPTH * _ROWS, dtype=torch.int32, device=logits.device)
    kept_sums = torch.empty(rows, n_tiles * _TILE.value, 2, dtype=torch.float32, device=logits.device)
    found = torch.empty(rows, _DEPTH * _ROWS * _GROUP.value, dtype=logits.dtype, device=logits.device)
    stride = logits.stride(0)
    summary = (tile_max, tile_argmax, tile_sum, group_max, group_sum)
    _summarise[(n_tiles, rows)](logits, stride, slots, tables.temperature, *summary, vocab, n_tiles, num_warps=4)
    _choose[(rows,)](
        logits,
        stride,
        slots,
        positions,
        *tables,
        *summary,
        groups,
        found,
        kept_sums,
        tokens,
        logprobs,
        vocab,
        n_tiles,
        TILES=triton.next_power_of_2(n_tiles),
        ROWS=_ROWS,
        DEPTH=_DEPTH,
        UNUSED_BITS=_UNUSED_BITS[logits.dtype],
        num_warps=8,
    )


def sample_reference(
    logits: Tensor, slots: Tensor, positions: Tensor, tables: SamplingTables, tokens: Tensor, logprobs: Tensor
) -> None:
    """The same in plain PyTorch, with the same noise."""
    for row, slot in enumerate(slots.tolist()):
        tokens[row] = -1
        if slot < 0:
            continue
        x = logits[row].double().cpu()
        logprobs[row] = float("nan")
        if not x.max().isfinite():  # also NaN
            continue
        token = int(x.argmax())
        if tables.temperature[slot] > 0:
            scores = (x - x.max()) / float(tables.temperature[slot])
            scores = scores.where(kept_reference(scores, tables, slot), float("-inf"))
            pieces = torch.split(scores, _GROUP.value)
            noise = (tables.seed[slot].tolist(), int(positions[row]))
            masses = torch.stack([piece.logsumexp(0) for piece in pieces])
            group = int((masses + _gumbel_reference(*noise, torch.arange(len(pieces)), 1)).argmax())
            index = group * _GROUP.value + torch.arange(len(pieces[group]))
            token = int(index[(pieces[group] + _gumbel_reference(*noise, index, 0)).argmax()])
        tokens[row] = tables.last_token[slot] = token
        logprobs[row] = x.log_softmax(0)[token]


def kept_reference(scores: Tensor, tables: SamplingTables, slot: int) -> Tensor:
    """Boolean mask of what the filters of a slot keep of float64 `scores` `[vocab]`, logits over temperature."""
    order = scores.argsort(descending=True, stable=True)
    likely = scores[order].softmax(0)
    k, p = int(tables.top_k[slot]), float(tables.top_p[slot])
    if 0 < k < len(likely):
        likely[k:] = 0
        likely /= likely.sum()
    keep = likely > 0
    if p < 1:
        keep &= likely.cumsum(0) - likely < p
    keep &= likely >= min(1.0, float(tables.min_p[slot])) * likely[0]
    keep[0] = True  # however small top_p is
    return torch.zeros_like(keep).scatter_(0, order, keep)


def _gumbel_reference(seed: list[int], position: int, index: Tensor, level: int) -> Tensor:
    low = 2**32 - 1
    counter = [index.long(), *(torch.full_like(index, word) for word in (position, level, 0))]
    key = [half & low for half in seed]
    for _ in range(10):
        (high0, low0), (high2, low2) = (
            # Halves of the 64-bit product, which would overflow.
            ((word * (factor >> 16) + (word * (factor & 0xFFFF) >> 16)) >> 16, word * factor & low)
            for word, factor in ((counter[0], 0xD2511F53), (counter[2], 0xCD9E8D57))
        )
        counter = [high2 ^ counter[1] ^ key[0], low2, high0 ^ counter[3] ^ key[1], low0]
        key = [(half + step) & low for half, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
    return -(-(((counter[0] >> 9).double() + 0.5) * 2.0**-23).log()).log()

"""Attention of chunks of prompts over the paged cache.

A program takes a tile of query rows, all heads of a group for some consecutive tokens, and walks the keys that they see
with an online softmax (FlashAttention-2, Dao, 2023). Only the tiles of keys at the edges of what the rows see are
masked.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from paged_kernels.attention import LayerCache, LayerSpec, _attend, _visible
from paged_kernels.gpu.decode_attention import _first_seen, _softcapped

LOG2E = tl.constexpr(1.4426950408889634)
ROWS = 128
"""Query rows of a tile: its tokens times the heads of a group."""


class PrefillRows(NamedTuple):
    """Chunks of a step and the tiles they are cut into; int32 device tensors."""

    slot: Tensor
    """`[rows]`: the chunk's block table."""
    start: Tensor
    """`[rows]`: position of the chunk's first token."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    """`[rows]`: tokens of the chunk."""
    offset: Tensor
    """`[rows]`: index of its first token in the flat batch."""
    tile_row: Tensor
    """`[tiles]`: the row a tile of queries belongs to."""
    tile_index: Tensor
    """`[tiles]`: which tile of its row it is."""


def plan_tiles(starts: ArrayLike, counts: ArrayLike, group: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """`tile_row` and `tile_index` for layers with `group` query heads a KV head.

    The tiles that see the most keys come first, so that no long one is left for the end.
    """
    starts, counts = np.asarray(starts, np.int32), np.asarray(counts, np.int32)
    tokens = ROWS // group
    tiles = -(-counts // tokens)
    row = np.arange(len(counts)).repeat(tiles)
    index = np.arange(len(row)) - (tiles.cumsum() - tiles).repeat(tiles)
    order = np.argsort(-(starts[row] + index * tokens), kind="stable")
    return row[order].astype(np.int32), index[order].astype(np.int32)


@triton.jit
def _blocks_of(table, at, limit, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The block that holds the tile of tokens from `at` on, or, where blocks are smaller, that of each token."""
    if BLOCK % TILE != 0:
        at += tl.arange(0, TILE)
    return tl.load(table + at // BLOCK, mask=at < limit, other=0)


@triton.jit(do_not_specialize=["window", "chunk"])
def _prefill(
    qkv,
    qkv_stride,
    keys,
    values,
    tables,
    tables_stride,
    slots,
    starts,
    counts,
    offsets,
    tile_rows,
    tile_indices,
    sinks,
    out,
    scale,
    window,
    chunk,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.load(tile_rows + tl.program_id(1))
    index = tl.load(tile_indices + tl.program_id(1))
    start = tl.load(starts + row)
    count = tl.load(counts + row)
    table = tables + tl.load(slots + row).to(tl.int64) * tables_stride

    TOKENS: tl.constexpr = ROWS // GROUP
    inner = tl.arange(0, ROWS)
    token = index * TOKENS + inner // GROUP
    query_head = head * GROUP + inner % GROUP
    flat = (tl.load(offsets + row) + token).to(tl.int64)[:, None]
    dim = tl.arange(0, DIM_PADDED)
    real = ((inner < TOKENS * GROUP) & (token < count))[:, None] & (dim < DIM)[None, :]
    place = query_head[:, None] * DIM + dim[None, :]
    q = tl.load(qkv + flat * qkv_stride + place, mask=real, other=0.0)

    position = start + token
    lowest = start + index * TOKENS
    limit = start + tl.minimum(index * TOKENS + TOKENS, count)
    first = 0  # that any row sees
    full = 0  # from here to `diagonal` every row sees every key
    if BOUNDED:
        first_seen = _first_seen(position, window, chunk)
        first = _first_seen(lowest, window, chunk)
        full = tl.cdiv(_first_seen(limit - 1, window, chunk), TILE) * TILE
    diagonal = tl.maximum(full, (lowest + 1) // TILE * TILE)

    highest = tl.full([ROWS], -1e30, tl.float32)  # finite: a row may see nothing of a tile, and -inf - -inf is NaN
    total = tl.zeros([ROWS], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + query_head, mask=inner < TOKENS * GROUP, other=0.0)
        highest = sink.to(tl.float32) * LOG2E
        total += 1
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    factor = LOG2E if HAS_SOFTCAP else scale * LOG2E
    for part in tl.static_range(0 if BOUNDED else 1, 3):
        if part == 0:
            begin, end = first // TILE * TILE, tl.minimum(full, limit)
        elif part == 1:
            begin, end = full, diagonal
        else:
            begin, end = diagonal, limit
        # The blocks of the next tile are carried from one iteration to the next: a load of K and V that waited for its
        # own block id would not be pipelined.
        next_blocks = _blocks_of(table, begin, limit, BLOCK, TILE)
        for at in tl.range(begin, end, TILE, num_stages=STAGES):
            key_at = at + tl.arange(0, TILE)
            stored = next_blocks.to(tl.int64) * (KV_HEADS * BLOCK * DIM) + head * (BLOCK * DIM) + key_at % BLOCK * DIM
            stored = stored[:, None] + dim[None, :]
            next_blocks = _blocks_of(table, at + TILE, limit, BLOCK, TILE)
            known = dim[None, :] < DIM
            if part != 1:
                # What no row sees may be NaN, and 0 * NaN is NaN.
                known &= ((key_at >= first) & (key_at < limit))[:, None]
            k = tl.load(keys + stored, mask=known, other=0.0)
            scores = tl.dot(q, k.T, input_precision=PRECISION)
            if HAS_SOFTCAP:
                scores = _softcapped(scores * scale, softcap)
            if part != 1:
                seen = key_at[None, :] <= position[:, None]
                if BOUNDED:
                    seen &= key_at[None, :] >= first_seen[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1) * factor)
            weights = tl.exp2(scores * factor - higher[:, None])
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.sum(weights, 1)
            v = tl.load(values + stored, mask=known, other=0.0)
            acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
            highest = higher
    result = acc / total[:, None]
    tl.store(out + flat * (KV_HEADS * GROUP * DIM) + place, result.to(out.dtype.element_ty), mask=real)


def prefill_attention(
    qkv: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    rows: PrefillRows,
    spec: LayerSpec,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """Causal attention of chunks of prompts over the paged cache, which holds the chunks' own K and V already.

    `qkv` is `[tokens, >= heads * dim]`, the roped queries first; `cache` is `[blocks, KV heads, block_size, dim]`,
    `block_tables` `[slots, max_blocks]` int32, `rows` cut up by `plan_tiles`, `sinks` `[heads]`; `out`
    `[tokens, heads * dim]` is written at the chunks' tokens alone.
    """
    dim = triton.next_power_of_2(spec.key_dim)
    exact = qkv.dtype == torch.float32  # no tensor cores: for tests
    _prefill[(spec.num_kv_heads, rows.tile_row.shape[0])](
        qkv,
        qkv.stride(0),
        cache.key,
        cache.value,
        block_tables,
        block_tables.stride(0),
        *rows,
        sinks,
        out,
        spec.scale,
        spec.window or 0,
        spec.chunk or 0,
        spec.softcap or 0.0,
        KV_HEADS=spec.num_kv_heads,
        GROUP=spec.num_heads // spec.num_kv_heads,
        ROWS=ROWS,
        DIM=spec.key_dim,
        DIM_PADDED=dim,
        BLOCK=cache.key.shape[2],
        TILE=16 if exact else 64 if dim <= 128 else 32,
        HAS_SOFTCAP=spec.softcap is not None,
        HAS_SINKS=sinks is not None,
        BOUNDED=spec.window is not None or spec.chunk is not None,
        PRECISION="ieee" if exact else "tf32",
        STAGES=1 if exact else 3,
        num_warps=8,
    )


def prefill_attention_reference(
    qkv: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    rows: PrefillRows,
    spec: LayerSpec,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """The same in plain PyTorch, row by row."""
    for slot, start, count, offset in zip(*(x.tolist() for x in rows[:4]), strict=True):
        positions = torch.arange(start + count, device=qkv.device)
        mask = _visible(spec, positions[start:, None], positions)
        blocks = block_tables[slot, : -(-(start + count) // cache.key.shape[2])].long()
        # Blocks that a window has passed may hold NaN.
        key, value = (x[blocks].transpose(1, 2).flatten(0, 1)[: start + count] for x in cache)
        key, value = (torch.where(mask.any(0)[:, None, None], x, 0).transpose(0, 1)[None] for x in (key, value))
        query = qkv[offset : offset + count, : spec.num_heads * spec.key_dim].view(count, spec.num_heads, spec.key_dim)
        sink = None if sinks is None else sinks.view(1, -1, 1, 1)
        result = _attend(spec, query.transpose(0, 1)[None], key, value, mask, sink)
        out[offset : offset + count] = result[0].transpose(0, 1).flatten(1)

"""Decode attention over a prefix that many sequences share: read once for all of them.

The queries of all sequences become the rows of one matrix (cascade attention: Ye et al., FlashInfer, 2024; Juravsky et
al., Hydragen, 2024). `decode_attention` runs beside this kernel, and adds what is found here to what a sequence has for
itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.attention import LayerCache, LayerSpec
from paged_kernels.gpu.decode_attention import MAX_TILE, SharedPart, _softcapped
from paged_kernels.gpu.dependent_launch import supports_dependent_launch

ROWS = 128
"""Query rows of an item: its sequences times the heads of a group."""
_ITEM = 8  # int32 of an item: slot, first member, members, begin, end, padding
_MIN_ROWS, _MIN_TOKENS = 4, 256  # below, reading a prefix again, from the L2 cache, costs less than this kernel


class SharedPrefixes(NamedTuple):
    """Prefixes that rows of a step share; int32 device tensors."""

    rows: Tensor
    """`[rows, 4]`: tokens of the row's shared prefix, its first item, its number of items, its place in each."""
    items: Tensor
    """`[items, 8]`: parts of prefixes for up to `ROWS // group` sequences; unused ones have no members."""
    members: Tensor
    """`[rows]`: rows, by prefix."""


def num_shared_items(num_kv_heads: int, device: torch.device) -> int:
    """Items of `SharedPrefixes`: one program of each head for all multiprocessors."""
    count = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(2, count // num_kv_heads)


def find_prefixes(
    tables: npt.NDArray[np.int32], tokens: npt.NDArray[np.int64], block_size: int
) -> list[tuple[npt.NDArray[np.int64], int]]:
    """Which rows begin with the same blocks, and for how many tokens; only where it is worth it.

    `tables` is `[rows, blocks]`, `tokens` `[rows]`: of each row before its last, which it has for itself.
    """
    found = []
    first, inverse, counts = np.unique(tables[:, 0], return_inverse=True, return_counts=True)
    for index in np.flatnonzero((counts >= _MIN_ROWS) & (first > 0)):
        rows = np.flatnonzero(inverse == index)
        rows = rows[tokens[rows] >= _MIN_TOKENS]
        if len(rows) < _MIN_ROWS:
            continue
        width = int(tokens[rows].max()) // block_size
        same = tables[rows, :width] == tables[rows[0], :width]
        depth = np.minimum(np.where(same.all(1), width, same.argmin(1)), tokens[rows] // block_size)
        # The depth that saves the most reading: how many share it, times how deep it is.
        order = np.argsort(-depth, kind="stable")
        best = int(np.argmax(depth[order] * np.arange(len(order))))
        shared = int(depth[order[best]]) * block_size // MAX_TILE * MAX_TILE
        if best + 1 >= _MIN_ROWS and shared >= _MIN_TOKENS:
            found.append((np.sort(rows[order[: best + 1]]), shared))
    return found


def plan_prefixes(
    prefixes: list[tuple[npt.NDArray[np.int64], int]],
    slots: npt.NDArray[np.int64],
    num_rows: int,
    group: int,
    num_items: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """`SharedPrefixes` of `find_prefixes`, on the host; prefixes for which there are no items are left out."""
    rows = np.zeros((num_rows, 4), dtype=np.int32)
    items = np.zeros((num_items, _ITEM), dtype=np.int32)
    members = np.zeros(num_rows, dtype=np.int32)
    width, at, item = ROWS // group, 0, 0
    work = sum(-(-len(sharing) // width) * tokens for sharing, tokens in prefixes)
    for left, (sharing, tokens) in zip(range(len(prefixes), 0, -1), prefixes, strict=True):
        tiles = -(-len(sharing) // width)
        room = num_items - item - (left - 1)  # every one after it gets one item at least
        parts = min(room // tiles, tokens // MAX_TILE, max(1, round(tokens * num_items / work)))
        if parts < 1:
            continue
        each = -(-tokens // MAX_TILE // parts) * MAX_TILE
        parts = -(-tokens // each)
        members[at : at + len(sharing)] = sharing
        for tile in range(tiles):
            mine = sharing[tile * width : (tile + 1) * width]
            rows[mine] = np.stack(np.broadcast_arrays(tokens, item, parts, np.arange(len(mine))), 1)
            for part in range(parts):
                begin, end = part * each, min((part + 1) * each, tokens)
                items[item, :5] = slots[sharing[0]], at + tile * width, len(mine), begin, end
                item += 1
        at += len(sharing)
    return rows, items, members


@triton.jit
def _shared(
    query,
    query_stride,
    keys,
    values,
    tables,
    tables_stride,
    items,
    members,
    partials,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    item = tl.program_id(0)
    head = tl.program_id(1)
    work = items + item * 8
    count = tl.load(work + 2)
    table = tables + tl.load(work).to(tl.int64) * tables_stride
    member = tl.load(work + 1) + tl.arange(0, ROWS) // GROUP
    begin = tl.load(work + 3)
    end = tl.load(work + 4)
    inner = tl.arange(0, ROWS)
    used = inner // GROUP < count
    row = tl.load(members + member, mask=used, other=0).to(tl.int64)
    if PDL:
        gdc_wait()
        # Only now: `decode_attention` starts beside this kernel and reads what the ones before it wrote.
        gdc_launch_dependents()
    if count == 0:
        return

    dim = tl.arange(0, DIM_PADDED)
    known = dim < DIM
    offset = row * query_stride + (head * GROUP + inner % GROUP) * DIM
    q = tl.load(query + offset[:, None] + dim[None, :], mask=used[:, None] & known[None, :], other=0.0)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    token = tl.arange(0, TILE)
    # Block ids are carried to the next iteration, as in `decode_attention`. All rows see all tokens: no masks.
    next_block = tl.load(table + (begin + token) // BLOCK)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        block = next_block.to(tl.int64)
        next_block = tl.load(table + (start + TILE + token) // BLOCK, mask=start + TILE + token < end, other=0)
        place = block * (KV_HEADS * BLOCK * DIM) + head * (BLOCK * DIM) + ((start + token) % BLOCK) * DIM
        k = tl.load(keys + place[:, None] + dim[None, :], mask=known[None, :], other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = _softcapped(scores, softcap)
        scores *= 1.4426950408889634
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + place[:, None] + dim[None, :], mask=known[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        highest = higher
    base = partials + (item * KV_HEADS + head).to(tl.int64) * (ROWS * (DIM_PADDED + 2))
    tl.store(base + inner[:, None] * DIM_PADDED + dim[None, :], acc)
    tl.store(base + ROWS * DIM_PADDED + inner, total)
    tl.store(base + ROWS * (DIM_PADDED + 1) + inner, highest)


def attend_to_prefixes(
    query: Tensor, cache: LayerCache, block_tables: Tensor, shared: SharedPrefixes, spec: LayerSpec
) -> SharedPart:
    """What rows find in their shared prefixes, for `decode_attention` to add.

    Arguments are those of `decode_attention`; layers with a window or chunks have no shared prefixes. The partials of
    an item are weighted sums of values, then sums of weights, then highest scores.
    """
    dim, items = triton.next_power_of_2(spec.key_dim), shared.items.shape[0]
    exact, pdl = query.dtype == torch.float32, supports_dependent_launch(query.device)
    partials = torch.empty(items, spec.num_kv_heads, ROWS * (dim + 2), dtype=torch.float32, device=query.device)
    _shared[(items, spec.num_kv_heads)](
        query,
        query.stride(0),
        cache.key,
        cache.value,
        block_tables,
        block_tables.stride(0),
        shared.items,
        shared.members,
        partials,
        spec.scale,
        spec.softcap or 0.0,
        KV_HEADS=spec.num_kv_heads,
        GROUP=spec.group,
        ROWS=ROWS,
        DIM=spec.key_dim,
        DIM_PADDED=dim,
        BLOCK=cache.key.shape[2],
        TILE=64 if dim <= 128 and not exact else 32,
        HAS_SOFTCAP=spec.softcap is not None,
        PRECISION="ieee" if exact else "tf32",
        STAGES=1 if exact else 3,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return SharedPart(shared.rows, partials)

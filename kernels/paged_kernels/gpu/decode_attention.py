"""Attention of single tokens over the paged cache: split-KV, one kernel a layer.

A decode step reads every cached token once, so what counts is that all multiprocessors read evenly and at once
(Flash-Decoding, Dao et al., 2023). `plan_work` cuts the sequences of a step into items of about equal length, on the
device, once for all layers. Each program reads one item for one KV head and all query heads of its group; of a
sequence that was cut, the program that finishes last merges the parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.attention import LayerCache, LayerSpec, _attend, _visible
from paged_kernels.gpu.dependent_launch import supports_dependent_launch

MAX_TILE = 128
"""Items begin at multiples of this, or of less; see `tile_of`."""
_ITEM = 8  # int32 of an item: row, begin, end, length, first item of its row, parts of its row, slot, padding
_MIN_TOKENS = 256  # of an item: the parts of a shorter one would wait longer for one another than they save


class DecodeRows(NamedTuple):
    """Single-token rows of a step and how their work is cut up; device tensors."""

    slots: Tensor
    """`[rows]` int32: the row's block table; -1 is padding, whose output is undefined."""
    positions: Tensor
    """`[rows]` int32: of the token; it sees this and all before."""
    counters: Tensor
    """`[rows * KV heads]` int32 zeros, and zeros again after each kernel."""


class Work(NamedTuple):
    """The items of one step, for the layers of one window."""

    items: Tensor
    """`[items, 8]` int32; unused ones name row -1."""


class SharedPart(NamedTuple):
    """What rows found in prefixes that they share with others, by `attend_to_prefixes`."""

    rows: Tensor
    """`SharedPrefixes.rows`."""
    partials: Tensor
    """`[items, KV heads, query rows * (dim + 2)]` float32."""


def num_items(rows: int, num_kv_heads: int, device: torch.device) -> int:
    """Items that always suffice for `rows`, when the work is cut for `_programs` programs in all."""
    return rows + max(1, _programs(device) // num_kv_heads)


def tile_of(spec: LayerSpec) -> int:
    """Tokens that a program reads at once: as many as leave room for three such tiles of K and V, twice."""
    return MAX_TILE if spec.key_dim <= 64 else 64


def _programs(device: torch.device) -> int:
    """Programs to cut the work for: two for each multiprocessor read as fast as more, and leave less to merge."""
    if device.type != "cuda":
        return 24
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _first_seen(position, window, chunk):
    """The first token that a query at `position` sees."""
    first = position * 0
    if window > 0:
        first = tl.maximum(position + 1 - window, 0)
    if chunk > 0:
        first = tl.maximum(first, position // chunk * chunk)
    return first


@triton.jit(do_not_specialize=["rows", "num_items", "window", "chunk", "target"])
def _plan(
    slots,
    positions,
    shared,
    items,
    rows,
    num_items,
    window,
    chunk,
    target,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,
):
    """Program i writes the items of row i; every program adds up the lengths of all rows for itself."""
    row = tl.program_id(0)
    at = tl.arange(0, ROWS)
    position = tl.load(positions + at, mask=at < rows, other=0)
    slot = tl.load(slots + at, mask=at < rows, other=-1)
    used = slot >= 0
    first = _first_seen(position, window, chunk) // TILE
    if shared is not None:
        first = tl.load(shared + at * 4, mask=at < rows, other=0) // TILE
    tiles = tl.where(used, position // TILE + 1 - first, 0)
    most = tl.maximum(MIN_TILES, tl.cdiv(tl.sum(tiles), target))  # tiles of an item
    parts = tl.cdiv(tiles, most)
    mine = at == row
    my_item = tl.sum(tl.where(at < row, parts, 0))
    my_parts = tl.sum(tl.where(mine, parts, 0))
    my_tiles = tl.sum(tl.where(mine, tiles, 0))
    my_first = tl.sum(tl.where(mine, first, 0)) * TILE
    length = tl.sum(tl.where(mine, position, 0)) + 1
    my_slot = tl.sum(tl.where(mine, slot, 0))
    each = tl.cdiv(my_tiles, tl.maximum(my_parts, 1)) * TILE
    for start in range(0, my_parts, 32):
        part = start + tl.arange(0, 32)
        inside = part < my_parts
        item = items + (my_item + part) * 8
        begin = my_first + part * each
        tl.store(item, part * 0 + row, mask=inside)
        tl.store(item + 1, begin, mask=inside)
        tl.store(item + 2, tl.minimum(begin + each, length), mask=inside)
        tl.store(item + 3, part * 0 + length, mask=inside)
        tl.store(item + 4, part * 0 + my_item, mask=inside)
        tl.store(item + 5, part * 0 + my_parts, mask=inside)
        tl.store(item + 6, part * 0 + my_slot, mask=inside)
    if row == rows - 1:
        for start in range(my_item + my_parts, num_items, 32):
            rest = start + tl.arange(0, 32)
            tl.store(items + rest * 8, rest * 0 - 1, mask=rest < num_items)


def plan_work(rows: DecodeRows, spec: LayerSpec, shared: Tensor | None = None) -> Work:
    """Cut the cached tokens that `rows` see in layers like `spec` into items.

    `shared` is `SharedPrefixes.rows`: what rows have in common is left out.
    """
    count, device = rows.slots.shape[0], rows.slots.device
    total = num_items(count, spec.num_kv_heads, device)
    items = torch.empty(total, _ITEM, dtype=torch.int32, device=device)
    _plan[(count,)](
        rows.slots,
        rows.positions,
        shared,
        items,
        count,
        total,
        spec.window or 0,
        spec.chunk or 0,
        total - count,
        ROWS=max(64, triton.next_power_of_2(count)),
        TILE=tile_of(spec),
        MIN_TILES=_MIN_TOKENS // tile_of(spec),
        num_warps=4,
    )
    return Work(items)


@triton.jit
def _softcapped(scores, softcap):
    """`softcap * tanh(scores / softcap)`."""
    return softcap * (1 - 2 / (1 + tl.exp2(scores * (2 * 1.4426950408889634 / softcap))))


@triton.jit
def _merge(
    first, stride, parts, rows, dim, ROWS: tl.constexpr, STORED: tl.constexpr, DIM: tl.constexpr, MERGED: tl.constexpr
):
    """The sums of `rows` in all parts, MERGED at a time, in their order whoever came last: the same bits every time.

    A part is weighted sums of values of STORED rows, then their sums of weights, then their highest scores.
    """
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    for start in range(0, parts, MERGED):
        part = start + tl.arange(0, MERGED)
        inside = (part < parts)[:, None]
        its = (first + part.to(tl.int64) * stride)[:, None] + rows[None, :] * DIM
        of_rows = (first + part.to(tl.int64) * stride)[:, None] + STORED * DIM + rows[None, :]
        # Past the L1 cache, which does not see what other multiprocessors wrote.
        its_acc = tl.load(
            its[:, :, None] + dim[None, None, :], mask=inside[:, :, None], other=0.0, cache_modifier=".cg"
        )
        its_total = tl.load(of_rows, mask=inside, other=0.0, cache_modifier=".cg")
        its_highest = tl.load(of_rows + STORED, mask=inside, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(its_highest, 0))
        fade, its_fade = tl.exp2(highest - higher), tl.exp2(its_highest - higher[None, :])
        acc = acc * fade[:, None] + tl.sum(its_acc * its_fade[:, :, None], 0)
        total = total * fade + tl.sum(its_total * its_fade, 0)
        highest = higher
    return acc, total, highest


@triton.jit
def _write(out, sinks, head, acc, total, highest, group, dim, GROUP: tl.constexpr, DIM: tl.constexpr):
    if sinks is not None:
        sink = tl.load(sinks + head * GROUP + group, mask=group < GROUP, other=0.0).to(tl.float32)
        total += tl.exp2(sink * 1.4426950408889634 - highest)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    real = (group < GROUP)[:, None] & (dim < DIM)[None, :]
    tl.store(out + group[:, None] * DIM + dim[None, :], result, mask=real)


@triton.jit(do_not_specialize=["window", "chunk"])
def _decode(
    query,
    query_stride,
    keys,
    values,
    tables,
    tables_stride,
    items,
    counters,
    partials,
    shared,
    shared_partials,
    sinks,
    out,
    scale,
    window,
    chunk,
    softcap,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    MERGED: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BOUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    item = tl.program_id(0)
    head = tl.program_id(1)
    work = items + item * 8
    # All at once, to wait for memory only once; of an unused item, what is behind the row is anything.
    row = tl.load(work)
    begin = tl.load(work + 1)
    end = tl.load(work + 2)
    length = tl.load(work + 3)
    first_item = tl.load(work + 4)
    parts = tl.load(work + 5)
    slot = tl.load(work + 6)
    used = row >= 0
    table = tables + slot.to(tl.int64) * tables_stride
    token = tl.arange(0, TILE)
    # The block ids of the next tile are carried from one iteration to the next: a load of K and V that waited for
    # its own block id would not be pipelined.
    if BLOCK % TILE == 0:
        next_block = tl.load(table + begin // BLOCK, mask=used, other=0)
    else:
        next_block = tl.load(table + (begin + token) // BLOCK, mask=used & (begin + token < end), other=0)
    if PDL and shared is None:
        gdc_wait()  # also in programs without work: the kernel may not complete before those that it waits for
    if row < 0:
        return

    group = tl.arange(0, ROWS)
    dim = tl.arange(0, DIM_PADDED)
    real_dim = dim < DIM
    offset = (head * GROUP + group[:, None]) * DIM + dim[None, :]
    real = (group < GROUP)[:, None] & real_dim[None, :]
    q = tl.load(query + row.to(tl.int64) * query_stride + offset, mask=real, other=0.0)
    first_seen = _first_seen(length - 1, window, chunk)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        at = start + token
        block = next_block.to(tl.int64)
        if BLOCK % TILE == 0:
            next_block = tl.load(table + (start + TILE) // BLOCK, mask=start + TILE < end, other=0)
        else:
            next_block = tl.load(table + (at + TILE) // BLOCK, mask=at + TILE < end, other=0)
        place = block * (KV_HEADS * BLOCK * DIM) + head * (BLOCK * DIM) + (at % BLOCK) * DIM
        seen = at < end
        if BOUNDED:
            seen &= at >= first_seen
        k = tl.load(keys + place[None, :] + dim[:, None], mask=seen[None, :] & real_dim[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            scores = _softcapped(scores, softcap)
        scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        # Masked, since 0 * NaN is NaN and what lies behind the end of a block is anything.
        v = tl.load(values + place[:, None] + dim[None, :], mask=seen[:, None] & real_dim[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        highest = higher
    if shared is not None and item == first_item:
        if PDL:
            # The kernel for shared prefixes runs beside this one, which it let start when those before had completed.
            gdc_wait()
        found = shared + row * 4
        shared_rows = tl.minimum(tl.load(found + 3) * GROUP + group, SHARED_ROWS - 1)
        size = SHARED_ROWS * (DIM_PADDED + 2)
        at_head = shared_partials + (tl.load(found + 1) * KV_HEADS + head).to(tl.int64) * size
        at_once: tl.constexpr = 2 if DIM_PADDED <= 64 else 1  # more take registers, and so programs from the rest
        its_acc, its_total, its_highest = _merge(
            at_head, KV_HEADS * size, tl.load(found + 2), shared_rows, dim, ROWS, SHARED_ROWS, DIM_PADDED, at_once
        )
        higher = tl.maximum(highest, its_highest)
        fade, its_fade = tl.exp2(highest - higher), tl.exp2(its_highest - higher)
        acc = acc * fade[:, None] + its_acc * its_fade[:, None]
        total = total * fade + its_total * its_fade
        highest = higher

    out += row.to(tl.int64) * (KV_HEADS * GROUP * DIM) + head * (GROUP * DIM)
    if parts == 1:
        _write(out, sinks, head, acc, total, highest, group, dim, GROUP, DIM)
        return
    SIZE: tl.constexpr = PACKED * (DIM_PADDED + 2)
    packed = group < PACKED
    mine = partials + (item * KV_HEADS + head).to(tl.int64) * SIZE
    tl.store(mine + group[:, None] * DIM_PADDED + dim[None, :], acc, mask=packed[:, None])
    tl.store(mine + PACKED * DIM_PADDED + group, total, mask=packed)
    tl.store(mine + PACKED * (DIM_PADDED + 1) + group, highest, mask=packed)
    tl.debug_barrier()
    counter = counters + row * KV_HEADS + head
    if tl.atomic_add(counter, 1, sem="acq_rel") < parts - 1:
        return
    tl.store(counter, 0)
    first = partials + (first_item * KV_HEADS + head).to(tl.int64) * SIZE
    acc, total, highest = _merge(
        first, KV_HEADS * SIZE, parts, tl.arange(0, PACKED), dim, PACKED, PACKED, DIM_PADDED, MERGED
    )
    _write(out, sinks, head, acc, total, highest, tl.arange(0, PACKED), dim, GROUP, DIM)


def _tiles(spec: LayerSpec, dtype: torch.dtype, shared: bool) -> tuple[int, int]:
    """Tokens of a tile, and stages: fewer where the kernel for shared prefixes runs on the same multiprocessors."""
    if dtype == torch.float32 and spec.key_dim > 128:
        return tile_of(spec), 1
    return (64, 2) if shared else (tile_of(spec), 3)


def decode_attention(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    rows: DecodeRows,
    work: Work,
    spec: LayerSpec,
    sinks: Tensor | None,
    out: Tensor,
    shared: SharedPart | None = None,
) -> None:
    """Attention of one token a row over the paged cache, which holds the token's own K and V already.

    `query` is `[rows, >= heads * dim]` (its row stride may be that of a packed projection), `cache` is
    `[blocks, KV heads, block_size, dim]`, `block_tables` `[slots, max_blocks]` int32, `work` from `plan_work` for the
    same rows and window, `sinks` `[heads]`; `out` `[rows, heads * dim]` is written. `shared` is what was found in
    prefixes that `plan_work` left out.

    `work` and the block tables must not come from the kernel right before (see `dependent_launch`).
    """
    group = spec.num_heads // spec.num_kv_heads
    packed, dim = triton.next_power_of_2(group), triton.next_power_of_2(spec.key_dim)
    items = work.items.shape[0]
    partials = torch.empty(items * spec.num_kv_heads * packed * (dim + 2), dtype=torch.float32, device=query.device)
    pdl = supports_dependent_launch(query.device)
    tile, stages = _tiles(spec, query.dtype, shared is not None)
    _decode[(items, spec.num_kv_heads)](
        query,
        query.stride(0),
        cache.key,
        cache.value,
        block_tables,
        block_tables.stride(0),
        work.items,
        rows.counters,
        partials,
        None if shared is None else shared.rows,
        None if shared is None else shared.partials,
        sinks,
        out,
        spec.scale,
        spec.window or 0,
        spec.chunk or 0,
        spec.softcap or 0.0,
        KV_HEADS=spec.num_kv_heads,
        GROUP=group,
        ROWS=max(16, packed),
        SHARED_ROWS=0 if shared is None else shared.partials.shape[2] // (dim + 2),
        PACKED=packed,
        MERGED=max(1, min(32, 4096 // (packed * dim))),
        DIM=spec.key_dim,
        DIM_PADDED=dim,
        BLOCK=cache.key.shape[2],
        TILE=tile,
        HAS_SOFTCAP=spec.softcap is not None,
        BOUNDED=spec.window is not None or spec.chunk is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        STAGES=stages,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
        # Threads that have the same sums must have the same bits: one of them passes its own on. Whose products are
        # rounded before they are added depends on the thread, if multiplication and addition are fused.
        enable_fp_fusion=shared is None,
    )


def decode_attention_reference(
    query: Tensor,
    cache: LayerCache,
    block_tables: Tensor,
    rows: DecodeRows,
    work: Work,
    spec: LayerSpec,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """The same in plain PyTorch, row by row."""
    for row, (slot, position) in enumerate(zip(rows.slots.tolist(), rows.positions.tolist(), strict=True)):
        if slot < 0:
            continue
        width = position // cache.key.shape[2] + 1
        blocks = block_tables[slot, :width].long()
        positions = torch.arange(position + 1, device=query.device)
        mask = _visible(spec, positions[-1:], positions)
        # Blocks that a window has passed may hold NaN.
        key, value = (x[blocks].transpose(1, 2).flatten(0, 1)[: position + 1] for x in cache)
        key, value = (torch.where(mask[:, None, None], x, 0).transpose(0, 1)[None] for x in (key, value))
        q = query[row, : spec.num_heads * spec.key_dim].view(1, spec.num_heads, 1, spec.key_dim)
        seen = mask.view(1, 1, 1, -1)
        out[row] = _attend(spec, q, key, value, seen, None if sinks is None else sinks.view(1, -1, 1, 1)).flatten()

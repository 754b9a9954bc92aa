"""Rotary position embedding (Su et al., 2021), with the norm of the heads before it and the cache write after."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from paged_kernels.attention import LayerCache
from paged_kernels.gpu.dependent_launch import supports_dependent_launch
from paged_kernels.rope import Rope


@triton.jit
def _load_pairs(row, mask, ROTATED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The firsts and the seconds of all pairs, `[rows, HALF]` float32 each; `row` and `mask` are `[rows, 1]`."""
    if INTERLEAVED:
        dim = tl.arange(0, 2 * HALF)[None, :]
        pairs = tl.load(row + dim, mask=mask & (dim < ROTATED), other=0.0)
        first, second = tl.split(tl.reshape(pairs, [row.shape[0], HALF, 2]))
    else:
        dim = tl.arange(0, HALF)[None, :]
        real = mask & (dim < ROTATED // 2)
        first = tl.load(row + dim, mask=real, other=0.0)
        second = tl.load(row + ROTATED // 2 + dim, mask=real, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(row, mask, first, second, ROTATED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    first, second = first.to(row.dtype.element_ty), second.to(row.dtype.element_ty)
    if INTERLEAVED:
        dim = tl.arange(0, 2 * HALF)[None, :]
        pairs = tl.reshape(tl.join(first, second), [row.shape[0], 2 * HALF])
        tl.store(row + dim, pairs, mask=mask & (dim < ROTATED))
    else:
        dim = tl.arange(0, HALF)[None, :]
        real = mask & (dim < ROTATED // 2)
        tl.store(row + dim, first, mask=real)
        tl.store(row + ROTATED // 2 + dim, second, mask=real)


@triton.jit
def _rope_and_write(
    qkv,
    positions,
    slot_mapping,
    cos_sin,
    q_norm,
    k_norm,
    eps,
    keys,
    values,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has ROWS of the query and key heads of one token; whoever has a key copies its value too."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    used = head < HEADS + KV_HEADS
    is_key = used & (head >= HEADS)
    row = qkv + token * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM
    dim = tl.arange(0, DIM_PADDED)[None, :]

    # All loads come first, to wait for memory only once: loads and stores are executed in this order.
    slot = tl.load(slot_mapping + token)
    if ROTATED > 0:
        position = tl.load(positions + token).to(tl.int64)
        # A row of pointers for every head: one row for all would be loaded in a layout of its own, and be exchanged
        # through shared memory.
        half = tl.broadcast_to(tl.arange(0, HALF)[None, :], [ROWS, HALF])
        angle = cos_sin + position * ROTATED + half
        cos = tl.load(angle, mask=half < ROTATED // 2, other=0.0)
        sin = tl.load(angle + ROTATED // 2, mask=half < ROTATED // 2, other=0.0)
    if ROTATED < DIM:
        rest_dim = ROTATED + tl.arange(0, REST)[None, :]
        # Unless it is normalised, the rest of a query stays as it is.
        rest_mask = (used if q_norm is not None else is_key) & (rest_dim < DIM)
    if q_norm is not None:
        norm = tl.where(is_key, k_norm, q_norm)
        if ROTATED > 0:
            first_norm, second_norm = _load_pairs(norm, used, ROTATED, HALF, INTERLEAVED)
        if ROTATED < DIM:
            rest_norm = tl.load(norm + rest_dim, mask=rest_mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    if ROTATED > 0:
        first, second = _load_pairs(row, used, ROTATED, HALF, INTERLEAVED)
    if ROTATED < DIM:
        rest = tl.load(row + rest_dim, mask=rest_mask, other=0.0).to(tl.float32)
    value = tl.load(row + KV_HEADS * DIM + dim, mask=is_key & (dim < DIM))

    if q_norm is not None:
        # Warps that share a head, or that hold copies of a tile smaller than they are, must all have read it.
        tl.debug_barrier()
        squares = tl.zeros([ROWS, 1], tl.float32)
        if ROTATED > 0:
            squares += tl.sum(first * first + second * second, 1, keep_dims=True)
        if ROTATED < DIM:
            squares += tl.sum(rest * rest, 1, keep_dims=True)
        scale = tl.rsqrt(squares / DIM + eps)
        if ROTATED > 0:
            first, second = first * scale * first_norm, second * scale * second_norm
        if ROTATED < DIM:
            rest *= scale * rest_norm
            tl.store(row + rest_dim, rest.to(row.dtype.element_ty), mask=rest_mask)
    place = ((slot // BLOCK * KV_HEADS + head - HEADS) * BLOCK + slot % BLOCK) * DIM
    if ROTATED > 0:
        first, second = first * cos - second * sin, second * cos + first * sin
        _store_pairs(row, used, first, second, ROTATED, HALF, INTERLEAVED)
        _store_pairs(keys + place, is_key, first, second, ROTATED, HALF, INTERLEAVED)
    if ROTATED < DIM:
        tl.store(keys + place + rest_dim, rest.to(row.dtype.element_ty), mask=is_key & (rest_dim < DIM))
    tl.store(values + place + dim, value, mask=is_key & (dim < DIM))


def rope_and_write(
    qkv: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    rope: Rope | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cache: LayerCache,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """Normalise and rotate queries and keys in place, and write keys and values to the cache.

    `qkv` is `[tokens, (num_heads + 2 * num_kv_heads) * dim]`, contiguous: the query heads of a token, its key heads,
    its value heads. `positions` is `[tokens]` int32 and `slot_mapping` `[tokens]` int64, `block * block_size + offset`;
    padding tokens may share slots of block 0. `q_norm` and `k_norm` are the weights `[dim]` of an RMS norm of each
    head, of one dtype, or both None; one alone is a ValueError. `cache` is `[blocks, num_kv_heads, block_size, dim]`,
    contiguous, in the dtype of `qkv`. Without `rope`, nothing is rotated. All arithmetic is float32.

    Positions and slots must not come from the kernel right before (see `dependent_launch`).
    """
    if (q_norm is None) != (k_norm is None):
        raise ValueError("queries and keys are normalised both or neither")
    _, _, block_size, dim = cache.key.shape
    tokens = qkv.shape[0]
    rotated = 0 if rope is None else rope.cos_sin.shape[1]
    padded = triton.next_power_of_2(dim)
    # Small programs spread few tokens over all multiprocessors; 16 values a thread are two accesses of 16 bytes.
    warps = 1 if tokens <= 128 else 2
    rows = max(1, 512 * warps // padded)
    pdl = supports_dependent_launch(qkv.device)
    _rope_and_write[(tokens, triton.cdiv(num_heads + num_kv_heads, rows))](
        qkv,
        positions,
        slot_mapping,
        None if rope is None else rope.cos_sin,
        q_norm,
        k_norm,
        eps,
        cache.key,
        cache.value,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        BLOCK=block_size,
        DIM=dim,
        DIM_PADDED=padded,
        ROTATED=rotated,
        HALF=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(dim - rotated),
        INTERLEAVED=rope is not None and rope.interleaved,
        ROWS=rows,
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )

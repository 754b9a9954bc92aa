"""What opens a step on the device: changes of the batch state, and where each token comes from and goes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"])
def _apply(state, changes, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    index = tl.load(changes + 2 * at, mask=inside)
    value = tl.load(changes + 2 * at + 1, mask=inside)
    tl.store(state + index, value, mask=inside)


def apply_changes(state: Tensor, changes: Tensor) -> None:
    """`state[index] = value` for the int32 pairs (index, value) in `changes` `[n, 2]`; no index comes twice."""
    count = changes.shape[0]
    _apply[(triton.cdiv(count, 256),)](state, changes, count, BLOCK=256, num_warps=4)


def apply_changes_reference(state: Tensor, changes: Tensor) -> None:
    """The same in plain PyTorch."""
    state[changes[:, 0].long()] = changes[:, 1]


@triton.jit(do_not_specialize=["count"])
def locate(
    ids,
    slots,
    positions,
    last_token,
    tables,
    group_stride,
    slot_stride,
    input_ids,
    slot_mapping,
    count,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `locate_tokens`. Public because what it writes is used as indices: see `compile_ahead`."""
    group = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slot = tl.load(slots + at, mask=inside, other=-1)
    position = tl.load(positions + at, mask=inside, other=0)
    used = slot >= 0
    table = tables + group * group_stride + slot.to(tl.int64) * slot_stride
    block = tl.load(table + position // BLOCK_SIZE, mask=used, other=0).to(tl.int64)
    place = block * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(slot_mapping + group * count + at, tl.where(used, place, 0), mask=inside)
    if group == 0:
        known = tl.load(ids + at, mask=inside, other=0)
        sampled = tl.load(last_token + slot, mask=used & (known < 0), other=0)
        tl.store(input_ids + at, tl.where(known < 0, sampled, known), mask=inside)


def locate_tokens(
    ids: Tensor, slots: Tensor, positions: Tensor, last_token: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Input ids `[tokens]` int32 and slot mapping `[groups, tokens]` int64 (`block * block_size + offset`) of a step.

    `ids`, `slots` and `positions` are `[tokens]` int32: an id below 0 stands for `last_token[slot]`, a slot below 0 for
    padding, which is token 0 and goes to block 0. `tables` is `[groups, slots, max_blocks]` int32.
    """
    count, groups = ids.shape[0], tables.shape[0]
    input_ids = torch.empty_like(ids)
    slot_mapping = torch.empty(groups, count, dtype=torch.int64, device=ids.device)
    locate[(triton.cdiv(count, 128), groups)](
        ids,
        slots,
        positions,
        last_token,
        tables,
        tables.stride(0),
        tables.stride(1),
        input_ids,
        slot_mapping,
        count,
        BLOCK_SIZE=block_size,
        BLOCK=128,
        num_warps=4,
    )
    return input_ids, slot_mapping


def locate_tokens_reference(
    ids: Tensor, slots: Tensor, positions: Tensor, last_token: Tensor, tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    slot, used = slots.clamp(min=0).long(), slots >= 0
    input_ids = torch.where(ids < 0, torch.where(used, last_token[slot], 0), ids)
    blocks = tables[:, slot, (positions // block_size).long() * used].long()
    return input_ids, torch.where(used, blocks * block_size + positions % block_size, 0)

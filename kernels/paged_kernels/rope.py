"""Rotary position embedding (Su et al., 2021): what it is for a layer, and the plain PyTorch reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paged_kernels.attention import LayerCache


class Rope(NamedTuple):
    """How a layer rotates its queries and keys."""

    cos_sin: Tensor
    """`[max_positions, rotated]` float32, the cosines and then the sines; further dimensions of a head pass through."""
    interleaved: bool
    """Dimensions 2i and 2i + 1 are a pair (GPT-J); otherwise i and i + rotated / 2 (GPT-NeoX, Llama)."""


def rope_and_write_reference(
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
    its value heads. `positions` and `slot_mapping` are `[tokens]`; `q_norm` and `k_norm` the weights `[dim]` of an RMS
    norm of each head. `cache` is `[blocks, num_kv_heads, block_size, dim]`. All arithmetic is float32.
    """
    _, _, block_size, dim = cache.key.shape
    query, key, value = torch.split(qkv.view(qkv.shape[0], -1, dim), [num_heads, num_kv_heads, num_kv_heads], 1)
    for heads, norm in ((query, q_norm), (key, k_norm)):
        x = heads.float()
        if norm is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
        if rope is not None:
            rotated = rope.cos_sin.shape[1]
            cos, sin = rope.cos_sin[positions.long(), None].chunk(2, -1)
            pairs = x[..., :rotated].reshape(*x.shape[:2], *((-1, 2) if rope.interleaved else (2, -1)))
            axis = -1 if rope.interleaved else -2
            first, second = pairs.unbind(axis)
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), axis).flatten(-2)
            x = torch.cat((turned, x[..., rotated:]), -1)
        heads.copy_(x)
    for stored, heads in zip(cache, (key, value), strict=True):
        stored[slot_mapping // block_size, :, slot_mapping % block_size] = heads

"""Rotary embedding, head norms and the cache write against plain PyTorch, and that against transformers."""

from __future__ import annotations

import pytest
import torch
from paged_kernels.attention import LayerCache
from paged_kernels.gpu.rope import rope_and_write
from paged_kernels.rope import Rope, rope_and_write_reference
from torch import Tensor

from tests.kernels import RUNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
POSITIONS = 500
BITS = {4: torch.int32, 2: torch.int16}


def angles(rotated: int) -> Tensor:
    """`[POSITIONS, rotated / 2]`."""
    frequencies = 10000 ** (-torch.arange(0, rotated, 2) / rotated)
    return torch.arange(POSITIONS)[:, None] * frequencies


def make_rope(rotated: int, interleaved: bool = False) -> Rope:
    at = angles(rotated)
    return Rope(torch.cat((at.cos(), at.sin()), -1).to(DEVICE), interleaved)


def check(
    tokens: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rope: Rope | None,
    normed: bool = False,
    dtype: torch.dtype = torch.float32,
    block_size: int = 16,
    norm_dtype: torch.dtype | None = None,
) -> None:
    generator = torch.Generator().manual_seed(tokens * heads * dim)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator).to(DEVICE, dtype)
    positions = torch.randint(POSITIONS, (tokens,), generator=generator, dtype=torch.int32).to(DEVICE)
    blocks = -(-tokens // block_size) + 2
    slots = (torch.randperm((blocks - 1) * block_size, generator=generator)[:tokens] + block_size).to(DEVICE)
    norms: list[Tensor | None] = [None, None]
    if normed:
        norms = [(torch.rand(dim, generator=generator) + 0.5).to(DEVICE, norm_dtype or dtype) for _ in range(2)]

    results = []
    for write in [rope_and_write] * RUNS + [rope_and_write_reference]:
        # A NaN in what is written would fail against the reference; one in what is not must keep its bits.
        shape = (blocks, kv_heads, block_size, dim)
        cache = LayerCache(*(torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)))
        own = qkv.clone()
        write(own, positions, slots, rope, *norms, 1e-6, cache, heads, kv_heads)
        results.append((own, *cache))
    for one, *more, want in zip(*results, strict=True):
        bits = BITS[dtype.itemsize]
        assert all(torch.equal(one.view(bits), two.view(bits)) for two in more)
        torch.testing.assert_close(one, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)
    own, keys, values = results[0]
    untouched = torch.ones(blocks * block_size, dtype=torch.bool, device=DEVICE)
    untouched[slots] = False
    for stored, at in ((keys, heads), (values, heads + kv_heads)):
        flat = stored.transpose(1, 2).flatten(0, 1)
        nan = torch.full_like(flat[untouched], float("nan"))
        assert torch.equal(flat[untouched].view(bits), nan.view(bits))
        assert torch.equal(flat[slots], own.view(tokens, -1, dim)[:, at : at + kv_heads])
    assert torch.equal(own[:, (heads + kv_heads) * dim :], qkv[:, (heads + kv_heads) * dim :])
    if not normed:
        rotated = 0 if rope is None else rope.cos_sin.shape[1]
        assert torch.equal(own.view(tokens, -1, dim)[..., rotated:], qkv.view(tokens, -1, dim)[..., rotated:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_dims(dim: int, normed: bool, dtype: torch.dtype) -> None:
    check(5, 6, 2, dim, make_rope(dim), normed, dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 4), (20, 1), (1, 1), (32, 8)])
def test_groups(heads: int, kv_heads: int, normed: bool) -> None:
    check(3, heads, kv_heads, 64, make_rope(64), normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 16), (80, 32), (80, 20), (128, 96), (256, 64), (96, 96), (64, 2)])
def test_partial_and_interleaved(dim: int, rotated: int, interleaved: bool, normed: bool, dtype: torch.dtype) -> None:
    check(4, 3, 1, dim, make_rope(rotated, interleaved), normed, dtype)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_no_rope(dim: int, normed: bool) -> None:
    check(6, 4, 2, dim, None, normed)


@pytest.mark.parametrize(("tokens", "block_size"), [(1, 64), (2, 16), (33, 32), (70, 16), (130, 64)])
def test_token_counts(tokens: int, block_size: int) -> None:
    check(tokens, 2, 1, 64, make_rope(64), True, block_size=block_size)


def test_float32_norms() -> None:
    check(3, 4, 2, 128, make_rope(128), True, DTYPES[-1], norm_dtype=torch.float32)


def test_one_norm_alone_is_refused() -> None:
    qkv, cache = torch.zeros(1, 192, device=DEVICE), LayerCache(*torch.zeros(2, 2, 1, 16, 64, device=DEVICE))
    at = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="both or neither"):
        rope_and_write(qkv, at.int(), at, None, None, torch.ones(64, device=DEVICE), 1e-6, cache, 1, 1)


def test_padding_may_share_block_0() -> None:
    qkv = torch.randn(4, 4 * 64, device=DEVICE)
    cache = LayerCache(*(torch.full((3, 1, 16, 64), 7.0, device=DEVICE) for _ in range(2)))
    positions = torch.tensor([0, 3, 0, 0], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([0, 35, 0, 0], device=DEVICE)
    rope_and_write(qkv, positions, slots, make_rope(64), None, None, 1e-6, cache, 2, 1)
    for stored, at in zip(cache, (2, 3), strict=True):
        assert torch.equal(stored[2, 0, 3], qkv[1, at * 64 : (at + 1) * 64])
        stored[2, 0, 3] = 7.0
        assert (stored[0, 0, 1:] == 7.0).all()
        assert (stored[1:] == 7.0).all()


def test_agrees_with_transformers() -> None:
    from transformers.models.cohere import modeling_cohere
    from transformers.models.llama import modeling_llama

    tokens, heads, kv_heads, dim = 6, 4, 2, 64
    positions = torch.tensor([0, 1, 7, 100, 499, 3], dtype=torch.int32)
    for interleaved, apply in (
        (False, modeling_llama.apply_rotary_pos_emb),
        (True, modeling_cohere.apply_rotary_pos_emb),  # GPT-J style
    ):
        at = angles(dim)[positions.long()]
        at = at.repeat_interleave(2, -1) if interleaved else torch.cat((at, at), -1)
        qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
        query, key, _ = qkv.view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
        want = apply(query.transpose(0, 1)[None], key.transpose(0, 1)[None], at.cos()[None], at.sin()[None])
        for write in (rope_and_write, rope_and_write_reference):
            own = qkv.to(DEVICE, copy=True)
            cache = LayerCache(*(torch.zeros(2, kv_heads, 16, dim, device=DEVICE) for _ in range(2)))
            slots = torch.arange(16, 16 + tokens, device=DEVICE)
            rope = make_rope(dim, interleaved)
            write(own, positions.to(DEVICE), slots, rope, None, None, 0.0, cache, heads, kv_heads)
            got = own.cpu().view(tokens, -1, dim).transpose(0, 1)
            torch.testing.assert_close(got[: heads + kv_heads], torch.cat((want[0][0], want[1][0])))
            torch.testing.assert_close(cache.key[1, :, :tokens].cpu(), want[1][0])

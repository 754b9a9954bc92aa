"""The prefill kernel against plain PyTorch, on chunks at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from paged_kernels.attention import LayerCache, LayerSpec
from paged_kernels.gpu.prefill_attention import (
    ROWS,
    PrefillRows,
    plan_tiles,
    prefill_attention,
    prefill_attention_reference,
)
from torch import Tensor

from tests.kernels import RUNS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
Chunks = list[tuple[int, int]]


def make(
    chunks: Chunks, spec: LayerSpec, block_size: int, dtype: torch.dtype
) -> tuple[Tensor, LayerCache, Tensor, PrefillRows, Tensor]:
    """Chunks (start, count) over a cache that is NaN wherever no query looks; and their tokens in the batch."""
    generator = torch.Generator().manual_seed(0)
    needed = [-(-(start + count) // block_size) for start, count in chunks]
    free = list(range(1, sum(needed) + 1))
    random.Random(0).shuffle(free)
    shape = (len(free) + 1, spec.num_kv_heads, block_size, spec.key_dim)
    cache = LayerCache(*(torch.full(shape, float("nan")) for _ in range(2)))
    tables = torch.zeros(len(chunks) + 2, max(needed), dtype=torch.int32)
    slots, offsets, tokens = [len(chunks) - row for row in range(len(chunks))], [], 3
    for slot, (start, count), blocks in zip(slots, chunks, needed, strict=True):
        tables[slot, :blocks] = torch.tensor([free.pop() for _ in range(blocks)])
        seen = torch.arange(start + count)
        if spec.window is not None:
            seen = seen[max(0, start + 1 - spec.window) :]
        if spec.chunk is not None:
            seen = seen[seen >= start // spec.chunk * spec.chunk]
        for x in cache:
            new = torch.randn(len(seen), spec.num_kv_heads, spec.key_dim, generator=generator)
            x[tables[slot, seen // block_size].long(), :, seen % block_size] = new
        offsets.append(tokens)
        tokens += count + 2
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.key_dim
    qkv = torch.full((tokens, width + 8), float("nan"))[:, :width]
    mine = torch.cat([torch.arange(at, at + count) for at, (_, count) in zip(offsets, chunks, strict=True)])
    qkv[mine] = torch.randn(len(mine), width, generator=generator)
    starts, counts = zip(*chunks, strict=True)
    arrays = (slots, starts, counts, offsets, *plan_tiles(starts, counts, spec.num_heads // spec.num_kv_heads))
    rows = PrefillRows(*(torch.tensor(np.array(x, np.int32), device=DEVICE) for x in arrays))
    cache = LayerCache(*(x.to(DEVICE, dtype) for x in cache))
    return qkv.to(DEVICE, dtype), cache, tables.to(DEVICE), rows, mine.to(DEVICE)


def check(chunks: Chunks, spec: LayerSpec, block_size: int, dtype: torch.dtype, sinks: Tensor | None = None) -> None:
    qkv, cache, tables, rows, mine = make(chunks, spec, block_size, dtype)
    results = []
    for attend in [prefill_attention] * RUNS + [prefill_attention_reference]:
        out = torch.full((qkv.shape[0], spec.num_heads * spec.key_dim), float("nan"), dtype=dtype, device=DEVICE)
        attend(qkv, cache, tables, rows, spec, sinks, out)
        results.append(out[mine])
        out[mine] = float("nan")
        assert out.isnan().all()
    first, *more, want = results
    assert all(torch.equal(first, again) for again in more)
    torch.testing.assert_close(first, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 24, 64])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 80), (10, 1, 64), (4, 1, 128), (2, 1, 256)])
def test_random_chunks(heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype) -> None:
    r = random.Random(heads * dim * block_size)
    chunks = [(0, 129), (r.randint(1, 200), 1), (64, 32), (r.randint(0, 60), r.randint(1, 60))]
    check(chunks, LayerSpec(heads, kv_heads, dim, dim, dim**-0.5), block_size, dtype)


@pytest.mark.parametrize(
    "feature",
    [
        {"window": 1},
        {"window": 40},
        {"window": 130},
        {"window": 500},
        {"chunk": 48},
        {"chunk": 64, "window": 30},
        {"softcap": 2.0},
        {"softcap": 5.0, "window": 70},
        {"sinks": True},
        {"sinks": True, "window": 64},
    ],
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_windows_chunks_softcaps_and_sinks(feature: dict[str, Any], block_size: int) -> None:
    feature = dict(feature)
    sinks = torch.randn(4, device=DEVICE) if feature.pop("sinks", False) else None
    spec = LayerSpec(4, 2, 32, 32, 0.3, **feature)
    check([(0, 130), (150, 1), (63, 65), (300, 33)], spec, block_size, torch.float16, sinks)


def test_tiles_cover_every_token_once_and_the_heaviest_come_first() -> None:
    r = random.Random(1)
    for group in (1, 3, 4, 20):
        starts = [r.choice([0, r.randint(1, 5000)]) for _ in range(20)]
        counts = [r.randint(1, 1000) for _ in starts]
        tokens = ROWS // group
        tiles = list(zip(*(x.tolist() for x in plan_tiles(starts, counts, group)), strict=True))
        want = [(row, index) for row, count in enumerate(counts) for index in range(-(-count // tokens))]
        assert sorted(tiles) == want
        seen = [starts[row] + index * tokens for row, index in tiles]
        assert seen == sorted(seen, reverse=True)

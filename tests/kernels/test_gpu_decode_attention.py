"""The decode kernel against plain PyTorch, on shapes and lengths at random."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from paged_kernels.attention import LayerCache, LayerSpec
from paged_kernels.gpu.decode_attention import (
    MAX_TILE,
    DecodeRows,
    decode_attention,
    decode_attention_reference,
    plan_work,
)
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def make(
    lengths: list[int], spec: LayerSpec, block_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, LayerCache, Tensor, DecodeRows]:
    """Rows of these lengths (0: padding) over a cache that holds NaN wherever nobody may look."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // block_size) + 1
    num_blocks = sum(-(-length // block_size) for length in lengths)
    shape = (num_blocks + 1, spec.num_kv_heads, block_size, spec.key_dim)
    key, value = (torch.randn(shape, generator=generator) for _ in range(2))
    tables = torch.zeros(len(lengths) + 3, width, dtype=torch.int32)
    free = list(range(1, num_blocks + 1))
    random.Random(seed).shuffle(free)
    slots = [-1 if length == 0 else len(lengths) - row for row, length in enumerate(lengths)]
    for slot, length in zip(slots, lengths, strict=True):
        for index in range(-(-length // block_size)):
            block = tables[slot, index] = free.pop()
            past = length - index * block_size
            behind = -1
            if spec.window is not None:
                behind = length - spec.window - index * block_size
            for x in (key, value):
                x[block, :, max(past, 0) :] = float("nan")
                if behind >= block_size:
                    x[block] = float("nan")
    key[0] = value[0] = float("nan")
    query = torch.randn(len(lengths), (spec.num_heads + 2) * spec.key_dim, generator=generator)
    rows = DecodeRows(
        torch.tensor(slots, dtype=torch.int32, device=DEVICE),
        torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device=DEVICE),
        torch.zeros(len(lengths) * spec.num_kv_heads, dtype=torch.int32, device=DEVICE),
    )
    cache = LayerCache(key.to(DEVICE, dtype), value.to(DEVICE, dtype))
    return query.to(DEVICE, dtype), cache, tables.to(DEVICE), rows


def check(
    lengths: list[int], spec: LayerSpec, block_size: int, dtype: torch.dtype, sinks: Tensor | None = None
) -> None:
    query, cache, tables, rows = make(lengths, spec, block_size, dtype)
    work = plan_work(rows, spec)
    real = [row for row, length in enumerate(lengths) if length]
    results = []
    for attend in (decode_attention, decode_attention, decode_attention_reference):
        out = torch.full((len(lengths), spec.num_heads * spec.key_dim), float("nan"), dtype=dtype, device=DEVICE)
        attend(query, cache, tables, rows, work, spec, sinks, out)
        assert not rows.counters.any()
        results.append(out[real].float())
    first, again, want = results
    assert torch.equal(first, again)
    torch.testing.assert_close(first, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64, 96] if DEVICE == "cuda" else [16, 64, 96])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 80), (20, 1, 64), (2, 1, 128), (2, 1, 256)])
def test_random_lengths(heads: int, kv_heads: int, dim: int, block_size: int, dtype: torch.dtype) -> None:
    r = random.Random(heads * dim * block_size)
    spec = LayerSpec(heads, kv_heads, dim, dim, dim**-0.5)
    check([r.randint(1, 300) for _ in range(3)] + [0, 1, 700], spec, block_size, dtype)


@pytest.mark.parametrize(
    "feature",
    [
        {"window": 1},
        {"window": 40},
        {"window": 130},
        {"chunk": 48},
        {"softcap": 2.0},
        {"softcap": 5.0, "window": 70},
        {"sinks": True},
        {"sinks": True, "window": 64},
    ],
)
@pytest.mark.parametrize("block_size", [16, 64])
def test_windows_chunks_softcaps_and_sinks(feature: dict[str, Any], block_size: int) -> None:
    sinks = torch.randn(4, device=DEVICE) if feature.pop("sinks", False) else None
    spec = LayerSpec(4, 2, 32, 32, 0.3, **feature)
    check([1, 40, 41, 64, 0, 129, 500], spec, block_size, torch.float32, sinks)


def test_one_long_sequence_and_many_short_ones() -> None:
    spec = LayerSpec(2, 1, 16, 16, 0.25)
    check([3000], spec, 16, torch.float32)
    check([1, 2, 3, 65, 64, 63, 2000] + [5] * 40, spec, 16, torch.float32)


def test_the_items_cover_every_visible_token_once() -> None:
    r = random.Random(3)
    for trial in range(20):
        window = r.choice([None, 1, 64, 100])
        spec = LayerSpec(2, r.choice([1, 2, 8]), 16, 16, 1.0, window=window)
        lengths = [r.choice([0, 1, r.randint(1, 200), r.randint(1, 5000)]) for _ in range(r.randint(1, 40))]
        rows = DecodeRows(
            torch.tensor([-1 if length == 0 else 1 for length in lengths], dtype=torch.int32, device=DEVICE),
            torch.tensor([length - 1 for length in lengths], dtype=torch.int32, device=DEVICE),
            torch.zeros(0, device=DEVICE),
        )
        items = plan_work(rows, spec).items.tolist()
        used = [item for item in items if item[0] >= 0]
        assert all(item[0] == -1 for item in items[len(used) :])
        for row, length in enumerate(lengths):
            mine = [item for item in used if item[0] == row]
            spans = [(item[1], item[2]) for item in mine]
            if length == 0:
                assert spans == []
                continue
            first = 0 if window is None else max(0, length - window)
            assert spans[0][0] == first // MAX_TILE * MAX_TILE, trial
            assert spans[-1][1] == length
            assert all(a[1] == b[0] and a[0] < a[1] for a, b in itertools.pairwise(spans))
            assert {(item[3], item[4], item[5]) for item in mine} == {(length, used.index(mine[0]), len(mine))}

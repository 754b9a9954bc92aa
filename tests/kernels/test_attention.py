"""The reference against attention written out token by token."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from paged_kernels.attention import AttentionBatch, LayerCache, LayerSpec, ReferenceAttention
from torch import Tensor

BACKENDS = [ReferenceAttention()]


def naive(spec: LayerSpec, query: Tensor, key: Tensor, value: Tensor, at: int, sinks: Tensor | None) -> Tensor:
    """One query `[heads, dim]` at position `at` over keys `[at + 1, kv_heads, dim]`, in float64."""
    out = []
    for head in range(spec.num_heads):
        kv = head // (spec.num_heads // spec.num_kv_heads)
        scores = []
        for position in range(at + 1):
            seen = spec.window is None or position > at - spec.window
            seen = seen and (spec.chunk is None or position // spec.chunk == at // spec.chunk)
            score = float(query[head].double() @ key[position, kv].double()) * spec.scale
            if spec.softcap is not None:
                score = float(torch.tanh(torch.tensor(score / spec.softcap, dtype=torch.float64))) * spec.softcap
            scores.append(score if seen else float("-inf"))
        logits = torch.tensor([*scores, float("-inf") if sinks is None else float(sinks[head])], dtype=torch.float64)
        out.append(logits.softmax(-1)[:-1] @ value[: at + 1, kv].double())
    return torch.stack(out)


FEATURES = {
    "plain": {},
    "window": {"window": 5},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 2.0},
    "window and softcap": {"window": 9, "softcap": 3.0},
    "sinks": {},
    "sinks and window": {"window": 4},
}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("heads", "kv_heads", "dims"), [(4, 2, (8, 8)), (3, 1, (16, 16)), (2, 2, (12, 8))])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_equals_naive_attention(
    backend: ReferenceAttention, feature: str, heads: int, kv_heads: int, dims: tuple[int, int], block_size: int
) -> None:
    rng = random.Random(f"{feature}{heads}{block_size}")
    torch.manual_seed(rng.randrange(2**31))
    spec = LayerSpec(heads, kv_heads, *dims, scale=0.3, **FEATURES[feature])
    sinks = torch.randn(heads) if "sinks" in feature else None
    lengths = [rng.randint(1, 40) for _ in range(5)]
    starts = [rng.randrange(length) if rng.random() < 0.7 else 0 for length in lengths]
    rows = sorted(zip(starts, lengths, strict=True), key=lambda row: row[1] - row[0] > 1)
    width = max(-(-length // block_size) for length in lengths)
    num_blocks = width * len(rows)
    tables = (torch.randperm(num_blocks) + 1).view(len(rows), width).int()
    cache = backend.allocate(spec, num_blocks, block_size, torch.float32, torch.device("cpu"))
    keys = [torch.randn(length, kv_heads, dims[0]) for _, length in rows]
    values = [torch.randn(length, kv_heads, dims[1]) for _, length in rows]
    queries = [torch.randn(length - start, heads, dims[0]) for start, length in rows]

    def where(row: int, positions: range) -> Tensor:
        at = torch.tensor(list(positions), dtype=torch.long)
        return tables[row, at // block_size].long() * block_size + at % block_size

    for row, (start, _) in enumerate(rows):
        for stored, new in zip(cache, (keys[row], values[row]), strict=True):
            stored.flatten(0, 1)[where(row, range(start))] = new[:start]
    batch = AttentionBatch(
        slot_mapping=torch.cat([where(row, range(start, length)) for row, (start, length) in enumerate(rows)]),
        block_tables=tables,
        starts=[start for start, _ in rows],
        counts=[length - start for start, length in rows],
        num_single=sum(length - start == 1 for start, length in rows),
    )
    # Strided as a model hands them over: the transpose of `[heads, tokens, dim]`.
    flat = [
        torch.cat(parts).transpose(0, 1).contiguous().transpose(0, 1)
        for parts in (
            queries,
            [key[start:] for key, (start, _) in zip(keys, rows, strict=True)],
            [value[start:] for value, (start, _) in zip(values, rows, strict=True)],
        )
    ]
    out = backend.forward(spec, cache, *flat, sinks, batch)
    want = [
        naive(spec, queries[row][at - start], keys[row], values[row], at, sinks)
        for row, (start, length) in enumerate(rows)
        for at in range(start, length)
    ]
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), torch.stack(want), rtol=1e-4, atol=1e-5)
    for row, (_, length) in enumerate(rows):
        torch.testing.assert_close(cache.key.flatten(0, 1)[where(row, range(length))], keys[row])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(backend: ReferenceAttention, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = LayerSpec(4, 2, 16, 16, scale=0.25)
    batch = AttentionBatch(torch.arange(16, 36), torch.tensor([[1, 2]], dtype=torch.int32), [0], [20], 0)
    tensors = [torch.randn(20, heads, 16) for heads in (4, 2, 2)]

    def run(dtype: torch.dtype) -> Tensor:
        cache = backend.allocate(spec, 2, 16, dtype, torch.device("cpu"))
        return backend.forward(spec, cache, *(x.to(dtype) for x in tensors), None, batch).float()

    torch.testing.assert_close(run(dtype), run(torch.float32), rtol=0.03, atol=0.03)


def test_storage_is_zero_and_has_one_block_more() -> None:
    cache = ReferenceAttention().allocate(LayerSpec(4, 2, 8, 6, scale=1.0), 10, 4, torch.bfloat16, torch.device("cpu"))
    assert isinstance(cache, LayerCache)
    assert cache.key.shape == (11, 4, 2, 8)
    assert cache.value.shape == (11, 4, 2, 6)
    assert not any(itertools.chain.from_iterable(x.flatten().tolist() for x in cache))

"""Decode attention over shared prefixes against plain attention over everything."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from paged_kernels.attention import LayerSpec
from paged_kernels.gpu.decode_attention import decode_attention, decode_attention_reference, plan_work
from paged_kernels.gpu.shared_prefix import (
    ROWS,
    SharedPrefixes,
    attend_to_prefixes,
    find_prefixes,
    plan_prefixes,
)

from tests.kernels.test_gpu_decode_attention import DEVICE, DTYPES, TOLERANCE, make


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "softcap"),
    [(4, 1, 64, 16, None), (6, 2, 80, 32, None), (32, 1, 32, 64, 3.0), (2, 2, 128, 16, None)],
)
def test_prefixes_read_once_give_what_reading_them_in_every_row_gives(
    heads: int, kv_heads: int, dim: int, block_size: int, softcap: float | None, dtype: torch.dtype
) -> None:
    spec = LayerSpec(heads, kv_heads, dim, dim, dim**-0.5, softcap=softcap)
    lengths = [600, 330, 5, 400, 0, 321, 500, 700, 390, 350]
    query, cache, tables, rows = make(lengths, spec, block_size, dtype)
    for sharing, tokens in (([0, 3, 5, 7, 9], 256), ([1, 6, 8], 256)):
        slots = rows.slots[sharing].long()
        tables[slots, : tokens // block_size] = tables[slots[0], : tokens // block_size].clone()
    prefixes = [(np.array([0, 3, 5, 7, 9]), 256), (np.array([1, 6, 8]), 256)]
    plan = plan_prefixes(prefixes, rows.slots.cpu().numpy(), len(lengths), spec.group, 9)
    shared = SharedPrefixes(*(torch.from_numpy(part).to(DEVICE) for part in plan))
    results = []
    for _ in range(2):
        work = plan_work(rows, spec, shared.rows)
        out = torch.full((len(lengths), heads * dim), float("nan"), dtype=dtype, device=DEVICE)
        part = attend_to_prefixes(query, cache, tables, shared, spec)
        decode_attention(query, cache, tables, rows, work, spec, None, out, part)
        results.append(out[[row for row, length in enumerate(lengths) if length]].float())
    assert torch.equal(*results)
    want = torch.zeros_like(out)
    decode_attention_reference(query, cache, tables, rows, work, spec, None, want)
    want = want[[row for row, length in enumerate(lengths) if length]].float()
    torch.testing.assert_close(results[0], want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_items_cover_each_prefix_once_for_every_row_of_it() -> None:
    r = random.Random(5)
    for _ in range(100):
        group, num_rows, num_items = r.choice([1, 4, 48]), r.randint(8, 300), r.choice([2, 8, 16, 33])
        free = list(range(num_rows))
        r.shuffle(free)
        prefixes = []
        for _ in range(r.randint(1, 4)):
            mine, free = sorted(free[: (count := r.randint(2, 150))]), free[count:]
            if mine:
                prefixes.append((np.array(mine), 128 * r.randint(1, 40)))
        rows, items, members = plan_prefixes(prefixes, np.arange(num_rows) + 7, num_rows, group, num_items)
        planned = [(sharing, tokens) for sharing, tokens in prefixes if rows[sharing[0], 0]]
        assert (rows[:, 0] > 0).sum() == sum(len(sharing) for sharing, _ in planned)
        for sharing, tokens in planned:
            for row in sharing.tolist():
                covered, first, parts, place = rows[row].tolist()
                assert covered == tokens
                spans = items[first : first + parts]
                assert all(members[item[1] + place] == row and place < item[2] <= ROWS // group for item in spans)
                assert all(tables_of - 7 in sharing for tables_of in spans[:, 0])
                assert spans[0, 3] == 0
                assert spans[-1, 4] == tokens
                assert (spans[1:, 3] == spans[:-1, 4]).all()
                assert (spans[:, 3] % 128 == 0).all()


def test_finding_prefixes() -> None:
    tables = np.arange(1, 20 * 40 + 1, dtype=np.int32).reshape(20, 40)
    tokens = np.full(20, 639)
    assert find_prefixes(tables, tokens, 16) == []
    tables[2:10, :30] = tables[2, :30]
    tables[9, 20:] += 1000  # shares less
    tables[12:15, :30] = tables[12, :30]  # too few
    ((rows, shared),) = find_prefixes(tables, tokens, 16)
    assert rows.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert shared == 384
    tokens[2:10] = 300
    ((rows, shared),) = find_prefixes(tables, tokens, 16)
    assert (rows.tolist(), shared) == ([2, 3, 4, 5, 6, 7, 8, 9], 256)
    tokens[2:10] = 250
    assert find_prefixes(tables, tokens, 16) == []

"""Changes of the batch state and the places of tokens, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from paged_kernels.gpu.step import (
    apply_changes,
    apply_changes_reference,
    locate_tokens,
    locate_tokens_reference,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("count", [1, 255, 700])
def test_changes_reach_their_places_and_nothing_else(count: int) -> None:
    state = torch.randint(-(2**31), 2**31 - 1, (5000,), dtype=torch.int32, device=DEVICE)
    want = state.clone()
    values = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32)
    changes = torch.stack([torch.randperm(5000)[:count].int(), values], 1).to(DEVICE)
    apply_changes(state, changes)
    apply_changes_reference(want, changes)
    assert torch.equal(state, want)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("count", [1, 40, 300])
def test_tokens_are_located_in_every_group(count: int, block_size: int, groups: int) -> None:
    tables = torch.randint(1, 2**20, (groups, 7, 10), dtype=torch.int32, device=DEVICE)
    last_token = torch.randint(0, 1000, (7,), dtype=torch.int32, device=DEVICE)
    ids = torch.randint(-1, 5, (count,), dtype=torch.int32, device=DEVICE)
    slots = torch.randint(-1, 7, (count,), dtype=torch.int32, device=DEVICE)
    positions = torch.randint(0, 10 * block_size, (count,), dtype=torch.int32, device=DEVICE)
    positions[slots < 0] = -1
    ids[slots < 0] = -1
    got = locate_tokens(ids, slots, positions, last_token, tables, block_size)
    want = locate_tokens_reference(ids, slots, positions, last_token, tables, block_size)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

"""Kernels that change logits, against their reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from paged_kernels import logits as reference
from paged_kernels.gpu import logits as kernels
from paged_kernels.logits import PenaltyTables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


def random_logits(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of a wider tensor."""
    generator = torch.Generator().manual_seed(rows + vocab)
    return torch.randn(rows, vocab + 3, generator=generator).to(DEVICE, dtype)[:, :vocab]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [7, 64, 5001])
def test_mask(dtype: torch.dtype, vocab: int) -> None:
    logits = random_logits(4, vocab, dtype)
    rows = torch.tensor([2, 0, 3], dtype=torch.int32, device=DEVICE)
    words = (3, -(-vocab // 32))
    allowed = torch.randint(-(2**31), 2**31, words, generator=torch.Generator().manual_seed(1)).int().to(DEVICE)
    got, want = logits.clone(), logits.clone()
    kernels.mask(got, rows, allowed)
    reference.mask(want, rows, allowed)
    assert torch.equal(got, want)
    assert torch.equal(got[1], logits[1])
    for row, bits in zip(rows.tolist(), allowed.tolist(), strict=True):
        kept = [bits[token // 32] >> token % 32 & 1 for token in range(vocab)]
        assert got[row].isfinite().int().tolist() == kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties(dtype: torch.dtype) -> None:
    logits = random_logits(4, 5000, dtype)
    logits[0, 3] = float("-inf")
    slots = torch.tensor([3, -1, 0, 1], dtype=torch.int32, device=DEVICE)
    row = torch.tensor([1, -1, -1, 0], dtype=torch.int32, device=DEVICE)
    parameters = torch.tensor([[1.3, 1, 1, 0.8], [0.5, 0, 0, -0.3], [0.1, 0, 0, 0.7]], device=DEVICE)
    counts = torch.randint(0, 6, (2, 5000), generator=torch.Generator().manual_seed(11)).int().to(DEVICE)
    results = []
    for module in (kernels, reference):
        tables = PenaltyTables(row, *parameters, counts.clone())
        changed = logits.clone()
        module.penalise(changed, slots, tables)
        module.count_tokens(torch.tensor([9, 4, -1, 2], dtype=torch.int32, device=DEVICE), slots, tables)
        results.append((changed, tables.counts))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-6, rtol=1e-3)
    assert torch.equal(results[0][0][[1, 3]], logits[[1, 3]])
    assert torch.equal(results[0][1], results[1][1])
    assert (results[0][1] != counts).nonzero().tolist() == [[0, 9]]

"""Sampling: filters, distributions, and independence of the other rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from paged_kernels import sampling
from paged_kernels.sampling import SamplingBatch, sample

from paged_backend.runner.sampling import uniform


def batch(rows: int, **fields: Any) -> SamplingBatch:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniform": 0.5} | fields
    kinds = {"top_k": np.int64, "uniform": np.float64}
    return SamplingBatch(
        **{
            name: np.broadcast_to(np.asarray(value, dtype=kinds.get(name, np.float32)), (rows,)).copy()
            for name, value in values.items()
        }
    )


def kept(logits: torch.Tensor, **fields: Any) -> set[int]:
    """Every token that some uniform number draws."""
    points = np.linspace(0, 1, 4001)[:-1]
    return set(sample(logits.expand(len(points), -1), batch(len(points), uniform=points, **fields)).tolist())


def test_greedy_takes_the_first_maximum_and_is_the_default_of_temperature_zero() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 0.0, 0.0, 0.0]])
    assert sample(logits, batch(2, temperature=0)).tolist() == [1, 0]


@pytest.mark.parametrize("vocab", [1, 300, 512, 1024, 1029, 5000])
def test_the_first_maximum_of_any_number_of_tokens(vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = torch.randint(-3, 9, (40, vocab)).float()  # the largest comes many times
    logits[:20] = torch.where(torch.rand(20, vocab) < 0.999, -torch.inf, logits[:20])
    assert sample(logits, batch(40, temperature=0)).tolist() == logits.numpy().argmax(-1).tolist()


def test_filters_keep_what_their_definitions_say() -> None:
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log().unsqueeze(0)
    assert kept(logits) == {0, 1, 2, 3, 4}
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_k=-1) == {0, 1, 2, 3, 4}
    assert kept(logits, top_p=0.69) == {0, 1}
    assert kept(logits, top_p=0.71) == {0, 1, 2}
    assert kept(logits, top_p=0.01) == {0}
    assert kept(logits, min_p=0.25) == {0, 1, 2}
    # top_p counts the probability left by top_k: 0.5 / 0.7 is more than 0.7.
    assert kept(logits, top_k=2, top_p=0.7) == {0}
    assert kept(logits, top_p=0.9, min_p=0.35) == {0, 1}
    assert kept(logits, temperature=0.05) == {0}


@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.95}, {"min_p": 0.02}, {"temperature": 0.5}])
def test_frequencies_follow_the_probabilities(fields: dict[str, Any]) -> None:
    torch.manual_seed(1)
    draws = 40_000
    logits = torch.randn(1, 64) * 1.5
    seeds = np.full(draws, 7, dtype=np.uint64)
    tokens = sample(logits.expand(draws, -1), batch(draws, uniform=uniform(seeds, np.arange(draws)), **fields))
    probabilities = (logits[0] / fields.get("temperature", 1.0)).softmax(-1)
    probabilities = torch.where(torch.isin(torch.arange(64), tokens.unique()), probabilities, 0)
    expected = probabilities / probabilities.sum() * draws
    counts = torch.bincount(tokens, minlength=64)
    common = expected > 5
    chi_square = float(((counts - expected)[common] ** 2 / expected[common]).sum())
    degrees = int(common.sum()) - 1
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_a_row_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_HEAD", 8)
    torch.manual_seed(2)
    rows, vocab = 24, 300
    logits = torch.randn(rows, vocab).mul(3).bfloat16().float()  # rounded, so that there are ties
    rng = np.random.default_rng(3)
    fields = {
        "temperature": rng.choice([0, 0.3, 1, 5], rows),
        "top_k": rng.choice([0, 1, 5, 50], rows),
        "top_p": rng.choice([1, 0.9, 0.2], rows),
        "min_p": rng.choice([0, 0.05], rows),
        "uniform": rng.random(rows),
    }
    together = sample(logits, batch(rows, **fields)).tolist()
    alone = [
        sample(logits[row : row + 1], batch(1, **{k: v[row] for k, v in fields.items()})).item() for row in range(rows)
    ]
    assert together == alone


def test_rows_that_reach_past_the_sorted_head_are_sorted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    logits = torch.randn(1, 200)
    points = np.linspace(0, 0.999, 500)
    want = sample(logits.expand(500, -1), batch(500, top_p=0.999, uniform=points))
    monkeypatch.setattr(sampling, "_HEAD", 4)
    assert torch.equal(sample(logits.expand(500, -1), batch(500, top_p=0.999, uniform=points)), want)
    assert len(want.unique()) > 100


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1000, 50), float("-inf"))
    logits[:, 17] = 0.0
    points = np.linspace(0, 1, 1001)[:-1]
    assert set(sample(logits, batch(1000, uniform=points)).tolist()) == {17}
    assert set(sample(logits, batch(1000, uniform=points, top_p=0.9)).tolist()) == {17}


def test_uniform_numbers_depend_on_seed_and_position_alone_and_look_uniform() -> None:
    seeds = np.arange(1000, dtype=np.uint64)
    positions = np.arange(100)
    grid = np.stack([uniform(np.full(100, seed, dtype=np.uint64), positions) for seed in seeds])
    assert np.array_equal(grid, uniform(seeds[:, None], positions[None, :]))
    assert grid.min() >= 0
    assert grid.max() < 1
    histogram = np.histogram(grid, bins=50, range=(0, 1))[0]
    assert abs(histogram - 2000).max() < 6 * 2000**0.5
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02

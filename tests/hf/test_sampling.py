"""Sampling repeats with the seed, and draws from the distribution transformers would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process

from hf_integration import paged
from tests.tiny import build, prompts

DRAWS = 3000


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    with paged(build(vocab_size=16), strict=True, num_blocks=1024) as patched:
        yield patched


def sample(model: PreTrainedModel, rows: int, seed: int, steps: int = 1, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = torch.tensor([[3, 9, 5]]).expand(rows, 3)
    return model.generate(ids, do_sample=True, max_new_tokens=steps, eos_token_id=None, **arguments)[:, 3:]


def test_same_seed_same_tokens(model: PreTrainedModel) -> None:
    first, again, other = (sample(model, 4, seed, steps=24, temperature=1.5) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert len({tuple(row) for row in first.tolist()}) == 4, "rows of one call draw for themselves"


def test_greedy_takes_no_random_number(model: PreTrainedModel) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.generate(torch.tensor([[3, 9]]), max_new_tokens=4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"temperature": 1e-6}])
def test_narrowest_sampling_is_greedy(model: PreTrainedModel, narrow: dict[str, float]) -> None:
    inputs = {name: tensor % 16 for name, tensor in prompts(5, 9).items()}
    arguments = inputs | {"max_new_tokens": 16, "eos_token_id": None}
    greedy, drawn = model.generate(**arguments), model.generate(**arguments, do_sample=True, **narrow)
    assert drawn.tolist() == greedy.tolist()


def warped(
    model: PreTrainedModel, ids: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Probabilities [rows, vocab] of the next token by transformers' own processors."""
    warpers = LogitsProcessorList(
        [
            logits_process.TemperatureLogitsWarper(temperature),
            logits_process.TopKLogitsWarper(top_k),
            logits_process.TopPLogitsWarper(top_p),
            logits_process.MinPLogitsWarper(min_p),
        ]
    )
    with torch.no_grad():
        return warpers(ids, model(ids).logits[:, -1].float()).softmax(-1)


def misfit(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square, in standard deviations above what chance gives. Infinite when the impossible was drawn."""
    if counts[probabilities == 0].any():
        return float("inf")
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    freedom = len(expected) - 1
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return (chi_square - freedom) / max(2 * freedom, 1) ** 0.5


WARPS = [
    {"temperature": 1.0, "top_k": 16, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.4, "top_k": 16, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 1.7, "top_k": 5, "top_p": 1.0, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 16, "top_p": 0.6, "min_p": 0.0},
    {"temperature": 0.8, "top_k": 16, "top_p": 1.0, "min_p": 0.3},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.8, "min_p": 0.45},
]


@pytest.mark.parametrize("warp", WARPS)
def test_distribution(model: PreTrainedModel, warp: dict[str, Any]) -> None:
    counts = torch.bincount(sample(model, DRAWS, 5, **warp)[:, 0], minlength=16).double()
    ids = torch.tensor([[3, 9, 5]])
    assert misfit(counts, warped(model, ids, **warp)[0].double()) < 5
    others = [warped(model, ids, **other)[0].double() for other in WARPS if other is not warp]
    assert min(misfit(counts, other) for other in others) > 10, "the check must be able to fail"


def test_steps_draw_independently(model: PreTrainedModel) -> None:
    warp = {"temperature": 1.2, "top_k": 4, "top_p": 1.0, "min_p": 0.0}
    pairs = sample(model, DRAWS, 6, steps=2, **warp)
    counts = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256).double()
    first = warped(model, torch.tensor([[3, 9, 5]]), **warp)[0].double()
    second = warped(model, torch.tensor([[3, 9, 5, token] for token in range(16)]), **warp).double()
    assert misfit(counts, (first[:, None] * second).flatten()) < 5

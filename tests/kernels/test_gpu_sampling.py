"""Sampling on the device against plain PyTorch with the same noise, and the properties of its filters."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from paged_kernels import sampling as host
from paged_kernels.gpu import sampling
from paged_kernels.gpu.sampling import SamplingTables
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
MANY = DEVICE == "cuda"  # the interpreter takes 0.1 s for a filtered row
EMPTY = torch.empty


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return EMPTY(*shape, dtype=dtype, device=device).fill_(float("nan") if dtype.is_floating_point else 7)


def make_tables(slots: int, **fields: Any) -> SamplingTables:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | fields
    columns = {
        name: torch.as_tensor(value, dtype=torch.int32 if name == "top_k" else torch.float32).expand(slots).contiguous()
        for name, value in values.items()
    }
    seed = torch.randint(-(2**31), 2**31, (slots, 2), generator=torch.Generator().manual_seed(5)).int()
    last_token = torch.full((slots,), -7, dtype=torch.int32)
    return SamplingTables(*(x.to(DEVICE) for x in (*columns.values(), seed, last_token)))


def run(
    logits: Tensor, tables: SamplingTables, slots: Tensor | None = None, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and logprobs, demanded to equal the reference's."""
    rows = logits.shape[0]
    slots = torch.arange(rows, dtype=torch.int32) if slots is None else slots
    positions = torch.arange(rows, dtype=torch.int32) if positions is None else positions
    results = []
    for function in (sampling.sample_reference, sampling.sample):
        tables = tables._replace(last_token=torch.full_like(tables.last_token, -7))
        tokens = torch.full((rows,), -5, dtype=torch.int32, device=DEVICE)
        logprobs = torch.full((rows,), float("inf"), device=DEVICE)
        with mock.patch("torch.empty", poisoned):
            function(logits, slots.to(DEVICE), positions.to(DEVICE), tables, tokens, logprobs)
        results.append([x.cpu() for x in (tokens, logprobs, tables.last_token)])
    want, got = results
    assert got[0].tolist() == want[0].tolist()
    assert got[2].tolist() == want[2].tolist()
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-5, equal_nan=True)
    return got[0], got[1]


def kept(logits: list[float], **fields: Any) -> set[int]:
    """Which tokens the filters keep; draws agree with the reference and are among them."""
    draws = 200 if MANY else 2
    tables = make_tables(draws, **fields)
    rows = torch.tensor([logits], device=DEVICE).expand(draws, -1).contiguous()
    tokens, _ = run(rows, tables)
    scores = rows[0].double() / tables.temperature[0]
    mask = set(sampling.kept_reference(scores, tables, 0).nonzero().flatten().tolist())
    assert set(tokens.tolist()) == mask if MANY else set(tokens.tolist()) <= mask
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 127, 1000, 4097, 9000])
def test_greedy_is_the_first_maximum(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).mul(4).round().to(DEVICE, dtype)
    logits[0] = 0
    logits[0, ::2] = -0.0
    logits[1, : vocab // 2] = float("-inf")
    tokens, _ = run(logits, make_tables(6, temperature=0.0))
    # The CPU's argmax promises no order of equal values.
    assert tokens.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("dtype", DTYPES if MANY else [torch.float16])
@pytest.mark.parametrize(("vocab", "scale"), [(5, 1.0), (300, 3.0), (5000, 6.0), (5000, 0.3), (9001, 3.0)])
def test_filters_agree_with_the_reference(vocab: int, scale: float, dtype: torch.dtype) -> None:
    compare_with_reference(vocab, scale, dtype)


@pytest.mark.parametrize(("vocab", "scale"), [(8500, 1.0), (9001, 0.3)])
def test_more_candidates_than_fit(vocab: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_DEPTH", 2)
    compare_with_reference(vocab, scale, torch.float16)


def compare_with_reference(vocab: int, scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rng = np.random.default_rng(vocab)
    rows = 100 if MANY else 8
    logits = torch.randn(rows, vocab, generator=generator).mul(scale).to(dtype)
    logits[::5] = logits[::5].mul(2).round().div(2)  # many ties
    logits[1, torch.randperm(vocab, generator=generator)[: vocab // 2]] = float("-inf")
    tables = make_tables(
        rows,
        temperature=rng.choice([0.1, 0.6, 1.0, 3.0], rows),
        top_k=rng.choice([-1, 0, 1, 5, 50, 2000, 10**6], rows),
        top_p=rng.choice([0.0, 1e-6, 0.3, 0.95, 0.999, 1.0], rows),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0], rows),
    )
    run(logits.to(DEVICE), tables)


def test_filters_keep_what_their_definitions_say() -> None:
    logits = torch.tensor([0.15, 0.5, 0.1, 0.2, 0.05]).log().tolist()
    assert kept(logits) == {0, 1, 2, 3, 4}
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_k=1) == {1}
    assert kept(logits, top_k=9) == {0, 1, 2, 3, 4}
    assert kept(logits, top_p=0.69) == {1, 3}
    assert kept(logits, top_p=0.71) == {0, 1, 3}
    assert kept(logits, top_p=1e-6) == {1}
    assert kept(logits, min_p=0.25) == {0, 1, 3}
    assert kept(logits, min_p=1.0) == {1}
    # top_p counts the probability left by top_k: 0.5 / 0.7 is more than 0.7.
    assert kept(logits, top_k=2, top_p=0.7) == {1}
    assert kept(logits, top_p=0.9, min_p=0.35) == {1, 3}


def test_equal_logits_are_kept_from_the_lowest_index() -> None:
    assert kept([1.0, 2.0, 1.0, 1.0], top_k=3) == {0, 1, 2}
    assert kept([0.0, -0.0, 0.0, -0.0], top_k=2) == {0, 1}
    assert kept([0.0] * 300, top_k=3) == {0, 1, 2}
    assert kept([0.0] * 10, top_p=0.35) == {0, 1, 2, 3}
    assert kept([0.0] * 10, top_p=0.35, top_k=6) == {0, 1, 2}
    assert kept([1.0, 0.0, 1.0, 1.0], min_p=1.0) == {0, 2, 3}


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.001}])
def test_banned_tokens_are_never_drawn(fields: dict[str, Any]) -> None:
    logits = [float("-inf")] * 300
    logits[17] = logits[280] = -3.0
    assert kept(logits, **fields) == {17, 280}


def test_filters_are_those_of_the_host() -> None:
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    for _ in range(20):
        fields = {
            "temperature": rng.choice([0.5, 1.0, 2.0], 1).astype(np.float32),
            "top_k": rng.choice([0, 1, 7, 40], 1),
            "top_p": rng.choice([1e-6, 0.5, 0.9, 1.0], 1).astype(np.float32),
            "min_p": rng.choice([0.0, 0.1], 1).astype(np.float32),
        }
        logits = torch.randn(1, 60, generator=generator)
        points = 20_000
        batch = host.SamplingBatch(
            **{k: v.repeat(points) for k, v in fields.items()}, uniform=np.linspace(0, 1, points, endpoint=False)
        )
        want = set(host.sample(logits.expand(points, -1), batch).tolist())
        scores = (logits[0] / float(fields["temperature"][0])).double()
        mask = sampling.kept_reference(scores, make_tables(1, **fields), 0)
        likely = scores.softmax(0) > 1e-3  # what the points cannot miss
        assert set((mask & likely).nonzero().flatten().tolist()) == {token for token in want if likely[token]}


def test_only_rows_without_a_finite_maximum_fail() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.randn(12, 5000, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    good, _ = run(logits, make_tables(12, temperature=[0.0, 1.0] * 6, top_k=[0, 20, 0, 0] * 3))
    logits[0, 4999] = logits[1, 0] = logits[2, 300] = nan
    logits[3, 4500] = logits[4, 1] = inf
    logits[5] = -inf
    logits[6, 4200:] = nan
    logits[6, :4200] = -inf
    tokens, logprobs = run(logits, make_tables(12, temperature=[0.0, 1.0] * 6, top_k=[0, 20, 0, 0] * 3))
    assert tokens.tolist() == [-1] * 7 + good[7:].tolist()
    assert logprobs.isnan().tolist() == [True] * 7 + [False] * 5


def test_padding_writes_only_its_token() -> None:
    logits = torch.randn(4, 700, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    tables = make_tables(6, temperature=[0, 1, 0, 1, 1, 0.5])
    tokens, logprobs = run(logits, tables, slots=torch.tensor([4, -1, 2, -1], dtype=torch.int32))
    assert (tokens == -1).tolist() == logprobs.isposinf().tolist() == [False, True, False, True]


def test_a_row_depends_on_itself_alone() -> None:
    logits = torch.randn(5, 1500, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    tables = make_tables(5, temperature=1.5, top_k=[0, 9, 0, 9, 0], top_p=[1, 1, 0.9, 0.9, 0.9])
    slots, positions = torch.arange(5, dtype=torch.int32), torch.arange(5, dtype=torch.int32) * 1000
    together, _ = run(logits, tables, slots, positions)
    order = torch.tensor([4, 2, 0])
    wide = torch.full((3, 1600), float("nan"), device=DEVICE)
    wide[:, :1500] = logits[order]
    apart, _ = run(wide[:, :1500], tables, slots[order], positions[order])
    assert apart.tolist() == together[order].tolist()
    moved, _ = run(logits, tables, slots, positions + 1)
    assert moved.tolist() != together.tolist()
    again, _ = run(logits, tables, slots, positions)
    assert again.tolist() == together.tolist()


@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02, "temperature": 1.5}])
def test_frequencies_follow_the_probabilities(fields: dict[str, Any]) -> None:
    draws, vocab = (20_000 if MANY else 500), 200  # two groups
    # The interpreter is too slow, but the other tests demand the reference's tokens of the kernel.
    sample = sampling.sample if MANY else sampling.sample_reference
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(7)).mul(1.5).to(DEVICE)
    tables = make_tables(1, **fields)
    tokens = torch.empty(draws, dtype=torch.int32, device=DEVICE)
    positions = torch.arange(draws, dtype=torch.int32, device=DEVICE)
    rows = logits.expand(draws, -1).contiguous()
    sample(rows, torch.zeros_like(positions), positions, tables, tokens, torch.empty(draws, device=DEVICE))
    scores = logits.double() / tables.temperature[0]
    mask = sampling.kept_reference(scores, tables, 0)
    assert bool(mask[tokens.long()].all())
    expected = scores.where(mask, float("-inf")).softmax(0).mul(draws).cpu()
    counts = torch.bincount(tokens.cpu(), minlength=vocab)
    common = expected > 5
    counts, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    chi_square = float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 5].sum())
    degrees = int((expected > 5).sum()) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5

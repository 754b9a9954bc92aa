"""Routers, extents, step time and the timeline, each alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from paged_backend.errors import InvalidArgument
from paged_backend.request import Request, SamplingParams
from paged_backend.simulate.names import CONTIGUOUS_MAX, POWER_OF_TWO
from paged_backend.simulate.reservation import (
    Buddy,
    ExtentAllocator,
    FirstFit,
    reserved_tokens,
)
from paged_backend.simulate.router import Fleet, LeastLoaded, PrefixAffinity, RoundRobin
from paged_backend.simulate.shapes import DEVICES, MODELS
from paged_backend.simulate.step_time import MeasuredSteps, Roofline, fit, steps_within, total
from paged_backend.simulate.timeline import Timeline


def request(hashes: list[bytes] | None = None, prompt: int = 10, output: int = 10) -> Request:
    return Request(
        request_id="r",
        token_ids=[0] * prompt,
        num_prompt_tokens=prompt,
        params=SamplingParams(),
        max_total_tokens=prompt + output,
        stop_token_ids=frozenset(),
        seed=0,
        block_hashes=hashes or [],
    )


# ---- routers


def test_round_robin() -> None:
    router, fleet = RoundRobin(), Fleet(3)
    assert [router.choose(request(), fleet) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_loaded() -> None:
    fleet = Fleet(3)
    fleet.tokens[:] = 5, 3, 4
    assert LeastLoaded().choose(request(), fleet) == 1


def test_prefix_affinity_follows_the_longest_known_prefix_unless_it_is_overloaded() -> None:
    router, fleet = PrefixAffinity(factor=1.5, max_blocks=4), Fleet(3)
    fleet.tokens[:] = 10, 0, 20
    assert router.choose(request([b"a", b"b"]), fleet) == 1
    fleet.tokens[:] = 10, 30, 20
    assert router.choose(request([b"a", b"b", b"c"]), fleet) == 1, "not much more loaded"
    assert router.choose(request([b"x"]), fleet) == 0, "unknown: the least loaded"
    fleet.tokens[1] = 36
    assert router.choose(request([b"a"]), fleet) == 0, "overloaded: the prefix moves"
    fleet.tokens[:] = 10, 5, 5
    assert router.choose(request([b"a"]), fleet) == 0
    assert router.choose(request([b"p", b"q", b"r", b"s"]), fleet) == 1
    assert router.choose(request([b"a"]), fleet) == 1, "forgotten, as others were used since"


# ---- extents


@pytest.mark.parametrize("kind", [Buddy, FirstFit])
@pytest.mark.parametrize("num_blocks", [1, 13, 64, 100])
def test_extents_never_overlap_and_memory_is_whole_again(kind: type[Buddy] | type[FirstFit], num_blocks: int) -> None:
    rng = random.Random(num_blocks)
    allocator: ExtentAllocator = kind(num_blocks)
    held: dict[int, int] = {}
    for _ in range(2000):
        if held and rng.random() < 0.5:
            start = rng.choice(list(held))
            allocator.free(start, held.pop(start))
        else:
            size = rng.randint(1, max(1, num_blocks // 2))
            found = allocator.allocate(size)
            if found is not None:
                held[found] = size
        taken = [block for start, size in held.items() for block in range(start, start + size)]
        assert len(set(taken)) == len(taken)
        assert not taken or max(taken) < num_blocks
    for start, size in held.items():
        allocator.free(start, size)
    assert allocator.allocate(1 << (num_blocks.bit_length() - 1)) is not None


def test_fragmentation_is_real() -> None:
    first_fit, buddy = FirstFit(8), Buddy(8)
    at = [first_fit.allocate(2) for _ in range(4)]
    assert at == [0, 2, 4, 6]
    first_fit.free(0, 2)
    first_fit.free(4, 2)
    assert first_fit.allocate(4) is None, "4 are free, but not together"
    first_fit.free(2, 2)
    assert first_fit.allocate(6) == 0
    assert buddy.allocate(5) == 0
    assert buddy.allocate(1) is None, "5 take 8"


def test_what_is_reserved() -> None:
    assert reserved_tokens(CONTIGUOUS_MAX, request(), 2048) == 2048
    assert reserved_tokens(POWER_OF_TWO, request(prompt=100, output=1), 2048) == 101
    assert reserved_tokens(POWER_OF_TWO, request(prompt=100, output=25), 2048) == 132
    assert reserved_tokens(POWER_OF_TWO, request(prompt=100, output=32), 2048) == 132
    assert reserved_tokens(POWER_OF_TWO, request(prompt=100, output=1100), 2048) == 2048


# ---- step time


def test_the_roofline_is_that_of_the_study() -> None:
    for name, floor in (("1b", 0.827e-3), ("8b", 5.01e-3)):
        device = DEVICES["h100"].model_copy(update={"overhead_seconds": 0})
        seconds, growth = Roofline(MODELS[name], device).line(0, 1, 1, 500, 0)
        assert seconds == pytest.approx(floor, rel=0.02)
        assert growth == MODELS[name].kv_bytes_per_token / 3e12
    assert (MODELS["1b"].kv_bytes_per_token, MODELS["8b"].kv_bytes_per_token) == (32 * 1024, 128 * 1024)
    prefill, _ = Roofline(MODELS["8b"], device).line(32 * 2048, 0, 32, 0, 32 * 2048 * 1024)
    assert prefill == pytest.approx(1.19, rel=0.05), "32 prompts of 2048 tokens"


@pytest.mark.parametrize("line", [(1.0, 0.0), (1.0, 0.25), (3e-3, 1e-9), (5e-3, 4.3e-6)])
def test_steps_in_closed_form(line: tuple[float, float]) -> None:
    for steps in (1, 2, 7, 1000):
        assert total(line, steps) == pytest.approx(sum(line[0] + line[1] * i for i in range(steps)))
        assert steps_within(line, total(line, steps)) == steps
        assert steps_within(line, total(line, steps) - 1e-4) == steps
        assert steps_within(line, total(line, steps) + 1e-4) == steps + 1


def test_measured_steps_are_fitted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "steps.csv"
    rows = ["prefill_tokens,decode_rows,kv_tokens,seconds,note"]
    for prefill, decodes, kv in rng.integers(0, 5000, (50, 3)).tolist():
        rows.append(f"{prefill},{decodes},{kv},{0.004 + 2e-5 * prefill + 3e-6 * decodes + 4e-8 * kv},x")
    path.write_text("\n".join(rows))
    found = fit(path)
    assert (found.a, found.b, found.c, found.d) == pytest.approx((0.004, 2e-5, 3e-6, 4e-8), rel=1e-3)


def test_no_fitted_coefficient_is_negative(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    rows = [f"{i},{100 - i},0,{0.01 - i * 1e-5 + 1e-3 * (i % 2)}" for i in range(100)]
    path.write_text("\n".join(["prefill_tokens,decode_rows,kv_tokens,seconds", *rows]))
    found = fit(path)
    assert min(found.a, found.b, found.c, found.d) >= 0


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("a,b\n", "step_time"),
        ("prefill_tokens,decode_rows,kv_tokens,seconds\n1,1,1,1\n", "step_time"),
        ("prefill_tokens,decode_rows,kv_tokens,seconds\n1,1,x,1\n", "kv_tokens"),
        ("prefill_tokens,decode_rows,kv_tokens,seconds\n1,1,1\n", "seconds"),
    ],
)
def test_bad_measurements(tmp_path: Path, text: str, field: str) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        fit(path)
    assert caught.value.field == field
    with pytest.raises(InvalidArgument):
        MeasuredSteps(a=0, b=0, c=0, d=0)


# ---- timeline


def test_a_timeline_keeps_its_integrals_however_long_it_gets() -> None:
    timeline, now = Timeline(), 0.0
    for step in range(5000):
        now, before = now + 0.001 * (1 + step % 100), now
        timeline.add(before, now, (step % 7, 2, 3, 4, 5, 1), step % 2 == 0)
    seconds, series = timeline.series(now)
    width = seconds[1] - seconds[0]
    assert series["waiting"].sum() * width == pytest.approx(2 * now)
    assert series["busy"][:-1] == pytest.approx(np.ones(len(seconds) - 1))
    assert len(seconds) <= 1024
    whole = timeline.memory(20, full=False)
    assert (whole.used, whole.reserved, whole.internal, whole.external) == pytest.approx((3, 4, 5, 8))
    assert whole.waste == pytest.approx(0.75)
    assert timeline.memory(20).seconds < whole.seconds

"""One and more replicas on a clock that can be followed by hand, and against themselves step by step."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import InvalidArgument
from paged_backend.simulate.setup import Setup
from paged_backend.simulate.shapes import DEVICES, MODELS
from paged_backend.simulate.simulation import Run, simulate
from paged_backend.simulate.step_time import MeasuredSteps
from paged_backend.simulate.trace import Trace, burst, generate

SECOND = MeasuredSteps(a=1, b=0, c=0, d=0)


def run(
    trace: Trace,
    step_time: MeasuredSteps | None = SECOND,
    replicas: int = 1,
    router: str = "round-robin",
    fast_forward: bool = True,
    reserve: str = "paged",
    **config: Any,
) -> Run:
    setup = Setup(
        EngineConfig(**{"num_blocks": 1000, "max_num_seqs": 64} | config),
        MODELS["8b"],
        DEVICES["h100"],
        reserve,
        step_time=step_time,
        fast_forward=fast_forward,
    )
    found = simulate(trace, setup, replicas, router)
    outcomes = found.outcomes
    assert outcomes.num_ended == len(trace)
    assert (outcomes.finished ^ outcomes.refused).all(), "a request ended twice, or never"
    for replica in found.replicas:
        assert not replica.scheduler.has_work
        assert replica.scheduler.tables.pool.num_free == setup.num_blocks
        replica.scheduler.tables.check()
        assert not replica._limit.any()
        assert not replica._computed.any()
        assert not replica._num_fresh
        assert not replica._fleet.tokens.any()
        assert not replica._fleet.requests.any()
    return found


def test_one_request() -> None:
    found = run(Trace.of([0.0], 100, 5), MeasuredSteps(a=1, b=0.01, c=0.1, d=0.001))
    # 1 + 100 * 0.01 + 100 * 0.001, then decodes that read 101 .. 104 tokens
    assert found.outcomes.ttft.tolist() == pytest.approx([2.1])
    assert found.outcomes.tpot.tolist() == pytest.approx([1.1 + 0.001 * 102.5])
    assert found.end == pytest.approx(2.1 + 4 * 1.1 + 0.001 * (101 + 102 + 103 + 104))


def test_a_second_request_waits_for_the_running_step_and_shares_the_next() -> None:
    found = run(Trace.of([0.0, 0.5], 100, 5), MeasuredSteps(a=1, b=0.01, c=0.1, d=0))
    assert found.outcomes.first.tolist() == pytest.approx([2.0, 2.0 + 1 + 1 + 0.1])
    assert found.outcomes.ended.tolist() == pytest.approx([4.1 + 3 * 1.2, 4.1 + 3 * 1.2 + 1.1])


def test_an_arrival_cuts_a_row_of_decode_steps_short() -> None:
    found = run(Trace.of([0.0, 10.5, 20.0], 10, [50, 2, 2]))
    assert found.outcomes.first.tolist() == [1.0, 12.0, 21.0]
    assert found.outcomes.ended.tolist() == [50.0, 13.0, 22.0]


def test_a_long_prompt_is_read_in_chunks() -> None:
    found = run(Trace.of([0.0], 100, 3), max_num_batched_tokens=64)
    assert found.outcomes.first.tolist() == [2.0]
    assert found.outcomes.ended.tolist() == [4.0]


def test_a_preempted_request_comes_back_with_its_tokens() -> None:
    # Each needs 3 blocks at first and 5 in the end, of 6. When both lack a fourth, at 5 s, the second gives its three
    # up, which stay cached; the first takes two of them for itself and ends at 12 s. Then the second finds its first
    # block, computes its other 9 tokens and makes its 6th to 12th token.
    found = run(Trace.of([0.0, 0.0], 8, 12), num_blocks=6, block_size=4)
    outcomes = found.outcomes
    assert outcomes.preemptions.tolist() == [0, 1]
    assert outcomes.first.tolist() == [1.0, 1.0]
    assert outcomes.ended.tolist() == [12.0, 19.0]


def test_a_preempted_request_is_swapped_where_there_is_host_memory() -> None:
    block = 4 * MODELS["8b"].kv_bytes_per_token
    config = {"num_blocks": 6, "block_size": 4, "swap_space_bytes": 10 * block, "preemption_policy": "swap"}
    found = run(Trace.of([0.0, 0.0], 8, 12), **config)
    assert found.replicas[0].scheduler.num_swapped == 1
    assert found.replicas[0].scheduler.host is not None
    assert found.replicas[0].scheduler.host.num_fetched > 0
    assert found.outcomes.ended[1] == pytest.approx(19.0, abs=0.01)


def test_what_cannot_be_served_is_refused() -> None:
    found = run(Trace.of([0, 0, 0, 0.0], [10, 200, 10, 10], [5, 5, 500, 5]), max_model_len=100, max_waiting=2)
    outcomes = found.outcomes
    assert outcomes.refused.tolist() == [False, True, False, True], "too long, and too many"
    assert outcomes.output.tolist()[2] == 90, "the context ends it"


def test_a_prefix_is_computed_once() -> None:
    trace = Trace.of([0.0, 10.0, 20.0], 40, 2, prefix=[7, 7, 8], prefix_tokens=34)
    steps = MeasuredSteps(a=0.1, b=0.01, c=0, d=0)
    found = run(trace, steps, block_size=16)
    assert found.outcomes.cached.tolist() == [0, 32, 0]
    assert found.outcomes.ttft.tolist() == pytest.approx([0.5, 0.18, 0.5])
    assert not run(trace, steps, enable_prefix_caching=False).outcomes.cached.any()


POLICIES = ["fcfs", "priority", "shortest-remaining", "fair-share"]


@pytest.mark.parametrize("seed", range(24))
def test_fast_forward_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    count = 120
    lengths = np.random.default_rng(seed)
    trace = Trace.of(
        np.cumsum(lengths.exponential(rng.choice([0.5, 3, 20]), count)) if seed % 4 else np.zeros(count),
        lengths.integers(1, 60, count) + 20,
        lengths.integers(1, 40, count),
        tenant=lengths.integers(0, 2, count),
        prefix=lengths.integers(-1, 3, count),
        prefix_tokens=20,
        priority=lengths.integers(-1, 2, count),
        tenants=("a", "b"),
    )
    config: dict[str, Any] = {
        "num_blocks": rng.choice([30, 60, 400]),
        "block_size": rng.choice([4, 8]),
        "max_num_seqs": rng.choice([3, 16]),
        "max_num_batched_tokens": rng.choice([16, 64]),
        "scheduling_policy": POLICIES[seed % 4],
        "swap_space_bytes": rng.choice([0, 100 * 2**20]),
        "ageing_seconds": 5,
    }
    reserve = rng.choice(["paged", "paged", "power-of-two"])
    replicas, router = rng.choice([(1, "round-robin"), (3, "least-loaded"), (3, "prefix-affinity")])
    steps = MeasuredSteps(a=1, b=0.01, c=0.02, d=rng.choice([0, 0.001]))
    fast, slow = (
        run(trace, steps, replicas, router, fast_forward, reserve, **config) for fast_forward in (True, False)
    )
    for name in ("replica", "preemptions", "cached", "refused"):
        assert getattr(fast.outcomes, name).tolist() == getattr(slow.outcomes, name).tolist(), name
    for name in ("started", "first", "ended"):
        np.testing.assert_allclose(getattr(fast.outcomes, name), getattr(slow.outcomes, name), rtol=1e-9)
    planned = [sum(replica.scheduler.tables._planned for replica in found.replicas) for found in (fast, slow)]
    assert planned[0] <= planned[1]
    for full in (True, False):
        a, b = fast.timeline.memory(1000, full), slow.timeline.memory(1000, full)
        assert a.seconds == pytest.approx(b.seconds, rel=0.05, abs=5)
        assert a.running == pytest.approx(b.running, rel=0.05, abs=0.2)


def test_fast_forward_is_fast() -> None:
    found = run(Trace.of([0.0, 2000.0], 10, [1000, 10]), num_blocks=5000)
    assert found.outcomes.ended.tolist() == [1000.0, 2010.0]
    assert found.replicas[0].scheduler.tables._planned < 20


def test_equal_seeds_equal_results() -> None:
    first, second = (
        run(generate(500, 30, seed=3, prefixes=5, prefix_tokens=64), None, 4, "prefix-affinity") for _ in range(2)
    )
    assert first.outcomes.ended.tolist() == second.outcomes.ended.tolist()
    assert first.outcomes.replica.tolist() == second.outcomes.replica.tolist()
    assert generate(10, 30, seed=3).arrival.tolist() != generate(10, 30, seed=4).arrival.tolist()


def test_a_thousand_replicas() -> None:
    found = run(generate(3000, 20_000, seed=1), None, 1000, "least-loaded", num_blocks=200)
    assert len(set(found.outcomes.replica.tolist())) > 900


def test_memory_of_three_reservations_at_saturation() -> None:
    trace = generate(1500, float("inf"))
    config = {"num_blocks": 4096, "max_model_len": 2048, "max_num_seqs": 512}
    memory = {}
    for reserve in ("paged", "contiguous-max", "power-of-two"):
        found = run(trace, None, reserve=reserve, **config)
        memory[reserve] = use = found.timeline.memory(4096 * 16)
        assert use.seconds > 0
        assert use.used + use.reserved + use.internal + use.external == pytest.approx(use.capacity)
        assert min(use.used, use.reserved, use.internal, use.external) > -1e-6
    assert memory["paged"].waste < 0.04
    assert memory["contiguous-max"].waste > 0.6
    assert memory["power-of-two"].waste > 0.3
    assert memory["contiguous-max"].running == pytest.approx(4096 * 16 / 2048, rel=0.02)
    assert memory["paged"].running > 3.5 * memory["contiguous-max"].running
    assert memory["paged"].running > 2 * memory["power-of-two"].running


def test_a_noisy_neighbour_is_kept_apart_by_fair_share() -> None:
    quiet = generate(600, 10, seed=1)._with(tenants=("quiet",))
    noisy = quiet.and_also(burst(1000, 8192, 16, at=5.0))
    config: dict[str, Any] = {
        "optimize_for": "latency",
        "max_model_len": 16384,
        "num_blocks": 20_000,
        "max_num_seqs": 256,
    }

    def p99(trace: Trace, policy: str) -> float:
        outcomes = run(trace, None, scheduling_policy=policy, **config).outcomes
        return float(np.percentile(outcomes.ttft[trace.tenant == trace.tenants.index("quiet")], 99))

    alone = p99(quiet, "fair-share")
    assert p99(noisy, "fair-share") <= 2 * alone
    assert p99(noisy, "fcfs") > 100 * alone


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"num_blocks": 4, "max_model_len": 100}, "max_model_len"),
        ({"timeout": 1}, "timeout"),
        ({"dtype": "float32"}, "dtype"),
    ],
)
def test_configurations_that_cannot_be_simulated(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        run(Trace.of([0.0], 1, 1), **config)
    assert caught.value.field == field


def test_bad_arguments() -> None:
    trace = Trace.of([0.0], 1, 1)
    for arguments, field in (
        ({"replicas": 0}, "replicas"),
        ({"router": "x"}, "router"),
        ({"reserve": "x"}, "reserve"),
        ({"scheduling_policy": "x"}, "scheduling_policy"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            run(trace, **arguments)
        assert caught.value.field == field


def test_no_torch() -> None:
    code = "import paged_backend.simulate.commands, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

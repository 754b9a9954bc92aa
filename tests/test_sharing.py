"""What requests share, give back and get again in the real engine: prefixes, samples, swapped blocks, time."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from paged_backend import (
    DeadlineExceeded,
    Engine,
    EngineConfig,
    InvalidArgument,
    RequestOptions,
    RequestOutput,
    SamplingParams,
)
from tests.runner.test_parity import random_prompts
from tests.tiny import build

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make() -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make_engine(family: str = "llama", **config: Any) -> Engine:
        fields = {"block_size": 4, "num_blocks": 400, "max_num_seqs": 16, "max_num_batched_tokens": 128} | config
        engines.append(Engine(EngineConfig(**fields), model=build(family)))
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.tables.check()
        engine.close()


def greedy(length: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, **fields)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def all_free(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)


# ---- prefixes


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])
@pytest.mark.parametrize("budget", [128, 16])
def test_a_common_prefix_is_computed_once_and_changes_nothing(make: MakeEngine, family: str, budget: int) -> None:
    (prefix,) = random_prompts(1, 1, 128, seed=1)
    prefix = prefix * 40
    prompts = [prefix + tail for tail in random_prompts(16, 8, 128, seed=2)]
    off = make(family, enable_prefix_caching=False, max_num_batched_tokens=budget)
    on = make(family, max_num_batched_tokens=budget)
    want = off.generate(prompts, greedy(8))
    got = on.generate(prompts, greedy(8))
    assert tokens(got) == tokens(want)
    decoded = 16 * 7
    assert off.stats().computed_tokens == sum(map(len, prompts)) + decoded
    assert on.stats().computed_tokens == 40 + sum(len(prompt) - 40 for prompt in prompts) + decoded
    assert [output.num_cached_tokens for output in got] == [0] + [40] * 15
    assert [output.num_cached_tokens for output in want] == [0] * 16
    again = on.generate(prompts, greedy(8))
    assert tokens(again) == tokens(want)
    assert all(output.num_cached_tokens >= 40 for output in again)
    all_free(on)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_next_turn_of_a_conversation_finds_the_turns_before(make: MakeEngine, family: str) -> None:
    engine, fresh = make(family), make(family, enable_prefix_caching=False)
    conversation = [5, 6, 7] * 4
    for turn in range(4):
        (output,) = engine.generate([conversation], greedy(9))
        assert tokens([output]) == tokens(fresh.generate([conversation], greedy(9)))
        assert output.num_cached_tokens >= (len(conversation) - 5) // 4 * 4 * (turn > 0)
        conversation += [*output.token_ids, 9, 10, 11]


def test_salts_and_the_switch_keep_requests_apart(make: MakeEngine) -> None:
    engine = make()
    for salt, cached in (("a", 0), ("a", 28), ("b", 0), (None, 0), (None, 28)):
        (output,) = engine.generate([[7] * 30], greedy(2), RequestOptions(cache_salt=salt))
        assert output.num_cached_tokens == cached
    off = make(enable_prefix_caching=False)
    assert [output.num_cached_tokens for output in off.generate([[7] * 30] * 2, greedy(2))] == [0, 0]
    salted = off.generate([[7] * 30] * 2, greedy(2), RequestOptions(cache_salt="one call"))
    assert [output.num_cached_tokens for output in salted] == [0, 28]


def test_tenants_may_be_isolated(make: MakeEngine) -> None:
    isolated, shared = make(isolate_tenants=True), make()
    pairs = [(tenant, salt) for tenant in ("", "a", "b") for salt in (None, "a", "b")]
    for engine, cached in ((isolated, [0] * 9 + [28] * 9), (shared, [0] * 3 + [28] * 15)):
        for (tenant, salt), count in zip(pairs * 2, cached, strict=True):
            (output,) = engine.generate([[7] * 30], greedy(2), RequestOptions(tenant=tenant, cache_salt=salt))
            assert output.num_cached_tokens == count


def test_changed_weights_need_a_reset_and_get_it(make: MakeEngine) -> None:
    engine = make()
    prompt = [7, 8, 9] * 10
    (before,) = engine.generate([prompt], greedy(8))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.mul_(1.5)
    engine.reset_prefix_cache()
    (after,) = engine.generate([prompt], greedy(8))
    assert after.num_cached_tokens == 0
    assert after.token_ids != before.token_ids
    (again,) = engine.generate([prompt], greedy(8))
    assert again.token_ids == after.token_ids


@pytest.mark.parametrize("swap", ["0", "1MiB"])
def test_nobody_finds_what_was_computed_before_a_reset(make: MakeEngine, swap: str) -> None:
    engine = make(num_blocks=25, max_model_len=80, swap_space_bytes=swap, preemption_policy="swap")
    prompt = list(range(10, 26))
    engine.add_request(prompt, greedy(40))
    made = [token for _ in range(3) for output in engine.step() for token in output.token_ids]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(9)
        for parameter in engine.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    engine.reset_prefix_cache()
    while engine.has_work:
        made += [token for output in engine.step() for token in output.token_ids]
    whole = [*prompt, *made][:50]
    engine.generate([whole[:18]], greedy(2))  # its blocks must not lead to the old ones behind them
    (got,) = engine.generate([whole], greedy(8))
    (want,) = engine.generate([whole], greedy(8), RequestOptions(cache_salt="fresh"))
    assert got.token_ids == want.token_ids
    assert 0 < got.num_cached_tokens < 24


@pytest.mark.parametrize("beams", [1, 4])
def test_nan_of_one_request_never_reaches_another(make: MakeEngine, beams: int) -> None:
    for family in ("llama", "mistral"):
        engine = make(family, num_blocks=80, max_num_batched_tokens=16)
        prompts = [[20 + index] * 33 for index in range(12)]
        want = engine.generate(prompts, greedy(4))
        with torch.no_grad():
            engine.model.get_input_embeddings().weight[100] = float("nan")
        bad = [5, 6, 100] + [9] * 80
        engine.generate([bad], SamplingParams(max_tokens=8, beam_width=beams))
        engine.add_request(bad, request_id="gone")
        engine.step()
        engine.abort("gone")
        engine.reset_prefix_cache()
        got = [engine.generate([prompt], greedy(4))[0] for prompt in prompts]
        assert [output.error for output in got] == [None] * len(prompts)
        assert tokens(got) == tokens(want)


# ---- samples of one prompt


def test_samples_share_their_prompt(make: MakeEngine) -> None:
    for caching in (True, False):
        engine = make(enable_prefix_caching=caching)
        prompt = random_prompts(1, 1, 128)[0] * 121
        used = {}
        for n in (1, 4):
            engine.add_request(prompt, SamplingParams(n=n, max_tokens=2, ignore_eos=True))
            engine.step()
            used[n] = engine.stats().blocks_used
            while engine.has_work:
                engine.step()
        assert used[1] == 31
        assert used[4] <= 31 + 3 < 1.2 * used[1]
        all_free(engine)


def test_samples_differ_repeat_and_come_in_order(make: MakeEngine) -> None:
    engine = make()
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True)
    (output,) = engine.generate([[5, 6, 7]], params)
    assert [sample.index for sample in output.samples] == [0, 1, 2]
    assert all(sample.num_output_tokens == 12 for sample in output.samples)
    assert len({tuple(sample.token_ids) for sample in output.samples}) == 3
    assert output.token_ids == output.samples[0].token_ids
    (single,) = engine.generate([[5, 6, 7]], params.model_copy(update={"n": 1}))
    assert single.token_ids == output.token_ids
    crowd = engine.generate([[9] * 20, [5, 6, 7]], [greedy(20), params])
    assert tokens(list(crowd[1].samples)) == tokens(list(output.samples))


def test_a_stream_of_samples_finishes_once(make: MakeEngine) -> None:
    engine = make()
    parts = list(engine.stream([5, 6, 7], SamplingParams(n=3, max_tokens=6, seed=1, ignore_eos=True)))
    assert [part.finished for part in parts] == [False] * 17 + [True]
    assert sum(part.finish_reason == "length" for part in parts) == 3
    request_id = engine.add_request([5, 6, 7], SamplingParams(n=3, max_tokens=6, ignore_eos=True))
    engine.step()
    assert engine.abort(request_id)
    last = engine.step()
    assert [(part.finish_reason, part.finished) for part in last] == [("abort", False)] * 2 + [("abort", True)]
    all_free(engine)


@pytest.mark.parametrize(("field", "value"), [("options", {"priority": 1}), ("params", {"n": 1})])
def test_a_dictionary_is_no_object(make: MakeEngine, field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"{field}=.*: must be a "):
        make().generate([[5]], **{field: value})


def test_more_samples_than_slots_are_refused(make: MakeEngine) -> None:
    with pytest.raises(InvalidArgument, match="n=5: at most max_num_seqs=4"):
        make(max_num_seqs=4).generate([[5]], SamplingParams(n=5))


# ---- preemption


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("policy", ["recompute", "swap", "auto"])
def test_a_cache_ten_times_too_small_finishes_every_request_alike(make: MakeEngine, family: str, policy: str) -> None:
    prompts, params = random_prompts(12, 60, 128, seed=3), greedy(40)
    want = make(family).generate(prompts, params)
    engine = make(
        family,
        num_blocks={"llama": 25, "gemma2": 50}[family],
        max_num_batched_tokens=24,
        max_num_seqs=12,
        max_model_len=100,
        preemption_policy=policy,
        swap_space_bytes="1MiB",
    )
    got = engine.generate(prompts, params)
    assert tokens(got) == tokens(want)
    stats = engine.stats()
    assert stats.preemptions > 0
    if policy == "swap":
        assert stats.swapped > 0
        assert stats.blocks_fetched > 0
    if policy == "recompute":
        assert stats.swapped == stats.blocks_stored == 0
    all_free(engine)


def test_evicted_prefixes_come_back_from_the_host(make: MakeEngine) -> None:
    engine = make(num_blocks=24, max_model_len=90, swap_space_bytes="1MiB", preemption_policy="swap")
    prompts = [[token] * 80 for token in (5, 6, 7)]
    want = [engine.generate([prompt], greedy(6))[0] for prompt in prompts]
    again = [engine.generate([prompt], greedy(6))[0] for prompt in prompts]
    assert tokens(again) == tokens(want)
    assert [output.num_cached_tokens for output in again] == [76] * 3
    assert engine.stats().blocks_fetched > 0


def test_swap_space_must_hold_a_block_and_fit(make: MakeEngine) -> None:
    for size in (10, "900TiB"):
        with pytest.raises(InvalidArgument, match="swap_space_bytes="):
            make(swap_space_bytes=size)


def test_the_cheaper_way_is_taken() -> None:
    from paged_backend.scheduler.preemption import LowestRanked, PreemptionCosts

    costs = PreemptionCosts(seconds_per_token=1e-4, bytes_per_second=1e9, bytes_per_token=100_000)
    assert LowestRanked(swap=None).swaps(100, costs) is False, "200 us a token against 100 us"
    costs.bytes_per_second = 4e9
    assert LowestRanked(swap=None).swaps(100, costs) is True


# ---- time


def test_a_request_that_waits_too_long_ends_alone(make: MakeEngine) -> None:
    engine = make(max_num_seqs=1)
    running = engine.add_request([5], greedy(60))
    engine.step()
    late = engine.add_request([6], greedy(5), RequestOptions(queue_timeout=0.01))
    patient = engine.add_request([7], greedy(5))
    time.sleep(0.02)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_work:
        outputs |= {output.request_id: output for output in engine.step() if output.finished}
    assert isinstance(outputs[late].error, DeadlineExceeded)
    assert "queue_timeout=0.01: the request was ended after 0.0" in str(outputs[late].error)
    assert [outputs[request_id].finish_reason for request_id in (running, late, patient)] == [
        "length",
        "error",
        "length",
    ]
    all_free(engine)


def test_a_request_that_takes_too_long_keeps_what_it_has(make: MakeEngine) -> None:
    engine = make(timeout=0.05)
    limited, free = engine.generate([[5]], greedy(200))[0], engine.generate([[5]], greedy(3))[0]
    assert isinstance(limited.error, DeadlineExceeded)
    assert 0 < limited.num_output_tokens == len(limited.token_ids) < 200
    assert free.finish_reason == "length"
    engine.add_request([5], greedy(100), RequestOptions(queue_timeout=0.01, timeout=1000), request_id="started")
    engine.step()
    time.sleep(0.02)
    assert all(output.error is None for output in engine.step()), "the time in the queue is over, and it is not in it"


def test_deadlines_of_ended_requests_are_forgotten(make: MakeEngine) -> None:
    engine = make(timeout=1000)
    engine.generate([[5]] * 300, greedy(2))
    engine.generate([[5]], greedy(2))
    assert len(engine._deadlines) <= 70


# ---- tenants


def test_a_noisy_tenant_does_not_make_a_quiet_one_wait(make: MakeEngine) -> None:
    """In steps, which do not depend on the machine: a quiet request beside 200 long ones of another tenant."""

    def steps_to_first_token(policy: str, noise: int) -> list[int]:
        engine = make(scheduling_policy=policy, max_num_seqs=8, max_num_batched_tokens=32, num_blocks=600)
        for prompt in random_prompts(noise, 100, 128, seed=4):
            engine.add_request(prompt, greedy(40), RequestOptions(tenant="noisy"))
        waits = []
        for at in range(10):
            for _ in range(7):
                engine.step()
            request_id = engine.add_request([at + 3] * 12, greedy(4), RequestOptions(tenant="quiet"))
            waits.append(1)
            while not any(output.request_id == request_id for output in engine.step()):
                waits[-1] += 1
        engine.close()
        return waits

    assert max(steps_to_first_token("fair-share", 0)) == 1
    # Its share used up, it waits for one long prompt of the other at most.
    assert max(steps_to_first_token("fair-share", 100)) <= 1 + 100 / (32 - 8)
    assert max(steps_to_first_token("fcfs", 100)) > 100


def test_ctrl_c_anywhere_in_a_step_loses_nothing(make: MakeEngine) -> None:
    """A real SIGINT at a random line of the planning and the books; the step is done, or done again."""
    watched = ("scheduler.py", "beam.py", "block_pool.py", "block_tables.py", "prefix_cache.py", "host_tier.py")
    rng = random.Random(3)

    def run(interrupts: bool) -> dict[tuple[str, int], list[int]]:
        engine = make(num_blocks=30, max_num_seqs=6, max_num_batched_tokens=32, swap_space_bytes="200KiB")
        engine.add_request([5, 6, 7, 8, 9, 10, 11], greedy(12), request_id="one")
        engine.add_request([5, 6, 7, 8, 9, 10, 12], SamplingParams(beam_width=3, max_tokens=12), request_id="beams")
        engine.add_request([5, 6, 7, 8, 30, 10, 12], greedy(12, n=2), request_id="two")
        made: dict[tuple[str, int], list[int]] = {}
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith(watched):
                return None
            lines -= event == "line"
            if lines == 0:
                signal.raise_signal(signal.SIGINT)
            return trace

        while engine.has_work:
            lines = rng.randint(1, 500)
            try:
                if interrupts and rng.random() < 0.5:
                    sys.settrace(trace)
                outputs = engine.step()
            except KeyboardInterrupt:
                continue
            finally:
                sys.settrace(None)
            for output in outputs:
                made.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        all_free(engine)
        engine.tables.check()
        return made

    want = run(False)
    for _ in range(40):
        assert run(True) == want


def test_everything_at_once_loses_nothing(make: MakeEngine) -> None:
    rng = random.Random(11)
    engine = make(
        num_blocks=70,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_model_len=90,
        swap_space_bytes="100KiB",
        preemption_policy="swap",
        scheduling_policy="priority",
        ageing_seconds=0.01,
    )
    reference = make(enable_prefix_caching=False)
    families = random_prompts(3, 40, 128, seed=5)
    open_requests: dict[str, tuple[list[int], SamplingParams]] = {}
    got: dict[str, list[RequestOutput]] = {}
    ended: set[str] = set()

    def step() -> None:
        for output in engine.step():
            assert output.request_id not in ended, "an output after the last"
            got[output.request_id].append(output)
            if output.finished:
                ended.add(output.request_id)
        engine.tables.check()

    for _ in range(400):
        action = rng.random()
        if action < 0.25:
            prompt = [*rng.choice(families), *random_prompts(1, 8, 128, seed=rng.randrange(99))[0]]
            params = rng.choice(
                [greedy(rng.randint(1, 30)), greedy(9, n=2), SamplingParams(beam_width=3, max_tokens=6)]
            )
            timeout = rng.choice([None, None, None, 0.02])
            options = RequestOptions(priority=rng.randint(0, 2), timeout=timeout)
            request_id = engine.add_request(prompt, params, options)
            open_requests[request_id], got[request_id] = (prompt, params), []
        elif action < 0.3 and open_requests.keys() - ended:
            engine.abort(rng.choice(sorted(open_requests.keys() - ended)))
        else:
            step()
    while engine.has_work:
        step()
    assert ended == open_requests.keys()
    stats = engine.stats()
    assert stats.swapped > 0
    assert stats.cached_tokens > 0
    whole = [key for key in ended if all(output.finish_reason not in ("abort", "error") for output in got[key])]
    assert len(whole) > 30
    wanted = reference.generate(*map(list, zip(*(open_requests[key] for key in whole), strict=True)))
    for key, want in zip(whole, wanted, strict=True):
        one = [token for output in got[key] if output.index == 0 for token in output.token_ids]
        assert one == want.token_ids
    all_free(engine)

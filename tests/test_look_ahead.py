"""The engine one step ahead of its device: the same tokens as without, and nothing lost, whatever happens meanwhile."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from paged_backend import Engine, EngineConfig, EngineDead, RequestOptions, RequestOutput, SamplingParams
from paged_backend.beam import Candidates
from paged_backend.plugins import hookimpl
from paged_backend.request import Request
from paged_backend.runner.runner import ModelRunner
from paged_backend.scheduler.plan import StepPlan
from paged_backend.stats import StepStats
from tests.tiny import build


class LateRunner:
    """A device that runs nothing before it is waited for, on what the host told it at the launch."""

    asynchronous = True

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.tables = runner, runner.tables
        self.queue: deque[LateStep] = deque()
        self.plans: list[StepPlan] = []
        self.events: list[tuple[str, int]] = []
        """("launch" or "wait", number of the step), in order."""
        self.raises: dict[tuple[str, int], BaseException] = {}
        """What to raise, once, where."""

    def happens(self, event: str, number: int) -> None:
        self.events.append((event, number))
        error = self.raises.pop((event, number), None)
        if error is not None:
            raise error

    def close(self) -> None:
        self.runner.close()

    def launch(self, plan: StepPlan) -> LateStep:
        self.plans.append(plan)
        self.happens("launch", len(self.plans))
        told = dataclasses.replace(plan, loads=list(map(copied, plan.loads)), sampling=list(map(copied, plan.sampling)))
        array = self.tables.array.copy()
        self.queue.append(LateStep(self, len(self.plans), told, array))
        return self.queue[-1]


def copied(request: Request) -> Request:
    return dataclasses.replace(request, token_ids=list(request.token_ids))


@dataclasses.dataclass
class LateStep:
    device: LateRunner
    number: int
    plan: StepPlan
    tables: Any
    tokens: list[int | Candidates] | None = None

    def wait(self) -> list[int | Candidates]:
        self.device.happens("wait", self.number)
        while self.tokens is None:
            self.device.queue.popleft().run()
        return self.tokens

    def scores(self) -> list[Any]:
        return []

    def run(self) -> None:
        runner = self.device.runner
        runner.tables = SimpleNamespace(array=self.tables, block_size=runner.tables.block_size)  # type: ignore[assignment]
        self.tokens = runner.launch(self.plan).wait()


MakeEngine = Callable[..., tuple[Engine, LateRunner]]


@pytest.fixture
def make(byte_tokenizer: PreTrainedTokenizerFast) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make_engine(
        family: str = "llama", *, plugins: list[object] | None = None, **config: Any
    ) -> tuple[Engine, LateRunner]:
        fields = {"block_size": 4, "num_blocks": 400, "max_num_seqs": 8, "max_num_batched_tokens": 64} | config
        model = build(family, vocab_size=len(byte_tokenizer), tie_word_embeddings=False).double()  # no near-ties
        engine = Engine(EngineConfig(**fields), model=model, tokenizer=byte_tokenizer, plugins=plugins or [])
        runner = LateRunner(engine._runner)
        engine._runner = runner  # type: ignore[assignment]
        engines.append(engine)
        return engine, runner

    yield make_engine
    for engine in engines:
        idle(engine)
        engine.close()


def greedy(length: int, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": length, "ignore_eos": True} | fields)


def idle(engine: Engine) -> None:
    """Nothing runs, waits, is in flight or holds a block."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    assert not engine._in_flight
    assert engine.tables.num_free_slots == engine.config.max_num_seqs
    engine.tables.check()


def drive(engine: Engine) -> dict[str, list[int]]:
    """Step until all is done, through interrupts; the tokens of every request."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        try:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        except KeyboardInterrupt:
            assert not engine._in_flight
        engine.tables.check()
    return tokens


# ---- order


def test_each_step_is_launched_before_the_one_before_is_waited_for(make: MakeEngine) -> None:
    engine, runner = make()
    engine.add_request("hello", greedy(4))
    assert [len(engine.step()) for _ in range(4)] == [1] * 4
    order = [("launch", 1)]
    for number in range(1, 4):
        order += [("launch", number + 1), ("wait", number)]
    # The last token was known to be the last: nothing was left for a fifth step to run.
    assert runner.events == [*order, ("launch", 5), ("wait", 4), ("wait", 5)]
    assert [len(plan.slots) for plan in runner.plans] == [1] * 4 + [0]
    assert engine.stats().steps == 4


def test_a_stop_is_known_a_step_late_and_what_ran_too_far_is_dropped(make: MakeEngine) -> None:
    engine, runner = make()
    (free,) = engine.generate(["hello"], greedy(12))
    at = next(at for at in range(3, 12) if free.token_ids[at] not in free.token_ids[:at])
    first = len(runner.plans)
    engine.add_request("hello", greedy(12, stop_token_ids=[free.token_ids[at]]), request_id="hello")
    assert drive(engine) == {"hello": free.token_ids[: at + 1]}
    assert [len(plan.slots) for plan in runner.plans[first:]] == [1] * (at + 2)
    idle(engine)  # though nobody asks for another step


def test_every_step_brings_something_when_requests_wait_for_one_slot(make: MakeEngine) -> None:
    engine, _ = make(max_num_seqs=1)
    for _ in range(4):
        engine.add_request("hello", greedy(2))
    assert [len(engine.step()) for _ in range(8)] == [1] * 8


class Processor:
    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: torch.Tensor, requests: list[Request]) -> None:
            for row, request in enumerate(requests):
                logits[row, request.token_ids[-1]] = float("-inf")

        return process


@pytest.mark.parametrize("reason", ["switched off", "logits processor", "beams"])
def test_nothing_is_launched_ahead_of_tokens_that_a_step_needs(make: MakeEngine, reason: str) -> None:
    engine, runner = make(
        look_ahead=reason != "switched off", plugins=[Processor()] if reason == "logits processor" else []
    )
    engine.add_request("hello", SamplingParams(max_tokens=6, beam_width=3) if reason == "beams" else greedy(6))
    engine.add_request("other", greedy(6))
    drive(engine)
    assert runner.events == [(event, number) for number in range(1, 7) for event in ("launch", "wait")]


def test_a_beam_search_that_arrives_waits_for_what_is_in_flight(make: MakeEngine) -> None:
    engine, runner = make()
    want = engine.generate(["hello", "beams"], [greedy(20), SamplingParams(max_tokens=6, beam_width=3)])
    tokens = {engine.add_request("hello", greedy(20), request_id="hello"): list[int]()}
    engine.step()
    assert len(engine._in_flight) == 1
    engine.add_request("beams", SamplingParams(max_tokens=6, beam_width=3), request_id="beams")
    runner.events.clear()
    engine.step()
    engine.step()
    assert [event for event, _ in runner.events] == ["wait", "launch", "wait"]
    tokens = drive(engine)
    assert tokens["beams"] == want[1].token_ids
    assert tokens["hello"] == want[0].token_ids[3:]


# ---- the same tokens


def random_params(rng: random.Random) -> SamplingParams:
    length = rng.randint(1, 24)
    fields: dict[str, Any] = {"max_tokens": length, "ignore_eos": rng.random() < 0.5, "n": rng.choice([1, 1, 1, 2])}
    fields |= rng.choice([{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 3.0}])
    fields["seed"] = rng.randrange(1000)
    if rng.random() < 0.4:
        fields["stop_token_ids"] = rng.sample(range(3, 259), 40)
    if rng.random() < 0.3:
        fields["min_tokens"] = rng.randint(0, length)
    if rng.random() < 0.3:
        fields["stop"] = rng.sample("abcdefghijklmnopqrstuvwxyz0123456789 ", 5)
    if rng.random() < 0.1:
        return SamplingParams(beam_width=3, n=rng.randint(1, 2), max_tokens=min(length, 6))
    return SamplingParams(**fields)


@pytest.mark.parametrize(
    "config",
    [
        {"num_blocks": 400},
        {"num_blocks": 22, "preemption_policy": "recompute"},
        {"num_blocks": 22, "preemption_policy": "swap", "swap_space_bytes": "100KiB"},
        {"num_blocks": 28, "scheduling_policy": "priority", "ageing_seconds": 0.01, "max_num_seqs": 4},
        {"family": "gemma2", "num_blocks": 60, "scheduling_policy": "fair-share", "max_num_batched_tokens": 16},
    ],
)
def test_random_mixes_get_the_tokens_they_get_without(make: MakeEngine, config: dict[str, Any]) -> None:
    engine, runner = make(**{"max_model_len": 80} | config)
    plain, _ = make(config.get("family", "llama"), look_ahead=False, enable_prefix_caching=False)
    for seed in range(6):
        check_random_mix(engine, plain, random.Random(seed))
        idle(engine)
    assert engine.stats().preemptions > 0 or config["num_blocks"] == 400
    assert engine.stats().cached_tokens > 0
    waits = [number for event, number in runner.events if event == "wait"]
    assert waits == sorted(waits) == list(range(1, len(runner.plans) + 1))
    ahead = [before for before, after in zip(runner.events, runner.events[1:], strict=False) if before[0] == after[0]]
    assert ahead, "the engine never was a step ahead"


def check_random_mix(engine: Engine, plain: Engine, rng: random.Random) -> None:
    families = [[rng.randrange(3, 259) for _ in range(30)] for _ in range(3)]
    asked: dict[str, tuple[list[int], SamplingParams]] = {}
    got: dict[str, dict[int, list[RequestOutput]]] = {}
    ended: set[str] = set()

    def step() -> None:
        for output in engine.step():
            assert output.request_id not in ended, "an output after the last"
            parts = got[output.request_id].setdefault(output.index, [])
            assert not parts or parts[-1].finish_reason is None
            parts.append(output)
            if output.finished:
                ended.add(output.request_id)
        engine.tables.check()

    for _ in range(60):
        action = rng.random()
        if action < 0.3:
            prompt = [*rng.choice(families)[: rng.randint(0, 30)], rng.randrange(3, 259)]
            params = random_params(rng)
            options = RequestOptions(
                priority=rng.randint(0, 2),
                tenant=rng.choice("ab"),
                timeout=rng.choice([None, None, None, 0.01]),
            )
            request_id = engine.add_request(prompt, params, options)
            asked[request_id], got[request_id] = (prompt, params), {}
        elif action < 0.36 and asked.keys() - ended:
            engine.abort(rng.choice(sorted(asked.keys() - ended)))
        elif action < 0.37:
            engine.reset_prefix_cache()
        else:
            step()
    while engine.has_work:
        step()
    assert ended == asked.keys()
    wants = plain.generate([prompt for prompt, _ in asked.values()], [params for _, params in asked.values()])
    for outputs, want in zip((got[request_id] for request_id in asked), wants, strict=True):
        for index, parts in outputs.items():
            whole = (want.samples or (want,))[index]
            tokens = [token for part in parts for token in part.token_ids]
            text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
            if reason in ("abort", "error"):
                assert tokens == whole.token_ids[: len(tokens)]
            else:
                assert (tokens, text, reason) == (whole.token_ids, whole.text, whole.finish_reason)


def test_no_stop_before_min_tokens_though_the_tokens_before_are_in_flight(make: MakeEngine) -> None:
    engine, _ = make()
    (free,) = engine.generate(["hello"], greedy(8))
    stops = sorted(set(free.token_ids))
    for least in range(8):
        (output,) = engine.generate(["hello"], greedy(8, stop_token_ids=stops, min_tokens=least))
        assert output.num_output_tokens > least
        assert not set(output.token_ids[:least]) & set(stops)
        assert output.token_ids[-1] in stops or output.finish_reason == "length"


def test_an_id_used_again_gets_no_token_of_the_one_before(make: MakeEngine) -> None:
    engine, _ = make()
    (want,) = engine.generate(["second"], greedy(5))
    engine.add_request("first", greedy(20), request_id="mine")
    engine.step()
    engine.abort("mine")
    engine.add_request("second", greedy(5), request_id="mine")
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.finish_reason for output in outputs] == ["abort", None, None, None, None, "length"]
    assert [token for output in outputs[1:] for token in output.token_ids] == want.token_ids


def test_a_deadline_with_tokens_in_flight(make: MakeEngine) -> None:
    engine, _ = make()
    engine.add_request("hello", greedy(100), RequestOptions(timeout=0.05))
    outputs = engine.step()
    time.sleep(0.06)
    outputs += engine.step()
    assert [(output.finish_reason, output.num_output_tokens) for output in outputs] == [(None, 1), ("error", 1)]
    idle(engine)


# ---- whole requests, and the end


def test_leaving_a_stream_and_closing_wait_for_what_is_in_flight(make: MakeEngine) -> None:
    engine, runner = make()
    for output in engine.stream("hello", greedy(100)):
        assert output.num_output_tokens == len(engine._in_flight) == 1
        break
    idle(engine)
    engine.add_request("hello", greedy(100))
    engine.step()
    assert engine.stats().blocks_used > 0
    engine.close()
    assert runner.events[-1] == ("wait", len(runner.plans))
    idle(engine)
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert not engine.has_work


def test_seconds_of_steps_are_not_counted_twice(make: MakeEngine) -> None:
    seconds: list[float] = []

    class Watch:
        @hookimpl
        def paged_step_ended(self, stats: StepStats) -> None:
            seconds.append(stats.seconds)

    engine, _ = make(plugins=[Watch()])
    began = time.perf_counter()
    engine.generate(["hello"] * 3, greedy(20))
    assert len(seconds) == 20 == engine.stats().steps
    assert 0 < sum(seconds) < time.perf_counter() - began


# ---- errors and interrupts


@pytest.mark.parametrize("event", ["launch", "wait"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_an_error_of_the_device_ends_every_request_with_it(make: MakeEngine, event: str, number: int) -> None:
    engine, runner = make(max_num_seqs=2)
    runner.raises[event, number] = RuntimeError("device lost")
    outputs = engine.generate(["a", "b", "c"], greedy(10))
    assert [str(output.error) for output in outputs] == ["device lost"] * 3
    # A step that cannot be launched takes the one that still runs with it.
    committed = number - 1 if event == "wait" else max(0, number - 2)
    assert [output.num_output_tokens for output in outputs] == [committed, committed, 0]
    with pytest.raises(EngineDead, match="device lost"):
        engine.add_request("d")
    launched = {step for kind, step in runner.events if kind == "launch"} - {number if event == "launch" else 0}
    assert launched == {step for kind, step in runner.events if kind == "wait"}, "not all were waited for"
    idle(engine)


@pytest.mark.parametrize("event", ["launch", "wait"])
def test_an_interrupt_undoes_all_steps_in_flight(make: MakeEngine, event: str) -> None:
    prompts = {"one": "one", "two": "two " * 30, "three": "three"}
    engine, runner = make(num_blocks=80)
    want = {name: engine.generate([prompt], greedy(12))[0].token_ids for name, prompt in prompts.items()}
    for number in range(1, 16):
        for name, prompt in prompts.items():
            engine.add_request(prompt, greedy(12), request_id=name)
        first = len(runner.plans)
        runner.raises[event, first + number] = KeyboardInterrupt()
        runner.raises[event, first + number + 3] = KeyboardInterrupt()
        assert drive(engine) == want
        runner.raises.clear()
        idle(engine)


def test_an_interrupted_launch_drops_a_step_that_runs(make: MakeEngine) -> None:
    engine, runner = make()
    (want,) = engine.generate(["hello"], greedy(6))
    first = len(runner.plans)
    runner.raises["launch", first + 3] = KeyboardInterrupt()
    engine.add_request("hello", greedy(6))
    outputs = engine.step()
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert runner.events[-1] == ("wait", first + 2), "the step in flight was not waited for"
    assert not engine._in_flight
    while engine.has_work:
        outputs += engine.step()
    assert [output.token_ids for output in outputs] == [[token] for token in want.token_ids]


# ---- not a number


def spoil(engine: Engine, token: int) -> None:
    """From now on the K and V of a token are NaN."""
    with torch.no_grad():
        engine.model.get_input_embeddings().weight[token] = float("nan")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("end", ["not finite", "stop", "abort", "interrupt and abort"])
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_nan_found_a_step_late_reaches_nobody(make: MakeEngine, family: str, end: str, length: int) -> None:
    engine, runner = make(family, num_blocks=36, max_model_len=60, max_num_batched_tokens=16)
    bad, params = list(range(7, 7 + length)), SamplingParams(seed=3, max_tokens=10, ignore_eos=True)
    made = engine.generate([bad], params)[0].token_ids
    others = {str(token): [token] * 17 for token in range(40, 47)}
    want = {name: engine.generate([prompt], greedy(8))[0].token_ids for name, prompt in others.items()}
    fatal = made[3]
    assert not any(fatal in tokens for tokens in [made[:3], bad, *others.values(), *want.values()])
    spoil(engine, fatal)
    engine.reset_prefix_cache()
    stops = {"stop_token_ids": (fatal,)} if end == "stop" else {}
    engine.add_request(bad, params.model_copy(update=stops), request_id="bad")
    engine.add_request(others["46"], greedy(8), request_id="46")
    outputs: list[RequestOutput] = []
    while sum(output.request_id == "bad" for output in outputs) < 4:
        outputs += engine.step()
    assert len(engine._in_flight) == 1, "the step that computes the NaN"
    if end == "interrupt and abort":
        runner.raises["launch", len(runner.plans) + 1] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    if end.endswith("abort"):
        engine.abort("bad")
    for name in list(others)[:-1]:
        engine.add_request(others[name], greedy(8), request_id=name)
    while engine.has_work:
        outputs += engine.step()
    tokens: dict[str, list[int]] = {"bad": [], **{name: [] for name in others}}
    for output in outputs:
        tokens[output.request_id] += output.token_ids
    assert tokens == {"bad": made[:4], **want}
    last = next(output for output in outputs if output.request_id == "bad" and output.finished)
    assert last.finish_reason == {"not finite": "error", "stop": "stop"}.get(end, "abort")


@pytest.mark.parametrize("shared", [True, False])
def test_nan_of_a_request_whose_blocks_another_has_adopted_meanwhile(make: MakeEngine, shared: bool) -> None:
    """Blocks can be found before it is known whether what they hold is finite: it follows from their tokens."""
    engine, runner = make(max_num_batched_tokens=128)
    bad, params = [*range(20, 52), 9], SamplingParams(seed=3, max_tokens=6, ignore_eos=True)
    second = [*range(20, 52), 10, 11]
    made, want = (engine.generate([prompt], params)[0].token_ids for prompt in (bad, second))
    fatal = bad[2] if shared else made[0]
    assert shared or fatal not in [*second, *want]
    spoil(engine, fatal)
    engine.reset_prefix_cache()
    engine.add_request(bad, params, request_id="bad")
    number = len(runner.plans)
    launch = runner.launch

    def launch_and_add(plan: StepPlan) -> LateStep:
        if len(runner.plans) == number + (not shared):
            engine.add_request(second, params, request_id="second")
        return launch(plan)

    runner.launch = launch_and_add  # type: ignore[method-assign]
    outputs: list[RequestOutput] = []
    while engine.has_work:
        outputs += engine.step()
    ends = {output.request_id: output for output in outputs if output.finished}
    assert isinstance(ends["bad"].error, FloatingPointError)
    assert ends["second"].num_cached_tokens == 32
    assert isinstance(ends["second"].error, FloatingPointError) == shared
    got = [token for output in outputs if output.request_id == "second" for token in output.token_ids]
    assert got == ([] if shared else want)
    (again,) = engine.generate([second], params)
    assert (again.num_cached_tokens, again.error is None) == (0 if shared else again.num_cached_tokens, not shared)

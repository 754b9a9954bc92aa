"""The engine on a tiny llama: what comes out, what is refused, and that nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from transformers import PreTrainedTokenizerFast

from paged_backend import (
    Engine,
    EngineConfig,
    EngineDead,
    InvalidArgument,
    Overloaded,
    RequestOutput,
    SamplingParams,
    UnsupportedModel,
)
from paged_backend.plugins import hookimpl
from paged_backend.request import Request
from tests.tiny import build

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make(byte_tokenizer: PreTrainedTokenizerFast) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make_engine(*, plugins: list[object] | None = None, tokenizer: bool = True, **config: Any) -> Engine:
        model = build("llama", vocab_size=len(byte_tokenizer))
        fields = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 64} | config
        engines.append(
            Engine(
                EngineConfig(**fields),
                model=model,
                tokenizer=byte_tokenizer if tokenizer else None,
                plugins=plugins or [],
            )
        )
        return engines[-1]

    yield make_engine
    for engine in engines:
        engine.close()


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **{"ignore_eos": True} | fields)


def idle(engine: Engine) -> None:
    """Nothing runs, waits or holds a block."""
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.blocks_used) == (0, 0, 0)
    engine.tables.check()


def test_text_tokens_and_counts_agree(make: MakeEngine, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = make()
    (output,) = engine.generate(["hello"], greedy(max_tokens=20))
    assert output.finish_reason == "length"
    assert (output.num_prompt_tokens, output.num_output_tokens, len(output.token_ids)) == (5, 20, 20)
    assert output.text == byte_tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert output.first_token_time is not None
    assert output.end_time is not None
    assert output.arrival_time < output.first_token_time < output.end_time
    idle(engine)


def test_a_stream_joins_to_the_whole(make: MakeEngine) -> None:
    engine = make()
    (whole,) = engine.generate(["hello"], greedy(max_tokens=30))
    parts = list(engine.stream("hello", greedy(max_tokens=30)))
    assert [part.token_ids for part in parts] == [[token] for token in whole.token_ids]
    assert "".join(part.text for part in parts) == whole.text
    assert [part.finished for part in parts] == [False] * 29 + [True]


def test_leaving_a_stream_early_frees_its_blocks(make: MakeEngine) -> None:
    engine = make()
    stream = engine.stream("hello", greedy(max_tokens=100))
    next(stream)
    assert engine.stats().blocks_used > 0
    stream.close()
    idle(engine)
    engine.generate(["next"], greedy())


def test_stop_tokens_end_the_output_and_leave_no_text(make: MakeEngine) -> None:
    engine = make()
    (free,) = engine.generate(["hello"], greedy(max_tokens=30))
    at = next(i for i in range(3, 30) if free.token_ids[i] not in free.token_ids[:i])
    (output,) = engine.generate(["hello"], greedy(max_tokens=30, stop_token_ids=[free.token_ids[at]]))
    assert output.finish_reason == "stop"
    assert output.token_ids == free.token_ids[: at + 1]
    assert free.text.startswith(output.text.rstrip("\ufffd"))


def test_end_of_sequence_ends_unless_ignored(make: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    (free,) = engine.generate(["hello"], greedy(max_tokens=5))
    monkeypatch.setattr(engine.intake, "eos", frozenset({free.token_ids[0]}))
    (output,) = engine.generate(["hello"], greedy(ignore_eos=False, max_tokens=5))
    assert (output.finish_reason, output.num_output_tokens) == ("stop", 1)
    (late,) = engine.generate(["hello"], greedy(ignore_eos=False, max_tokens=5, min_tokens=3))
    assert late.num_output_tokens >= 3
    assert free.token_ids[0] not in late.token_ids[:3]


def test_stop_strings_end_the_text_before_them(make: MakeEngine) -> None:
    engine = make()
    (free,) = engine.generate(["hello"], greedy(max_tokens=60))
    stop = next(free.text[i : i + 2] for i in range(8, len(free.text)) if "\ufffd" not in free.text[i : i + 2])
    parts = list(engine.stream("hello", greedy(max_tokens=60, stop=stop)))
    assert parts[-1].finish_reason == "stop"
    assert "".join(part.text for part in parts) == free.text[: free.text.index(stop)]
    idle(engine)


def test_what_ends_the_output_is_part_of_it_if_asked_for(make: MakeEngine) -> None:
    engine = make()
    (free,) = engine.generate(["hello"], greedy(max_tokens=60))
    stop = next(free.text[i : i + 2] for i in range(8, len(free.text)) if "\ufffd" not in free.text[i : i + 2])
    (output,) = engine.generate(["hello"], greedy(max_tokens=60, stop=stop, include_stop_str_in_output=True))
    assert output.text == free.text[: free.text.index(stop) + len(stop)]
    at = next(i for i in range(3, 60) if free.token_ids[i] not in free.token_ids[:i])
    fields = {"max_tokens": 60, "stop_token_ids": [free.token_ids[at]], "include_stop_str_in_output": True}
    (output,) = engine.generate(["hello"], greedy(**fields))
    (same,) = engine.generate(["hello"], greedy(max_tokens=at + 1))
    assert (output.finish_reason, output.text) == ("stop", same.text)


def test_special_tokens_are_part_of_the_text_if_asked_for(
    make: MakeEngine, monkeypatch: pytest.MonkeyPatch, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = make()
    pad = byte_tokenizer.pad_token_id
    monkeypatch.setattr(engine, "_commit", lambda request, token, commit=engine._commit: commit(request, pad))
    (hidden,) = engine.generate(["hello"], greedy(max_tokens=2))
    (shown,) = engine.generate(["hello"], greedy(max_tokens=2, skip_special_tokens=False))
    assert (hidden.text, shown.text) == ("", "<pad><pad>")


def test_long_prompts_are_cut_from_the_left_if_asked_for(make: MakeEngine) -> None:
    engine = make(max_model_len=16)
    (output,) = engine.generate(["hello"], greedy(max_tokens=3))
    (cut,) = engine.generate(["x" * 100 + "hello"], greedy(max_tokens=3, truncate_prompt_tokens=5))
    assert (cut.num_prompt_tokens, cut.token_ids) == (5, output.token_ids)
    (cut,) = engine.generate(["x" * 100], greedy(max_tokens=3, truncate_prompt_tokens=-1))
    assert (cut.num_prompt_tokens, cut.num_output_tokens) == (15, 1)
    with pytest.raises(InvalidArgument, match="truncate_prompt_tokens=0: must be at least 1, or -1"):
        SamplingParams(truncate_prompt_tokens=0)


def test_a_seed_repeats_its_tokens_whatever_runs_beside_it(make: MakeEngine) -> None:
    engine = make(num_blocks=9, max_num_seqs=4, max_model_len=96)
    params = SamplingParams(temperature=1.5, top_p=0.95, seed=11, max_tokens=40, ignore_eos=True)
    (alone,) = engine.generate(["hello"], params)
    other = SamplingParams(temperature=1.5, top_k=20, seed=5, max_tokens=40, ignore_eos=True)
    crowd = engine.generate(["a", "longer prompt", "hello", "b" * 30, "c"], [other, other, params, other, other])
    assert crowd[2].token_ids == alone.token_ids
    assert engine.stats().preemptions > 0, "it is meant to survive recomputation too"
    (different,) = engine.generate(["hello"], params.model_copy(update={"seed": 12}))
    assert different.token_ids != alone.token_ids
    unseeded = engine.generate(["hello"] * 2, params.model_copy(update={"seed": None}))
    assert unseeded[0].token_ids != unseeded[1].token_ids


def test_context_bounds_the_output(make: MakeEngine) -> None:
    engine = make(max_model_len=16)
    (output,) = engine.generate(["0123456789"], greedy(max_tokens=1000))
    assert (output.finish_reason, output.num_output_tokens) == ("length", 6)
    (longest,) = engine.generate(["0" * 15], greedy(max_tokens=1000))
    assert longest.num_output_tokens == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt='': must have at least one token"),
        ([], "prompt=[]: must have at least one token"),
        ("x" * 16, "has 16 tokens; at most 15 are allowed"),
        ([1, 2, 259], "prompt[2]=259: must be a token id in 0..258"),
        ([1, -1], "prompt[1]=-1: must be a token id in 0..258"),
        ([1, 2**40], f"prompt[1]={2**40}: must be a token id in 0..258"),
        ([1, "a"], "prompt=[1, 'a']: must be text or a sequence of token ids"),
        (None, "prompt=None: must be text or a sequence of token ids"),
        ("bad \ud800 text", "must be valid Unicode"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_next_request_works(make: MakeEngine, prompt: Any, message: str) -> None:
    engine = make(max_model_len=16)
    with pytest.raises(InvalidArgument) as caught:
        engine.generate(["fine", prompt], greedy(max_tokens=2))
    assert message in str(caught.value)
    idle(engine)
    assert engine.generate(["fine"], greedy(max_tokens=2))[0].finish_reason == "length"


def test_text_that_cannot_fit_is_not_tokenised(make: MakeEngine) -> None:
    engine = make(max_model_len=16)
    tokenizer = engine.intake.tokenizer
    assert tokenizer is not None
    most = 16 * max(map(len, tokenizer.get_vocab()))
    with pytest.raises(InvalidArgument, match=f"has {most} tokens; at most 15 are allowed"):
        engine.make_request("x" * most)
    with pytest.raises(
        InvalidArgument, match=f"has {most + 1} characters, more than 15 tokens; at most 15 are allowed"
    ):
        engine.make_request("x" * (most + 1))
    text = "".join(chr(ord("a") + number % 26) for number in range(most * 3))
    for cut in (1, 7, 15, -1):
        request = engine.make_request(text, SamplingParams(truncate_prompt_tokens=cut))
        assert request.token_ids == tokenizer(text).input_ids[-15 if cut == -1 else -cut :]


def test_an_engine_without_tokenizer_takes_token_ids_only(make: MakeEngine) -> None:
    engine = make(tokenizer=False)
    assert engine.generate([[5, 6, 7]], greedy(max_tokens=3))[0].text == ""
    with pytest.raises(InvalidArgument, match="has no tokenizer"):
        engine.generate(["text"])
    with pytest.raises(InvalidArgument, match="stop strings need a tokenizer"):
        engine.generate([[5]], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_blocks": 10**12}, "num_blocks=1000000000000: at most"),
        ({"num_blocks": None, "kv_cache_bytes": "900TiB"}, "bytes of free memory"),
        ({"num_blocks": None, "kv_cache_bytes": 10}, "kv_cache_bytes=10: leaves 10 bytes; one block takes"),
        ({"max_model_len": 1000}, "max_model_len=1000: at most 256, the model's context"),
        ({"num_blocks": 2, "max_model_len": 64}, "max_model_len=64: the KV cache holds 32 tokens"),
        ({"scheduling_policy": "lottery"}, "scheduling_policy='lottery': no plugin provides it"),
        ({"attention_backend": "magic"}, "attention_backend='magic': no plugin provides it"),
    ],
)
def test_configuration_the_machine_or_model_cannot_meet(make: MakeEngine, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(**config)
    assert message in str(caught.value)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(InvalidArgument, match=r"model='\./nowhere'"):
        Engine(EngineConfig(model="./nowhere"))
    with pytest.raises(InvalidArgument, match="model=None"):
        Engine(EngineConfig())


def test_waiting_requests_are_bounded(make: MakeEngine) -> None:
    engine = make(max_waiting=3)
    for _ in range(3):
        engine.add_request("hello", greedy())
    with pytest.raises(Overloaded, match="3 requests wait already; max_waiting is 3"):
        engine.add_request("hello", greedy())
    while engine.has_work:
        engine.step()
    idle(engine)
    assert len(engine.generate(["hello"] * 10, greedy(max_tokens=2))) == 10, "generate feeds as others finish"


def test_an_id_in_use_is_refused_and_free_again_afterwards(make: MakeEngine) -> None:
    engine = make()
    engine.add_request("hello", greedy(), request_id="mine")
    with pytest.raises(InvalidArgument, match="request_id='mine': is in use"):
        engine.add_request("hello", greedy(), request_id="mine")
    while engine.has_work:
        engine.step()
    engine.add_request("hello", greedy(), request_id="mine")


def test_abort_ends_waiting_and_running_requests_once(make: MakeEngine) -> None:
    engine = make(max_num_seqs=1)
    running, waiting = (engine.add_request("hello", greedy(max_tokens=50)) for _ in range(2))
    engine.step()
    assert engine.abort(running)
    assert engine.abort(waiting)
    assert not engine.abort(running)
    assert not engine.abort("unknown")
    assert [(output.request_id, output.finish_reason) for output in engine.step()] == [
        (running, "abort"),
        (waiting, "abort"),
    ]
    idle(engine)


class Broken:
    """A plugin whose logits processor fails after some steps, as a device would."""

    def __init__(self, after: int) -> None:
        self.left = after

    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: torch.Tensor, requests: list[Request]) -> None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("device lost")

        return process


def test_an_error_on_the_device_ends_every_request_with_its_cause(make: MakeEngine) -> None:
    engine = make(plugins=[Broken(after=3)], max_num_seqs=2)
    outputs = engine.generate(["a", "b", "c"], greedy(max_tokens=10))
    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert all("device lost" in str(output.error) for output in outputs)
    assert [output.num_output_tokens for output in outputs] == [3, 3, 0]
    with pytest.raises(EngineDead, match="device lost"):
        engine.add_request("d")
    idle(engine)


def test_interleaved_streams_and_steps_keep_their_outputs_apart(make: MakeEngine) -> None:
    engine = make()
    want = engine.generate(["one", "two", "three"], greedy(max_tokens=6))
    mine = engine.add_request("three", greedy(max_tokens=6))
    streams = [engine.stream(prompt, greedy(max_tokens=6)) for prompt in ("one", "two")]
    got: list[list[int]] = [[], []]
    for _ in range(6):
        for tokens, stream in zip(got, streams, strict=True):
            tokens += next(stream).token_ids
    assert got == [want[0].token_ids, want[1].token_ids]
    assert engine.generate(["one"], greedy(max_tokens=6))[0].token_ids == want[0].token_ids
    outputs = [output for output in engine.step() if output.request_id == mine]
    assert [token for output in outputs for token in output.token_ids] == want[2].token_ids
    assert outputs[-1].finished


def test_generate_feeds_a_short_queue_while_requests_are_preempted(make: MakeEngine) -> None:
    engine = make(num_blocks=8, max_num_seqs=4, max_waiting=1, max_model_len=80)
    outputs = engine.generate([f"prompt {i}" for i in range(9)], greedy(max_tokens=40))
    assert [output.num_output_tokens for output in outputs] == [40] * 9
    assert engine.stats().preemptions > 0
    idle(engine)


def test_an_id_used_again_after_an_abort_is_the_new_request(make: MakeEngine) -> None:
    engine = make(max_num_seqs=1)
    engine.add_request("first", greedy(max_tokens=3))
    engine.add_request("old prompt", greedy(max_tokens=3), request_id="mine")
    engine.abort("mine")
    engine.add_request("new", greedy(max_tokens=3), request_id="mine")
    outputs = []
    while engine.has_work:
        outputs += [output for output in engine.step() if output.request_id == "mine"]
    assert [output.finish_reason for output in outputs] == ["abort", None, None, "length"]
    assert outputs[-1].num_prompt_tokens == 3
    idle(engine)


def test_extreme_sampling_parameters_hurt_nobody(make: MakeEngine) -> None:
    engine = make()
    extremes = [
        {"temperature": 1e-39},
        {"temperature": 1e4, "min_tokens": 2, "stop_token_ids": [5]},
        {"top_p": 1e-46},
        {"top_k": 2**31 - 1},
        {"min_p": 1.0},
        {"stop_token_ids": [10**9], "min_tokens": 3},
    ]
    params = [SamplingParams(**{"max_tokens": 4, "ignore_eos": True} | fields) for fields in extremes]
    outputs = engine.generate(["hello"] * len(params), params)
    assert [output.finish_reason for output in outputs] == ["length"] * len(params)
    (best,) = engine.generate(["hello"], greedy(max_tokens=4))
    assert [outputs[i].token_ids == best.token_ids for i in (0, 2, 4)] == [True] * 3


class NotANumber:
    """A plugin that spoils the logits, and the cache, of requests whose prompt has one token, as an overflow would."""

    engine: Engine

    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: torch.Tensor, requests: list[Request]) -> None:
            for row, request in enumerate(requests):
                if request.num_prompt_tokens == 1:
                    logits[row] = float("nan")
                    for stored in self.engine._paged_model.storage.tensors:
                        stored[self.engine.tables.blocks(request.slot)] = float("nan")

        return process


def test_logits_that_are_not_numbers_end_their_request_alone(make: MakeEngine) -> None:
    want = make().generate(["hello", "other"], greedy(max_tokens=8))
    plugin = NotANumber()
    engine = plugin.engine = make(plugins=[plugin])
    good, bad, other = engine.generate(["hello", "x", "other"], greedy(max_tokens=8))
    assert (bad.finish_reason, type(bad.error)) == ("error", FloatingPointError)
    assert [good.token_ids, other.token_ids] == [output.token_ids for output in want]
    again = engine.generate(["other", "hello"], greedy(max_tokens=8))
    assert [output.token_ids for output in again] == [want[1].token_ids, want[0].token_ids]
    idle(engine)


def test_text_with_tokens_the_model_has_no_embedding_for_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    engine = Engine(EngineConfig(num_blocks=16), model=build("llama", vocab_size=80), tokenizer=byte_tokenizer)
    with pytest.raises(InvalidArgument, match=r"prompt\[2\]=92: must be a token id in 0..79"):
        engine.generate(["abz"])
    engine.close()


def test_a_model_serves_one_engine_at_a_time_and_only_through_its_attention() -> None:
    model = build("llama")
    engine = Engine(EngineConfig(num_blocks=16, fuse=False), model=model)
    with pytest.raises(UnsupportedModel, match="in use by another engine"):
        Engine(EngineConfig(num_blocks=16), model=model)
    model.set_attn_implementation("eager")
    (output,) = engine.generate([[5, 6, 7]], greedy())
    assert "attention implementation of the model was changed" in str(output.error)


def test_a_model_that_computes_nan_is_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="relative difference nan"):
        Engine(EngineConfig(num_blocks=16), model=model)


class Interrupts:
    """A plugin in which Ctrl-C is pressed during some steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps, self.seen = steps, 0

    @hookimpl
    def paged_logits_processor(self, config: EngineConfig) -> Any:
        def process(logits: torch.Tensor, requests: list[Request]) -> None:
            self.seen += 1
            if self.seen in self.steps:
                raise KeyboardInterrupt

        return process


def test_an_interrupted_step_is_done_again(make: MakeEngine) -> None:
    prompts = ["one", "two " * 20, "three"]
    want = make().generate(prompts, greedy(max_tokens=12))
    engine = make(plugins=[Interrupts({1, 2, 9})])
    tokens: dict[str, list[int]] = {engine.add_request(prompt, greedy(max_tokens=12)): [] for prompt in prompts}
    interrupts = 0
    while engine.has_work:
        try:
            for output in engine.step():
                tokens[output.request_id] += output.token_ids
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 3
    assert list(tokens.values()) == [output.token_ids for output in want]
    idle(engine)


class Undecodable:
    """A tokenizer that cannot decode one of its tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, token: int) -> None:
        self.tokenizer, self.token = tokenizer, token

    def __call__(self, text: str) -> Any:
        return self.tokenizer(text)

    def decode(self, token_ids: list[int], **options: Any) -> str:
        if self.token in token_ids:
            raise ValueError("no such token")
        return str(self.tokenizer.decode(token_ids, **options))


def test_one_requests_undecodable_text_ends_it_alone(make: MakeEngine) -> None:
    engine = make()
    want = engine.generate(["hello", "other"], greedy(max_tokens=8))
    token = next(token for token in want[0].token_ids if token not in want[1].token_ids)
    engine.tokenizer = Undecodable(engine.tokenizer, token)  # type: ignore[assignment, arg-type]
    bad, good = engine.generate(["hello", "other"], greedy(max_tokens=8))
    assert (bad.finish_reason, str(bad.error)) == ("error", "no such token")
    assert good.text == want[1].text
    idle(engine)


class Recorder:
    """Every observer hook, as a list of events."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.steps: list[Any] = []

    @hookimpl
    def paged_request_arrived(self, request: Request) -> None:
        self.events.append((request.request_id, "arrived"))

    @hookimpl
    def paged_request_scheduled(self, request: Request) -> None:
        self.events.append((request.request_id, "scheduled"))

    @hookimpl
    def paged_request_preempted(self, request: Request) -> None:
        self.events.append((request.request_id, "preempted"))

    @hookimpl
    def paged_request_first_token(self, request: Request) -> None:
        self.events.append((request.request_id, "first token"))

    @hookimpl
    def paged_request_ended(self, request: Request) -> None:
        self.events.append((request.request_id, str(request.finish_reason)))

    @hookimpl
    def paged_step_ended(self, stats: Any) -> None:
        self.steps.append(stats)


def test_observers_and_metrics_see_every_event(make: MakeEngine) -> None:
    recorder = Recorder()
    engine = make(plugins=[recorder], num_blocks=6, max_num_seqs=2, max_model_len=96)
    outputs = engine.generate(["hello " * 5, "other " * 5], greedy(max_tokens=40))
    first = [event for request_id, event in recorder.events if request_id == outputs[0].request_id]
    second = [event for request_id, event in recorder.events if request_id == outputs[1].request_id]
    assert first == ["arrived", "scheduled", "first token", "length"]
    assert second == ["arrived", "scheduled", "first token", "preempted", "scheduled", "length"]
    assert sum(step.output_tokens for step in recorder.steps) == 80 == engine.stats().output_tokens
    assert len(recorder.steps) == engine.stats().steps
    page = generate_latest(engine.metrics.registry).decode()
    assert "paged_backend_output_tokens_total 80.0" in page
    assert "paged_backend_preemptions_total 1.0" in page
    assert 'paged_backend_requests_ended_total{reason="length"} 2.0' in page
    assert "paged_backend_time_to_first_token_seconds_count 2.0" in page
    assert "paged_backend_kv_blocks_used 0.0" in page
    assert "paged_backend_kv_blocks_total 6.0" in page
    assert f"paged_backend_cached_tokens_total {float(engine.stats().cached_tokens)}" in page


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_random_adds_aborts_and_steps_lose_nothing(shared_engine: Engine, seed: int) -> None:
    rng = random.Random(seed)
    engine, last = shared_engine, dict[str, RequestOutput]()
    tokens: dict[str, int] = {}

    def step() -> None:
        for output in engine.step():
            assert output.request_id not in last, "an output after the last"
            tokens[output.request_id] += len(output.token_ids)
            assert tokens[output.request_id] == output.num_output_tokens
            if output.finished:
                last[output.request_id] = output
        engine.tables.check()
        pool = engine.tables.pool
        assert pool.num_free + pool.num_used == pool.num_blocks

    for _ in range(40):
        action = rng.random()
        if action < 0.35:
            prompt = [rng.randrange(3, 200) for _ in range(rng.randint(1, 70))]
            params = SamplingParams(temperature=rng.choice([0, 1]), max_tokens=rng.randint(1, 30), ignore_eos=True)
            tokens[engine.add_request(prompt, params)] = 0
        elif action < 0.45 and tokens.keys() - last.keys():
            engine.abort(rng.choice(sorted(tokens.keys() - last.keys())))
        else:
            step()
    while engine.has_work:
        step()
    assert tokens.keys() == last.keys()
    assert {output.finish_reason for output in last.values()} <= {"length", "abort"}
    idle(engine)


@pytest.fixture
def shared_engine(make: MakeEngine) -> Engine:
    return make(num_blocks=30, block_size=4, max_num_seqs=5, max_num_batched_tokens=40, max_model_len=110)

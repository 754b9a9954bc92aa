"""Structured outputs through the whole engine: what is finished matches, and nobody else notices."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from paged_backend import (
    DeadlineExceeded,
    Engine,
    EngineConfig,
    InvalidArgument,
    Overloaded,
    RequestOptions,
    RequestOutput,
    SamplingParams,
)
from paged_backend.engine_messages import Abort, Submit
from paged_backend.engine_worker import Worker
from paged_backend.plugins import hookimpl
from paged_backend.structured_outputs import Kind
from tests.text import schemas
from tests.tiny import build

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make(byte_tokenizer: PreTrainedTokenizerFast) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make_engine(plugins: tuple[object, ...] = (), **config: Any) -> Engine:
        # More rows than the tokenizer has tokens.
        model = build("llama", vocab_size=len(byte_tokenizer) + 5, num_hidden_layers=1)
        fields = {"num_blocks": 400, "max_num_seqs": 32, "max_num_batched_tokens": 128} | config
        engines.append(Engine(EngineConfig(**fields), model=model, tokenizer=byte_tokenizer, plugins=plugins))
        return engines[-1]

    yield make_engine
    for engine in engines:
        assert engine.stats().blocks_used == 0
        engine.close()


def guided(max_tokens: int = 60, **fields: Any) -> SamplingParams:
    """Fields of `StructuredOutputs`, else of `SamplingParams`."""
    wanted = {name: fields.pop(name) for name in ("json", "regex", "choice", "grammar") if name in fields}
    return SamplingParams(structured_outputs=wanted, max_tokens=max_tokens, **{"seed": 1} | fields)


def ids(engine: Engine, text: str) -> list[int]:
    assert engine.tokenizer is not None
    token_ids: list[int] = engine.tokenizer(text).input_ids
    return token_ids


def test_200_schemas(make: MakeEngine) -> None:
    engine = make()
    closing = dict.fromkeys(ids(engine, '"}]'), 4.0)
    wanted = [schemas.schema(random.Random(seed)) for seed in range(200)]
    params = [guided(120, json=schema, seed=seed, logit_bias=closing) for seed, schema in enumerate(wanted)]
    outputs = engine.generate([f"number {number}" for number in range(200)], params)
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}
    finished = [number for number, output in enumerate(outputs) if output.finish_reason == "stop"]
    assert len(finished) > 120
    for number in finished:
        schemas.check(outputs[number].text, wanted[number])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_kind_on_each_runner(
    backend: str, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from paged_kernels.gpu import decode_attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(decode_attention, "_programs", lambda device: 2)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = build(vocab_size=len(byte_tokenizer), **shape).to(device)
    config = EngineConfig(attention_backend=backend, max_model_len=36, num_blocks=40, max_num_seqs=6)
    engine = Engine(config, model=model, tokenizer=byte_tokenizer)
    free = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    alone = engine.generate(["free"], free)[0].token_ids
    some = [
        guided(regex="[ab]{3}[0-9]", temperature=0),
        guided(choice=["yes", "no"], n=2),
        guided(grammar='start: "<" start ">" | "x"', max_tokens=7),
        guided(json={"type": "integer", "maximum": 9, "minimum": -9}),
        free,
    ]
    letters, choice, nested, number, beside = engine.generate(["a", "b", "c", "d", "free"], some)
    assert re.fullmatch("[ab]{3}[0-9]", letters.text)
    assert all(sample.text in ("yes", "no") for sample in choice.samples)
    assert re.fullmatch(r"<*x?>*", nested.text)
    assert number.text in map(str, range(-9, 10))
    assert [output.finish_reason for output in (letters, choice, number)] == ["stop"] * 3
    assert beside.token_ids == alone
    engine.close()


def test_nobody_else_notices(make: MakeEngine) -> None:
    """Guided outputs and free ones are what they are alone."""
    engine = make()
    free = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    prompts, params = [f"prompt {number}" for number in range(12)], [free, guided(regex="[a-z ]{5,20}"), free] * 4
    alone = [engine.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    together = engine.generate(prompts, params)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
    assert all(re.fullmatch("[a-z ]{5,20}", output.text) for output in together[1::3])
    assert [output.finish_reason for output in together[1::3]] == ["stop"] * 4


def test_samples_have_grammars_of_their_own(make: MakeEngine) -> None:
    (output,) = make().generate(["a"], guided(regex="[a-z]{8}", n=5))
    texts = {sample.text for sample in output.samples}
    assert len(texts) == 5
    assert all(re.fullmatch("[a-z]{8}", text) for text in texts)


@pytest.mark.parametrize("swap_space_bytes", [0, "1MiB"])
def test_preemption_keeps_the_place_in_the_grammar(make: MakeEngine, swap_space_bytes: Any) -> None:
    params = [guided(40, regex="([a-z]{4}-)+", seed=seed) for seed in range(6)]
    prompts = ["some prompt"] * 6
    plenty = make(block_size=4).generate(prompts, params)
    engine = make(block_size=4, num_blocks=40, enable_prefix_caching=False, swap_space_bytes=swap_space_bytes)
    assert [output.text for output in engine.generate(prompts, params)] == [output.text for output in plenty]
    assert engine.stats().preemptions > 0
    assert all(re.fullmatch("([a-z]{4}-)*[a-z]{0,4}", output.text) for output in plenty)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 9])
def test_the_end_of_the_grammar_is_the_end(make: MakeEngine, ignore_eos: bool, min_tokens: int) -> None:
    engine = make()
    fields = {"ignore_eos": ignore_eos, "min_tokens": min_tokens}
    exact, open_ended, empty = engine.generate(
        ["a"] * 3,
        [
            guided(12, regex="[ab]{6}", **fields),
            # Ends as soon as it may, if it may.
            guided(12, regex="(ab)*", logit_bias={2: 100}, **fields),
            guided(12, choice=[""], **fields),
        ],
    )
    assert (exact.finish_reason, exact.num_output_tokens) == ("stop", 6)
    assert re.fullmatch("[ab]{6}", exact.text)
    if ignore_eos:
        assert (open_ended.finish_reason, open_ended.text) == ("length", "ab" * 6)
    else:
        # Not in the middle of a pair.
        assert (open_ended.finish_reason, open_ended.text) == ("stop", "ab" * -(-min_tokens // 2))
    assert (empty.finish_reason, empty.text) == ("stop", "")
    assert empty.num_output_tokens == (not ignore_eos and not min_tokens)


def test_the_last_token_of_text_is_sent_and_stop_strings_still_stop(make: MakeEngine) -> None:
    engine = make()
    outputs = list(engine.stream("a", guided(choice=["maybe"], stop=["beyond"])))
    assert "".join(output.text for output in outputs) == "maybe"
    assert outputs[-1].finish_reason == "stop"
    (stopped,) = engine.generate(["a"], guided(choice=["maybe"], stop=["yb"]))
    assert (stopped.text, stopped.finish_reason) == ("ma", "stop")


def test_with_masks_of_other_kinds(make: MakeEngine) -> None:
    engine = make()
    a, _, c = ids(engine, "abc")
    (both,) = engine.generate(["a"], guided(regex="[abc]{9}", allowed_token_ids=[a, c], logit_bias={c: 100}))
    assert both.text == "c" * 9
    (neither,) = engine.generate(["a"], guided(regex="[bc]{9}", allowed_token_ids=[a]))
    assert isinstance(neither.error, InvalidArgument)
    assert str(neither.error).endswith("no token is allowed next, with structured_outputs, allowed_token_ids")
    fields = {"allowed_token_ids": [a, 2], "bad_words": ["a"], "min_tokens": 2}
    (neither,) = engine.generate(["a"], SamplingParams(**fields))
    assert isinstance(neither.error, InvalidArgument)
    assert str(neither.error) == (
        f"allowed_token_ids=({a}, 2): no token is allowed next, with allowed_token_ids, bad_words, min_tokens"
    )
    (some,) = engine.generate(["a"], guided(regex="[abc]{20}", bad_words=["b", "ac"]))
    assert re.fullmatch("c*a*", some.text)
    assert len(some.text) == 20


def test_a_bad_schema_is_refused_before_it_takes_anything(make: MakeEngine) -> None:
    engine = make()
    with pytest.raises(InvalidArgument, match=r"structured_outputs=.*Invalid type: strin"):
        engine.add_request("a", guided(json={"type": "strin"}))
    assert not engine.has_work


class Vowels:
    """Any vowels; fails in its fourth mask, maybe as it is too much, or at its fourth token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str, so_far: int = 0) -> None:
        self.tokenizer, self.where, self.so_far = tokenizer, where, so_far
        self.is_over, self.may_end = False, False

    def fill(self, row: npt.NDArray[np.int32]) -> None:
        for token in self.tokenizer("aeiou").input_ids:
            row[token // 32] |= np.int32(1 << token % 32)
        if self.where == "fill" and self.so_far == 3:
            raise ZeroDivisionError("in fill")
        if self.where == "limit" and self.so_far == 3:
            raise ValueError("too many states")

    def accept(self, token: int) -> None:
        self.so_far += 1
        if self.where == "accept" and self.so_far == 4:
            raise ZeroDivisionError("in accept")

    def copy(self) -> Vowels:
        return Vowels(self.tokenizer, self.where, self.so_far)


class VowelBackend:
    """The grammar is where to fail."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos: frozenset[int]) -> None:
        self.tokenizer = tokenizer

    def compile(self, kind: Kind, text: str) -> Vowels:
        return Vowels(self.tokenizer, text)

    @staticmethod
    @hookimpl
    def paged_grammar_backend(name: str) -> type[VowelBackend] | None:
        return VowelBackend if name == "vowels" else None


def test_a_backend_that_fails_hurts_its_request_alone(make: MakeEngine) -> None:
    engine = make((VowelBackend,), grammar_backend="vowels")
    free = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    (alone,) = engine.generate(["free"], free)
    outputs = engine.generate(
        ["free", "a", "b", "c", "d"],
        [free, *(guided(8, grammar=where) for where in ("fill", "accept", "never", "limit"))],
    )
    assert outputs[0].token_ids == alone.token_ids
    for output, where, count in ((outputs[1], "fill", 3), (outputs[2], "accept", 4)):
        assert output.finish_reason == "error"
        assert repr(output.error) == f"ZeroDivisionError('in {where}')"
        assert output.num_output_tokens == count
    assert (outputs[3].finish_reason, outputs[3].num_output_tokens) == ("length", 8)
    assert set(outputs[1].text + outputs[3].text) <= set("aeiou")
    assert isinstance(outputs[4].error, InvalidArgument)  # the request's own fault
    assert (outputs[4].error.field, outputs[4].error.allowed) == ("structured_outputs", "too many states")


def test_backends_by_name(make: MakeEngine) -> None:
    with pytest.raises(InvalidArgument, match="grammar_backend='outlines': no plugin provides it; built in are llguid"):
        make(grammar_backend="outlines")


class Slow(VowelBackend):
    """Compiles when it may."""

    compiling, go_on = threading.Event(), threading.Event()
    compiled: list[str] = []  # noqa: RUF012

    def compile(self, kind: Kind, text: str) -> Vowels:
        self.compiled.append(text)
        self.compiling.set()
        assert self.go_on.wait(60)
        return super().compile(kind, text)

    @staticmethod
    @hookimpl
    def paged_grammar_backend(name: str) -> type[Slow]:
        return Slow


def submit(name: str, prompt: str | list[int] = "a", grammar: str | None = None, **options: Any) -> Submit:
    """Of a request that came a second ago."""
    params = SamplingParams() if grammar is None else guided(grammar=grammar)
    return Submit(name, prompt, params, RequestOptions(**options), time.monotonic() - 1)


@pytest.fixture
def worker(make: MakeEngine) -> Iterator[Worker]:
    """Whose engine nobody steps, and whose compiler compiles the request "slow" already."""
    Slow.compiling.clear()
    Slow.go_on.clear()
    Slow.compiled.clear()
    theirs, ours = multiprocessing.Pipe()
    worker = Worker(theirs, memoryview(bytearray(8)).cast("d"), [])
    worker._engine = make((Slow,), max_waiting=3)
    threading.Thread(target=worker._compile, daemon=True).start()
    worker._obey(submit("slow", grammar="slow"))
    assert Slow.compiling.wait(60)
    yield worker
    Slow.go_on.set()
    ours.close()
    theirs.close()


def said(worker: Worker) -> list[RequestOutput]:
    outputs: list[RequestOutput] = []
    while not worker._outbox.empty():
        outputs += worker._outbox.get()  # type: ignore[arg-type]
    return outputs


def test_a_process_takes_in_others_while_it_compiles(worker: Worker) -> None:
    worker._obey(submit("quick"))
    worker._obey(Abort(["quick"]))
    assert [request.request_id for request in worker._submitted] == ["quick"]
    assert worker._aborted == ["quick"]
    Slow.go_on.set()
    with worker._state:
        assert worker._state.wait_for(lambda: len(worker._submitted) == 2, timeout=60)
    assert [request.request_id for request in worker._submitted] == ["quick", "slow"]
    assert said(worker) == []


def test_what_waits_for_the_compiler_waits(worker: Worker) -> None:
    """And one more is refused before anything is done for it."""
    worker._obey(submit("quick"))
    worker._obey(submit("next", grammar="next"))
    worker._obey(submit("guided", grammar="guided"))
    worker._obey(submit("free", [-1]))
    assert [(output.request_id, type(output.error)) for output in said(worker)] == [
        ("guided", Overloaded),
        ("free", Overloaded),
    ]
    Slow.go_on.set()
    with worker._state:
        assert worker._state.wait_for(lambda: len(worker._submitted) == 3, timeout=60)
    assert Slow.compiled == ["slow", "next"]


def test_what_is_aborted_is_not_compiled(worker: Worker) -> None:
    worker._obey(submit("next", grammar="next"))
    worker._obey(Abort(["slow", "next", "unknown"]))
    assert [(output.request_id, output.finish_reason, output.finished) for output in said(worker)] == [
        ("slow", "abort", True),
        ("next", "abort", True),
    ]
    worker._obey(submit("slow", grammar="again"))
    Slow.go_on.set()
    with worker._state:
        assert worker._state.wait_for(lambda: bool(worker._submitted), timeout=60)
    assert Slow.compiled == ["slow", "again"]
    assert [request.request_id for request in worker._submitted] == ["slow"]
    assert said(worker) == []


def test_what_is_too_late_is_not_compiled(worker: Worker) -> None:
    worker._obey(submit("late", grammar="late", queue_timeout=0.5))
    worker._obey(submit("next", grammar="next", timeout=60))
    Slow.go_on.set()
    with worker._state:
        assert worker._state.wait_for(lambda: len(worker._submitted) == 2, timeout=60)
    (late,) = said(worker)
    assert isinstance(late.error, DeadlineExceeded)
    assert str(late.error).startswith("queue_timeout=0.5: the request was ended after 1.")
    assert Slow.compiled == ["slow", "next"]


def whole(engine: Engine, texts: list[str], params: list[SamplingParams]) -> list[RequestOutput]:
    assert engine.tokenizer is not None
    prompts = [
        engine.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in texts
    ]
    return engine.generate(prompts, params)


def test_the_real_model(smollm2: Path) -> None:
    engine = Engine(EngineConfig(model=str(smollm2), kv_cache_bytes="64MiB", max_num_seqs=8))
    person = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    outputs = whole(
        engine,
        ["Describe a person.", "Is water wet?", "A phone number?", "Say hello to Bob."],
        [
            guided(40, json=person, temperature=0),
            guided(choice=["yes", "no"], temperature=0),
            guided(regex=r"[0-9]{3}-[0-9]{4}", temperature=0),
            guided(grammar='start: "Hello, " NAME "!"\nNAME: /[A-Z][a-z]{1,8}/', temperature=0),
        ],
    )
    assert [output.finish_reason for output in outputs] == ["stop"] * 4
    schemas.check(outputs[0].text, person)
    assert list(json.loads(outputs[0].text)) == ["name", "age"]
    assert outputs[1].text in ("yes", "no")
    assert re.fullmatch(r"[0-9]{3}-[0-9]{4}", outputs[2].text)
    assert outputs[3].text == "Hello, Bob!"
    engine.close()

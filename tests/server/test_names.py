"""Every name of the protocol, sent to the real server by every way it may come, does there what it says."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.request import Logprob, SamplingParams
from paged_backend.text.chat import Chat
from tests.server.client import CONTEXT, ENGINE, Client
from triton_server_model.protocol_table import NAMES, Name

PROMPT = "the fox"
BASE = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
RANDOM = BASE | {"temperature": 1, "seed": 1}
BEAMS = BASE | {"beam_width": 3, "n": 3, "stop_token_ids": list(range(3, 120))}
SAMPLING: dict[str, dict[str, Any]] = {
    "n": RANDOM | {"n": 3},
    "max_tokens": BASE | {"max_tokens": 3},
    "min_tokens": BASE | {"stop_token_ids": [12], "min_tokens": 5},
    "temperature": BASE | {"temperature": 0.1, "seed": 1},
    "top_k": RANDOM | {"top_k": 3},
    "top_p": RANDOM | {"top_p": 0.1},
    "min_p": RANDOM | {"min_p": 0.5},
    "presence_penalty": BASE | {"presence_penalty": 2},
    "frequency_penalty": BASE | {"frequency_penalty": 2},
    "repetition_penalty": BASE | {"repetition_penalty": 3},
    "logit_bias": BASE | {"logit_bias": {"70": 100.0}},
    "allowed_token_ids": BASE | {"allowed_token_ids": [71, 72]},
    "bad_words": BASE | {"bad_words": "*"},
    "logprobs": BASE | {"logprobs": 2},
    "prompt_logprobs": BASE | {"prompt_logprobs": 2},
    "seed": RANDOM | {"seed": 5},
    "stop": BASE | {"stop": "vv"},
    "include_stop_str_in_output": BASE | {"stop": "vv", "include_stop_str_in_output": True},
    "stop_token_ids": BASE | {"stop_token_ids": [12]},
    "ignore_eos": BASE | {"logit_bias": {"2": 100.0}},
    "skip_special_tokens": BASE | {"logit_bias": {"1": 100.0}, "skip_special_tokens": False},
    "truncate_prompt_tokens": BASE | {"truncate_prompt_tokens": 3},
    "beam_width": BASE | {"beam_width": 3},
    "length_penalty": BEAMS | {"length_penalty": -2},
    "early_stopping": BEAMS | {"early_stopping": "never"},
}
"""A request for each field of `SamplingParams`, in which that field makes a difference."""
SERVED = {name.name: name for name in NAMES if name.status == "served"}
RETURNS = {name: True for name in SERVED if name.startswith("return_")}


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Iterator[Engine]:
    engine = Engine(EngineConfig(model=str(tiny_llama_dir), **ENGINE))
    yield engine
    engine.close()


def expected(engine: Engine, params: dict[str, Any], prompt: Any = PROMPT) -> dict[str, Any]:
    """The engine's own answer, as output tensors; JSON parsed."""
    if "beam_width" not in params:
        params = {"logprobs": 0} | params  # needed by cumulative_logprob
    (output,) = engine.generate([prompt], SamplingParams(**params))
    samples = output.samples or (output,)
    outputs = {
        "text_output": [sample.text for sample in samples],
        "finish_reason": [sample.finish_reason for sample in samples],
        "cumulative_logprob": [pytest.approx(sample.cumulative_logprob, rel=1e-4) for sample in samples],
        "logprobs": [_objects(sample.logprobs) for sample in samples],
        "num_input_tokens": [output.num_prompt_tokens],
        "num_output_tokens": [len(sample.token_ids) for sample in samples],
        "output_token_ids": [token for sample in samples for token in sample.token_ids],
    }
    if "prompt_logprobs" in params:
        outputs["prompt_logprobs"] = [_objects(output.prompt_logprobs)]
    return outputs


def _objects(tokens: list[list[Logprob]] | None) -> list[dict[str, Any]] | None:
    return tokens and [
        {
            str(one.token_id): {
                "logprob": pytest.approx(one.logprob, rel=1e-4),
                "rank": one.rank,
                "decoded_token": one.text,
            }
            for one in likeliest
        }
        for likeliest in tokens
    ]


def parsed(outputs: dict[str, Any]) -> dict[str, Any]:
    for name in outputs.keys() & {"logprobs", "prompt_logprobs"}:
        outputs[name] = [json.loads(text) for text in outputs[name]]
    return outputs


def as_json(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    return parsed(client.ask(PROMPT, sampling=params, inputs=RETURNS))


def as_strings(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    """gRPC request parameters."""
    strings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    return parsed(client.ask(PROMPT, parameters=strings | dict.fromkeys(RETURNS, "true")))


def over_http(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    """Scalars, but for lists that are tensors."""
    scalars = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in params.items()}
    body = {"text_input": PROMPT, "exclude_input_in_output": True, "parameters": scalars, **RETURNS}
    answer = client.generate(body)
    assert answer.status_code == 200, answer.text
    outputs = {name: value for name, value in answer.json().items() if name not in ("model_name", "model_version")}
    return parsed({name: value if isinstance(value, list) else [value] for name, value in outputs.items()})


def as_tensors(client: Client, params: dict[str, Any]) -> dict[str, Any]:
    tensors = {name: value for name, value in params.items() if SERVED[name].tensor}
    rest = {name: value for name, value in params.items() if name not in tensors}
    assert tensors
    return parsed(client.ask(PROMPT, sampling=rest, inputs=RETURNS | tensors))


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_field(client: Client, engine: Engine, name: str) -> None:
    params = SAMPLING[name]
    answer = expected(engine, params)
    assert answer != expected(engine, {other: value for other, value in params.items() if other != name})
    for ask in (as_json, as_strings, over_http):
        assert ask(client, params) == answer
    if SERVED[name].tensor:
        assert as_tensors(client, params) == answer


ALIASES = [name for name in SERVED.values() if name.field]


@pytest.mark.parametrize("alias", ALIASES, ids=lambda alias: alias.name)
def test_alias(client: Client, engine: Engine, alias: Name) -> None:
    params = dict(SAMPLING[alias.field])
    answer = expected(engine, params)
    params[alias.name] = params.pop(alias.field)
    for ask in (as_json, as_strings, over_http, *([as_tensors] if alias.tensor else [])):
        assert ask(client, params) == answer
    both = client.stream(PROMPT, sampling=params | {alias.field: params[alias.name]})
    both.finish()
    assert f"{alias.field}={params[alias.name]!r}: not together with {alias.name}" in both.error


EFFECTS: dict[tuple[str, ...], Callable[[Client, Engine], None]] = {}
"""What shows that names work, for all that are no fields of `SamplingParams`."""


def effect(*names: str) -> Callable[[Callable[..., None]], None]:
    def add(shown: Callable[..., None]) -> None:
        EFFECTS[names] = shown

    return add


def refusal(client: Client, *arguments: Any, **request: Any) -> str:
    stream = client.stream(*arguments, **request)
    stream.finish()
    assert stream.error is not None
    return stream.error


@effect("text_input", "sampling_parameters", "exclude_input_in_output")
def _(client: Client, engine: Engine) -> None:
    (text,) = expected(engine, BASE)["text_output"]
    for stream, exclude, prefix in (
        (None, None, PROMPT),
        (False, False, PROMPT),
        (False, True, ""),
        (True, None, ""),
        (True, True, ""),
    ):
        assert client.stream(PROMPT, sampling=BASE, stream=stream, exclude=exclude).finish() == prefix + text
    n = client.stream(PROMPT, sampling=RANDOM | {"n": 2}, stream=None)
    n.finish()
    texts = expected(engine, RANDOM | {"n": 2})["text_output"]
    assert n.responses == [{"text_output": [PROMPT + text for text in texts]}]


@effect("prompt_token_ids")
def _(client: Client, engine: Engine) -> None:
    ids = engine.tokenizer(PROMPT).input_ids
    answer = expected(engine, BASE)
    for inputs in ({"prompt_token_ids": ids}, {"prompt_token_ids": ids, "text_input": ""}):
        assert parsed(client.ask(sampling=BASE, inputs=RETURNS | inputs, exclude=None)) == answer
    http = client.generate({"prompt_token_ids": ids, "parameters": BASE})
    assert http.json()["text_output"] == answer["text_output"][0]
    error = refusal(client, inputs={"prompt_token_ids": [5, 10_000]})
    assert f"prompt_token_ids[1]=10000: must be a token id in 0..{engine.vocab_size - 1}" in error


@effect("messages", "tools", "chat_template_kwargs")
def _(client: Client, engine: Engine) -> None:
    messages, tools = [{"role": "user", "content": "hi"}], [{"name": "look"}]
    mood = {"mood": " is glad"}
    for chat, text in (
        (Chat(messages), "user: hi\nassistant:"),
        (Chat(messages, tools, mood), "look()\nuser: hi\nassistant is glad:"),
    ):
        inputs = {"messages": chat.messages, "tools": chat.tools, "chat_template_kwargs": chat.chat_template_kwargs}
        inputs = {name: json.dumps(value) for name, value in inputs.items() if value}
        answer = expected(engine, BASE, text)
        assert expected(engine, BASE, chat) == answer
        assert parsed(client.ask(sampling=BASE, inputs=RETURNS | inputs, exclude=None)) == answer
        assert client.generate(inputs | {"parameters": BASE}).json()["text_output"] == answer["text_output"][0]
    content = json.dumps([{"role": "user", "content": "q" * CONTEXT}])
    assert refusal(client, inputs={"messages": content}).startswith("Error generating stream: messages=Chat(")
    arguments = json.dumps({"chat_template": "{{ messages }}"})
    error = refusal(client, inputs={"messages": content, "chat_template_kwargs": arguments})
    assert "chat_template_kwargs='chat_template': must be a variable of the template's own" in error


@effect("stream", *RETURNS)
def _(client: Client, engine: Engine) -> None:
    """Every output comes alone and with others, streamed and not; what streams add up to is the same."""
    params = RANDOM | {"n": 3, "max_tokens": 60, "logprobs": 1, "stop_token_ids": list(range(3, 13))}
    answer = expected(engine, params)
    assert len(set(answer["num_output_tokens"])) > 1  # they end one after the other
    stream = client.stream(PROMPT, sampling=params, inputs=RETURNS)
    stream.finish()
    assert joined(stream.responses) == answer
    assert len(stream.responses) > 1
    for flag in RETURNS:
        name = flag.removeprefix("return_")
        assert parsed(client.ask(PROMPT, sampling=params, inputs={flag: True})) == {
            name: answer[name] for name in ("text_output", name)
        }
        stream = client.stream(PROMPT, sampling=params, inputs={flag: True})
        stream.finish()
        assert all(response.keys() == {"text_output", name} for response in stream.responses)
    for parameters in ({"stream": "false"}, {"stream": 0}):  # as bool("false") is True
        stream = client.stream(PROMPT, sampling=params, parameters=parameters, stream=None, exclude=True)
        stream.finish()
        assert stream.responses == [{"text_output": answer["text_output"]}]


def joined(responses: list[dict[str, Any]]) -> dict[str, Any]:
    """The responses of a stream as one."""
    for response in map(parsed, responses):
        rest = iter(response.pop("output_token_ids"))
        response["ids"] = [list(itertools.islice(rest, count)) for count in response["num_output_tokens"]]
        assert not list(rest)
    for before, after in itertools.pairwise(responses):
        for reason, then, new in zip(before["finish_reason"], after["finish_reason"], after["ids"], strict=True):
            assert reason == "None" or (then == reason and not new)
    last = {name: responses[-1][name] for name in ("finish_reason", "cumulative_logprob", "num_input_tokens")}
    added = {
        name: [functools.reduce(operator.add, parts) for parts in zip(*(each[name] for each in responses), strict=True)]
        for name in ("text_output", "logprobs", "num_output_tokens", "ids")
    }
    return last | {"output_token_ids": list(itertools.chain(*added.pop("ids")))} | added


@effect("timeout_ms", "timeout")
def _(client: Client, engine: Engine) -> None:
    long = {"max_tokens": CONTEXT, "ignore_eos": True}
    ways = [
        {"sampling": long | {"timeout_ms": 5}},
        {"parameters": long | {"timeout_ms": "5"}},
        {"sampling": long, "timeout": 5000},
        {"sampling": long | {"timeout_ms": 5}, "timeout": 10**9},
    ]
    for way in ways:
        assert "timeout=0.005: the request was ended after 0." in refusal(client, PROMPT, **way)
    http = client.generate({"text_input": PROMPT, "parameters": long | {"timeout": 5000}})
    assert "timeout=0.005: the request was ended after 0." in http.json()["error"]
    assert client.ask(PROMPT, sampling=BASE | {"timeout_ms": 0}, timeout=0)["text_output"]


@effect("queue_timeout_ms")
def _(client: Client, engine: Engine) -> None:
    with occupied(client):
        for way in ({"parameters": {"queue_timeout_ms": 1}}, {"sampling": {"queue_timeout_ms": 1}}):
            assert "queue_timeout=0.001: the request was ended after 0." in refusal(client, PROMPT, **way)


@effect("priority")
def _(client: Client, engine: Engine) -> None:
    all_slots = {"n": ENGINE["max_num_seqs"]}
    with occupied(client):
        later = client.stream(PROMPT, sampling=BASE | all_slots | {"priority": 5, "max_tokens": 100})
        sooner = client.stream(PROMPT, sampling=BASE | all_slots | {"priority": 4})
        # And by now both are there. gRPC clients refuse a parameter of that name.
        http = client.generate({"text_input": PROMPT, "parameters": {"priority": 5000}})
        assert "priority=5000: Input should be less than or equal to 1000" in http.json()["error"]
    sooner.finish()
    assert not later.finals
    later.finish()


@contextlib.contextmanager
def occupied(client: Client) -> Iterator[None]:
    """Requests keep all slots meanwhile."""
    long = {"n": ENGINE["max_num_seqs"], "max_tokens": CONTEXT, "ignore_eos": True}
    busy = [client.stream("busy", sampling=long) for _ in range(2)]
    busy[0].wait_for(lambda: busy[0].chunks)
    yield
    for stream in busy:
        stream.cancel()


@effect("tenant")
def _(client: Client, engine: Engine) -> None:
    for way in ({"sampling": {"tenant": "t" * 300}}, {"parameters": {"tenant": "t" * 300}}):
        assert re.search("tenant='t+.*: String should have at most 256 characters", refusal(client, PROMPT, **way))
    assert client.ask(PROMPT, sampling=BASE, parameters={"tenant": "me"})["text_output"]


@effect("cache_salt")
def _(client: Client, engine: Engine) -> None:
    prompt = "a prompt that is some blocks of the cache long"
    client.settle()
    before = client.metric("cached_tokens_total")
    for way in (
        {"parameters": {"cache_salt": "a"}},
        {"sampling": {"cache_salt": "b"}},
        {"sampling": {"cache_salt": "a"}},
    ):
        client.ask(prompt, **way)
    client.settle()
    assert client.metric("cached_tokens_total") == before + (len(prompt) - 1) // 16 * 16


@effect("end_id")
def _(client: Client, engine: Engine) -> None:
    params = BASE | {"ignore_eos": False}
    answer = expected(engine, params | {"stop_token_ids": [12]})
    assert as_json(client, params | {"end_id": 12}) == as_strings(client, params | {"end_id": 12}) == answer
    whole = expected(engine, params)
    for never in (2, -1, 1_048_576):
        assert over_http(client, params | {"end_id": never}) == whole
    assert as_json(client, BASE | {"end_id": 12}) == whole


@effect("guided_decoding_guide_type", "guided_decoding_guide")
def _(client: Client, engine: Engine) -> None:
    asked = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+b"}
    assert "structured_outputs={'regex': 'a+b'}" in refusal(client, PROMPT, parameters=asked)


@pytest.mark.parametrize("name", [name for name in NAMES if name.status == "refused"], ids=lambda name: name.name)
def test_refused(client: Client, engine: Engine, name: Name) -> None:
    asks = 2 if name.asks(2) else False
    message = f"{name.name}={asks!r}: not supported by this model"
    if name.tensor:
        assert f"{name.name}=" in (error := refusal(client, PROMPT, inputs={name.name: "x"}))
        assert "not supported by this model" in error
        assert client.ask(PROMPT, inputs={name.name: ""})["text_output"]
        return
    nothing = max(name.nothing - {"none"})
    for way in ("sampling", "parameters"):
        assert message in refusal(client, PROMPT, **{way: {name.name: asks}})
        assert client.ask(PROMPT, **{way: {name.name: nothing}})["text_output"]


def test_ignored_without_a_word(client: Client) -> None:
    names = [name.name.replace("*", "any") for name in NAMES if name.status == "ignored"]
    for body in (
        {"parameters": dict.fromkeys(names, "1")},
        {"sampling_parameters": json.dumps(dict.fromkeys(names, 1))},
    ):
        assert client.generate({"text_input": PROMPT} | body).json()["text_output"].startswith(PROMPT)
    client.settle()
    assert [client.metric("unknown_parameters_total", name=name) for name in names] == [None] * len(names)


def test_unknown_parameters_are_counted(client: Client) -> None:
    client.settle()
    before = client.metric("unknown_parameters_total", name="tempreature") or 0
    for _ in range(3):
        client.ask(PROMPT, parameters={"tempreature": 1, "max_tokens": 1})
    client.settle()
    assert client.metric("unknown_parameters_total", name="tempreature") == before + 3


def test_beams_are_one_response(client: Client, engine: Engine) -> None:
    stream = client.stream(PROMPT, sampling=BEAMS, inputs=RETURNS)
    stream.finish()
    assert [parsed(response) for response in stream.responses] == [expected(engine, BEAMS)]


def test_logprobs_are_null_unless_asked_for(client: Client) -> None:
    assert client.ask(PROMPT, inputs={"return_logprobs": True})["logprobs"] == ["null"]


@pytest.mark.parametrize("names", EFFECTS, ids=lambda names: names[0])
def test_effect(client: Client, engine: Engine, names: tuple[str, ...]) -> None:
    EFFECTS[names](client, engine)


def test_all_names_are_tested() -> None:
    fields = {name for name in SERVED if not SERVED[name].field}
    assert SAMPLING.keys() == SamplingParams.model_fields.keys()
    assert SAMPLING.keys() | set(itertools.chain(*EFFECTS)) == fields

"""What asks for no other tokens works as it says: prompts, outputs, options, TensorRT-LLM's fields."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

import pytest

from paged_backend.engine import Engine
from paged_backend.request import SamplingParams
from paged_backend.text.chat import Chat
from tests.server.answers import PROMPT, RETURNS, SERVED, expected, joined, parsed
from tests.server.client import CONTEXT, ENGINE, Client
from tests.server.test_names import BASE, BEAMS, RANDOM, SAMPLING, as_json, as_strings, over_http

EFFECTS: dict[tuple[str, ...], Callable[[Client, Engine], None]] = {}
"""What shows that names work, for all that are no fields of `SamplingParams`."""


def effect(*names: str) -> Callable[[Callable[..., None]], None]:
    def add(shown: Callable[..., None]) -> None:
        EFFECTS[names] = shown

    return add


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
    error = client.refusal(inputs={"prompt_token_ids": [5, 10_000]})
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
    assert client.refusal(inputs={"messages": content}).startswith("Error generating stream: messages=Chat(")
    arguments = json.dumps({"chat_template": "{{ messages }}"})
    error = client.refusal(inputs={"messages": content, "chat_template_kwargs": arguments})
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
        assert "timeout=0.005: the request was ended after 0." in client.refusal(PROMPT, **way)
    http = client.generate({"text_input": PROMPT, "parameters": long | {"timeout": 5000}})
    assert "timeout=0.005: the request was ended after 0." in http.json()["error"]
    assert client.ask(PROMPT, sampling=BASE | {"timeout_ms": 0}, timeout=0)["text_output"]


@effect("queue_timeout_ms", "priority")
def _(client: Client, engine: Engine) -> None:
    all_slots = {"n": ENGINE["max_num_seqs"]}
    long = {"max_tokens": CONTEXT, "ignore_eos": True}
    # They take far longer than asking for the rest. All of it fits into the queue of ENGINE["max_waiting"].
    busy = [client.stream("busy", sampling=long | all_slots) for _ in range(3)]
    busy[0].wait_for(lambda: busy[0].chunks)
    most_slots = BASE | {"n": 12}  # so that the two cannot run beside each other
    later = client.stream(PROMPT, sampling=most_slots | {"priority": 5, "max_tokens": 100})
    sooner = client.stream(PROMPT, sampling=most_slots | {"priority": 4})
    refusals = [
        client.stream(PROMPT, **way)
        for way in ({"parameters": {"queue_timeout_ms": 1}}, {"sampling": {"queue_timeout_ms": 1}})
    ]
    http = client.generate({"text_input": PROMPT, "parameters": {"priority": 5000}})  # gRPC clients refuse that name
    for stream in (later, sooner, *busy, *refusals):  # all, before anything is asserted: others use the model, too
        stream.finish()
    assert [stream.error for stream in (later, sooner, *busy)] == [None] * 5
    assert "priority=5000: Input should be less than or equal to 1000" in http.json()["error"]
    for stream in refusals:
        assert "queue_timeout=0.001: the request was ended after " in (stream.error or "")
    assert sooner.ended < later.ended


@effect("tenant")
def _(client: Client, engine: Engine) -> None:
    for way in ({"sampling": {"tenant": "t" * 300}}, {"parameters": {"tenant": "t" * 300}}):
        assert re.search("tenant='t+.*: String should have at most 256 characters", client.refusal(PROMPT, **way))
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
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]})
    for kind, guide, same in (
        ("json", "", {"json_object": True}),
        ("json_schema", schema, {"json": schema}),
        ("regex", "[ab]{3}", {"regex": "[ab]{3}"}),
        ("ebnf_grammar", 'root ::= "a" | "b"', {"grammar": 'root ::= "a" | "b"'}),
    ):
        asked = BASE | {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
        answer = expected(engine, BASE | {"structured_outputs": same})
        assert as_json(client, asked) == as_strings(client, asked) == over_http(client, asked) == answer


def test_beams_are_one_response(client: Client, engine: Engine) -> None:
    stream = client.stream(PROMPT, sampling=BEAMS, inputs=RETURNS)
    stream.finish()
    assert [parsed(response) for response in stream.responses] == [expected(engine, BEAMS)]


def test_prompt_logprobs_come_once(client: Client, engine: Engine) -> None:
    params = RANDOM | {"max_tokens": 60, "prompt_logprobs": 1}
    stream = client.stream(PROMPT, sampling=params)
    stream.finish()
    first, *rest = [parsed(response)["prompt_logprobs"] for response in stream.responses]
    assert first == expected(engine, params)["prompt_logprobs"]
    assert rest == [[None]] * len(rest)
    assert rest


def test_logprobs_are_null_unless_asked_for(client: Client) -> None:
    assert client.ask(PROMPT, inputs={"return_logprobs": True})["logprobs"] == ["null"]


@pytest.mark.parametrize("names", EFFECTS, ids=lambda names: names[0])
def test_effect(client: Client, engine: Engine, names: tuple[str, ...]) -> None:
    EFFECTS[names](client, engine)


def test_all_names_are_tested() -> None:
    fields = {name for name in SERVED if not SERVED[name].field}
    assert SAMPLING.keys() == SamplingParams.model_fields.keys()
    assert SAMPLING.keys() | set(itertools.chain(*EFFECTS)) == fields

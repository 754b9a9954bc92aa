"""OpenAI's API over the real server, through OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client as http_client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from tritonclient.utils import InferenceServerException

from paged_backend import models
from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.errors import EngineDead
from paged_backend.request import RequestOptions, SamplingParams
from paged_backend.text.chat import Chat
from tests.server.client import CONTEXT, ENGINE, Client, eventually
from tests.server.test_lifecycle import Cli
from triton_server_model.launcher import MODEL_NAME, TritonServer, free_ports
from triton_server_model.openai.errors import of_server
from triton_server_model.openai.server import OpenAIServer

GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
LONG: dict[str, Any] = {"max_tokens": CONTEXT, "extra_body": {"ignore_eos": True}}
MESSAGES = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "the fox?"}]
PARTS = [{"type": "text", "text": "the fox?"}]


@pytest.fixture(scope="module")
def front(client: Client) -> Iterator[OpenAIServer]:
    with OpenAIServer("127.0.0.1", *free_ports(1), client.server.address("grpc")) as front:
        yield front


@pytest.fixture(scope="module")
def http(front: OpenAIServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{front.address}", trust_env=False, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def api(front: OpenAIServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{front.address}/v1", api_key="any", max_retries=0, timeout=60) as api:
        yield api


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    return Engine(EngineConfig(model=str(tiny_llama_dir), **ENGINE))


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "ignore_eos": True} | fields)


def test_completions_of_several_prompts(api: openai.OpenAI, engine: Engine) -> None:
    prompts = ["the fox", "über den Zaun"]
    expected = engine.generate(prompts, _params(max_tokens=9, n=2, seed=3, temperature=0.8))
    asked = {
        "model": MODEL_NAME,
        "max_tokens": 9,
        "n": 2,
        "seed": 3,
        "temperature": 0.8,
        "extra_body": {"ignore_eos": True},
    }
    texts = [sample.text for output in expected for sample in output.samples]
    assert len(set(texts)) == 4

    whole = api.completions.create(prompt=prompts, **asked)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(enumerate(texts))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(output.num_prompt_tokens for output in expected)
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (36, 36 + whole.usage.prompt_tokens)
    assert (whole.model, whole.object, whole.id[:5]) == (MODEL_NAME, "text_completion", "cmpl-")

    ids = [engine.tokenizer(prompt).input_ids for prompt in prompts]
    chunks = list(api.completions.create(prompt=ids, stream=True, stream_options={"include_usage": True}, **asked))
    assert _texts(chunks[:-1], 4) == texts
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {(chunk.id, chunk.created) for chunk in chunks} == {(chunks[0].id, chunks[0].created)}

    echoed = api.completions.create(prompt=prompts, echo=True, **asked)
    assert [choice.text for choice in echoed.choices] == [
        prompts[index // 2] + text for index, text in enumerate(texts)
    ]
    assert _texts(api.completions.create(prompt=prompts, echo=True, stream=True, **asked), 4) == [
        choice.text for choice in echoed.choices
    ]


def _texts(chunks: Any, count: int) -> list[str]:
    """Of each choice; each ends once, after which nothing of it comes."""
    texts, ends = [""] * count, [""] * count
    for chunk in chunks:
        (choice,) = chunk.choices
        assert not ends[choice.index]
        texts[choice.index] += choice.text
        ends[choice.index] = choice.finish_reason or ""
    assert all(ends)
    return texts


def test_chat(api: openai.OpenAI, engine: Engine) -> None:
    (expected,) = engine.generate([Chat(MESSAGES)], _params(max_tokens=200))
    messages = [{"role": "developer", "content": "be quick"}, {"role": "user", "content": PARTS}]
    asked = {"model": MODEL_NAME, "messages": messages, "max_completion_tokens": 200, **GREEDY}

    whole = api.chat.completions.create(**asked)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.finish_reason, choice.logprobs, choice.message.tool_calls) == ("length", None, None)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.num_prompt_tokens, 200)

    first, *texts, last, usage = api.chat.completions.create(
        stream=True, stream_options={"include_usage": True}, **asked
    )
    assert first.choices[0].delta.model_dump(exclude_unset=True) == {"role": "assistant", "content": ""}
    assert "".join(chunk.choices[0].delta.content for chunk in texts) == expected.text
    assert len(texts) > 1
    assert {chunk.choices[0].finish_reason for chunk in (first, *texts)} == {None}
    assert last.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert last.choices[0].finish_reason == "length"
    whole.usage.prompt_tokens_details.cached_tokens = whole.usage.prompt_tokens // 16 * 16  # full blocks, by now
    assert (usage.choices, usage.usage) == ([], whole.usage)
    assert {chunk.usage for chunk in (first, *texts, last)} == {None}


def test_usage_tells_of_the_prefix_cache(api: openai.OpenAI) -> None:
    prompt, cached = list(range(60, 100)), []
    for prompts in ([prompt], [prompt, [*prompt[:20], 7]]):  # of which the first 32 and 16 tokens are full blocks
        made = api.completions.create(model=MODEL_NAME, prompt=prompts, max_tokens=2, n=2, **GREEDY)
        assert made.usage is not None
        assert made.usage.prompt_tokens_details is not None
        cached.append(made.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 32 + 16]


def test_events_are_as_openai_sends_them(http: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "the fox", "max_tokens": 5, "ignore_eos": True, "stream": True, "user": None}
    answer = http.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert {tuple(sorted(chunk)) for chunk in chunks} == {("choices", "created", "id", "model", "object")}


def test_without_max_tokens_a_chat_goes_to_the_end_of_the_context(api: openai.OpenAI) -> None:
    whole = api.chat.completions.create(model=MODEL_NAME, messages=MESSAGES, **GREEDY)
    assert whole.usage is not None
    assert whole.usage.total_tokens == CONTEXT
    assert whole.choices[0].finish_reason == "length"


def test_stop(api: openai.OpenAI, engine: Engine) -> None:
    (expected,) = engine.generate(["the fox"], _params(max_tokens=20))
    stop = next(text for text in expected.text[3:] if text.isprintable())
    for streaming in (False, True):
        answer = api.completions.create(
            model=MODEL_NAME, prompt="the fox", max_tokens=20, stop=stop, stream=streaming, **GREEDY
        )
        choices = [chunk.choices[0] for chunk in (answer if streaming else [answer])]
        assert "".join(choice.text for choice in choices) == expected.text[: expected.text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_logprobs(api: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer("the fox").input_ids
    (expected,) = engine.generate([ids], _params(max_tokens=4, logprobs=3, prompt_logprobs=3))
    places = expected.prompt_logprobs[1:] + expected.logprobs
    for prompt in ("the fox", ids):  # what evaluation harnesses ask
        completion = api.completions.create(
            model=MODEL_NAME, prompt=prompt, max_tokens=4, logprobs=3, echo=True, **GREEDY
        )
        (choice,) = completion.choices
        assert choice.logprobs.token_logprobs == [None, *(pytest.approx(place[0].logprob) for place in places)]
        assert choice.logprobs.tokens == ["t" if prompt == "the fox" else "", *(place[0].text for place in places)]
        assert choice.logprobs.text_offset[-1] == sum(map(len, choice.logprobs.tokens[:-1]))
        assert [max(top.values()) for top in choice.logprobs.top_logprobs[1:]] == [
            pytest.approx(max(one.logprob for one in place)) for place in places
        ]

    (expected,) = engine.generate([Chat(MESSAGES)], _params(max_tokens=4, logprobs=3))
    asked = {"model": MODEL_NAME, "messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **GREEDY}
    (choice,) = api.chat.completions.create(**asked).choices
    whole = choice.logprobs.content
    assert [token.token for token in whole] == [place[0].text for place in expected.logprobs]
    assert [[top.logprob for top in token.top_logprobs] for token in whole] == [
        [pytest.approx(one.logprob) for one in place[1:]] for place in expected.logprobs
    ]
    streamed = [chunk.choices[0].logprobs for chunk in api.chat.completions.create(stream=True, **asked)]
    assert [token for logprobs in streamed if logprobs for token in logprobs.content] == whole


PICK = {
    "type": "object",
    "properties": {"pick": {"enum": ["fox", "dog"]}},
    "required": ["pick"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PICK}} for name in ("hunt", "feed")]


def test_response_format(api: openai.OpenAI) -> None:
    asked = {"model": MODEL_NAME, "messages": MESSAGES, "temperature": 0}
    schema = {"type": "json_schema", "json_schema": {"name": "pick", "schema": PICK, "strict": True}}
    (choice,) = api.chat.completions.create(response_format=schema, **asked).choices
    assert json.loads(choice.message.content)["pick"] in ("fox", "dog")
    assert choice.finish_reason == "stop"
    some = {"type": "json_object"}
    (choice,) = api.chat.completions.create(response_format=some, max_tokens=4, **asked).choices
    assert choice.message.content.lstrip()[0] == "{"
    (choice,) = api.completions.create(
        model=MODEL_NAME, prompt="the", extra_body={"structured_outputs": {"choice": ["fox", "dog"]}}
    ).choices
    assert choice.text in ("fox", "dog")
    for form in (PICK, json.dumps(PICK)):
        extra = {"extra_body": {"structured_outputs": {"json": form}}, "max_tokens": 60}
        (choice,) = api.completions.create(model=MODEL_NAME, prompt="the", temperature=0, **extra).choices
        assert json.loads(choice.text)["pick"] in ("fox", "dog")
        (choice,) = api.chat.completions.create(**asked, **extra).choices
        assert json.loads(choice.message.content)["pick"] in ("fox", "dog")


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(api: openai.OpenAI, *, stream: bool) -> None:
    named = {"type": "function", "function": {"name": "feed"}}
    tagged = r'Well\.\n<tool_call>\{"name": "hunt", "arguments": \{"pick": "(fox|dog)"\}\}</tool_call>'
    for asked, names, content, reason in (
        ({"tool_choice": named}, {"feed"}, None, "stop"),
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"hunt", "feed"}, None, "tool_calls"),
        ({"extra_body": {"structured_outputs": {"regex": tagged}}}, {"hunt"}, "Well.", "tool_calls"),
    ):
        with_tools = {"model": MODEL_NAME, "messages": MESSAGES, "tools": TOOLS, "temperature": 0} | asked
        if stream:
            with api.chat.completions.stream(**with_tools) as chunks:
                (choice,) = chunks.get_final_completion().choices
        else:
            (choice,) = api.chat.completions.create(**with_tools).choices
        (call,) = choice.message.tool_calls
        assert call.function.name in names
        assert json.loads(call.function.arguments)["pick"] in ("fox", "dog")
        assert call.id.startswith("call_")
        assert (choice.message.content or None, choice.finish_reason) == (content, reason)
        messages = [*MESSAGES, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        assert api.chat.completions.create(model=MODEL_NAME, messages=messages, max_tokens=1)


CHAT: dict[str, Any] = {"messages": MESSAGES}
TEXT: dict[str, Any] = {"prompt": "the fox"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": (CHAT | {"model": None}, "model", "model=None: Field required"),
    "range": (CHAT | {"temperature": -1}, "temperature", "=-1: Input should be greater than or equal to 0"),
    "type": (TEXT | {"max_tokens": "many"}, "max_tokens", "='many': Input should be a valid integer"),
    "misspelt": (TEXT | {"max_tokns": 3}, "max_tokns", "did you mean 'max_tokens'?"),
    "one name": (CHAT | {"max_completion_tokens": 0}, "max_completion_tokens", "=0: Input should be greater"),
    "two names": (CHAT | {"max_completion_tokens": 1, "max_tokens": 1}, "max_tokens", "not together with max_c"),
    "role": ({"messages": [{"role": "usr"}]}, "messages.0.role", "='usr': Input should be 'system', 'user'"),
    "image": (
        {"messages": [{"role": "user", "content": [*PARTS, {"type": "image_url"}]}]},
        "messages.0.content",
        "part 1 must be",
    ),
    "no messages": ({"messages": []}, "messages", "=[]: List should have at least 1 item"),
    "surrogate": ({"prompt": "\ud800"}, "prompt", "must be UTF-8"),
    "surrogate in a chat": ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "must be valid Unicode"),
    "surrogate as field": (TEXT | {"\ud800": 1}, "CompletionRequest", "Input should be a valid string"),
    "surrogate in stop": (TEXT | {"stop": "\ud800"}, "stop.0", "Input should be a valid string"),
    "empty prompt": ({"prompt": ["a", ""]}, "prompt", "=['a', '']: must not be empty"),
    "prompt": ({"prompt": [1, "a"]}, "prompt", "=[1, 'a']: must be a string, a list of strings, a list of token ids"),
    "token": ({"prompt": [1, 999]}, "prompt", "prompt[1]=999: must be a token id in 0.."),
    "engine's": (TEXT | {"n": 99}, "n", "n=99: at most max_num_seqs=16"),
    "user": (TEXT | {"user": "x" * 257}, "user", "String should have at most 256 characters"),
    "stop": (TEXT | {"stop": ["a", ""]}, "stop.1", "stop.1='': String should have at least 1 character"),
    "options": (TEXT | {"stream": False, "stream_options": {}}, "stream_options", "only allowed with stream=true"),
    "prompt_logprobs": (TEXT | {"prompt_logprobs": 1}, "prompt_logprobs", "send a completion's echo and logprobs"),
    "echo of ids": ({"prompt": [5], "echo": True}, "echo", "echo=True: of token ids only with logprobs"),
    "top_logprobs": (CHAT | {"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs=true"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        "messages.0.tool_calls.0.function.arguments",
        "='{': Invalid JSON",
    ),
    "no tools": (CHAT | {"tool_choice": "auto"}, "tool_choice", "tool_choice='auto': only allowed with tools"),
    "other tool": (
        CHAT | {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "tool_choice='g': must be one of the tools: f",
    ),
    "two forms": (
        CHAT | {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
        "tool_choice='required': not together with response_format",
    ),
    "format": (CHAT | {"response_format": {"type": "xml"}}, "response_format.type", "='xml': Input should be 'text'"),
    "no schema": (CHAT | {"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
    "schema": (
        CHAT | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 1}}}},
        "response_format",
        """='{"type": 1}': """,
    ),
    "regex": (TEXT | {"structured_outputs": {"regex": "("}}, "structured_outputs", "='(': "),
    "template": (CHAT | {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "must be a variable"),
}


@pytest.mark.parametrize(("body", "param", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input(http: httpx.Client, body: dict[str, Any], param: str, message: str, *, stream: bool) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    answer = http.post(path, content=json.dumps({"model": MODEL_NAME, "stream": stream} | body), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["type"], error["code"]) == (param, "invalid_request_error", "invalid_value")
    assert error["message"].startswith(param.split(".")[0])
    assert message in error["message"]


JSON = {"Content-Type": "application/json"}


def test_too_long(api: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"has {CONTEXT} tokens; at most {CONTEXT - 1} are") as caught:
        api.completions.create(model=MODEL_NAME, prompt="q" * CONTEXT)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("body", ["", "{", "[1]", "[" * 100_000, '"x"'])
def test_not_an_object(http: httpx.Client, body: str) -> None:
    answer = http.post("/v1/completions", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "body" in answer.json()["error"]["message"]


def test_not_found(api: openai.OpenAI, http: httpx.Client) -> None:
    assert [model.id for model in api.models.list()] == [MODEL_NAME]
    assert api.models.retrieve(MODEL_NAME).object == "model"
    for ask in (lambda: api.completions.create(model="gpt", prompt="x"), lambda: api.models.retrieve("gpt")):
        with pytest.raises(openai.NotFoundError, match=f"model='gpt': must be one of {MODEL_NAME}") as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert http.get("/v1/engines").json()["error"]["message"] == "GET /v1/engines: Not Found"
    assert http.get("/v1/completions").status_code == 405
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_api_key(client: Client) -> None:
    with (
        OpenAIServer("127.0.0.1", *free_ports(1), client.server.address("grpc"), "secret") as front,
        openai.OpenAI(base_url=f"http://{front.address}/v1", api_key="secret") as api,
    ):
        assert api.completions.create(model=MODEL_NAME, prompt="x", max_tokens=1)
        for ask in (
            lambda api: api.completions.create(model=MODEL_NAME, prompt="x"),
            lambda api: api.completions.create(model=MODEL_NAME, prompt=""),
            lambda api: api.models.list(),
        ):
            with pytest.raises(openai.AuthenticationError, match="Bearer") as caught:
                ask(api.with_options(api_key="wrong"))
            assert caught.value.code == "invalid_api_key"
        assert httpx.get(f"http://{front.address}/v1/models", trust_env=False).status_code == 401
        assert httpx.get(f"http://{front.address}/health", trust_env=False).status_code == 200


def test_engine_dies(client: Client, api: openai.OpenAI, http: httpx.Client) -> None:
    """A stream that has begun ends with the error; then the model is not there, until it is loaded again."""
    assert http.get("/health").status_code == 200
    chunks = api.completions.create(model=MODEL_NAME, prompt=["the fox"] * 64, stream=True, **LONG)
    assert next(chunks).choices
    (engine,) = (
        process
        for process in psutil.Process(client.server.process.pid).children(recursive=True)
        if "paged_backend.engine_worker" in process.cmdline()
    )
    engine.kill()
    with pytest.raises(openai.APIError, match="the engine process was killed by SIGKILL") as caught:
        list(chunks)
    assert type(caught.value) is openai.APIError  # that of an event; it has no status
    assert caught.value.code == "not_ready"

    eventually(lambda: http.get("/health").status_code == 503)
    with pytest.raises(openai.InternalServerError, match="no available versions") as caught:
        api.completions.create(model=MODEL_NAME, prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    assert list(api.models.list()) == []
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
    assert http.get("/health").status_code == 200


def test_no_server_behind() -> None:
    port, nobody = free_ports(2)
    with (
        OpenAIServer("127.0.0.1", port, f"127.0.0.1:{nobody}") as front,
        httpx.Client(base_url=f"http://{front.address}", trust_env=False) as http,
    ):
        answers = [http.get("/health"), http.get("/v1/models")]
        answers += [
            http.post("/v1/completions", json={"model": "m", "prompt": "x", "stream": stream}) for stream in (0, 1)
        ]
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [(503, "not_ready")] * 4


def test_errors_of_the_engine(tiny_llama_dir: Path) -> None:
    """They are told apart by what they say."""
    engine = Engine(EngineConfig(model=str(tiny_llama_dir), **ENGINE))
    told = {}
    for options in ({"queue_timeout": 1e-9}, {"timeout": 1e-9}):
        engine.add_request("the fox", options=RequestOptions(**options))
        (output,) = engine.step()
        told |= {options.popitem()[0]: output.error}
    engine.close()
    with pytest.raises(EngineDead) as caught:
        engine.add_request("the fox")
    told |= {"dead": caught.value, "bug": ZeroDivisionError("division by zero")}
    answers = {
        name: of_server(InferenceServerException(f"Error generating stream: {error}"), {})
        for name, error in told.items()
    }
    assert {name: answer.status for name, answer in answers.items()} == {
        "queue_timeout": 429,
        "timeout": 504,
        "dead": 503,
        "bug": 500,
    }
    assert answers["bug"].document()["error"] == {
        "message": "division by zero",
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_several_processes(client: Client) -> None:
    """For servers that are there already."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", "--factory", "triton_server_model.openai.app:from_environment"]
    environment = {**os.environ, "PAGED_BACKEND_GRPC": client.server.address("grpc")}
    process = subprocess.Popen([*command, "--port", str(port), "--workers", "2"], env=environment)
    try:
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=100) as api:
            assert api.completions.create(model=MODEL_NAME, prompt="the fox", max_tokens=1).choices
    finally:
        process.terminate()
        process.wait(20)
    assert process.returncode in (0, -signal.SIGTERM)


async def _many(front: OpenAIServer, prompts: list[str], **asked: Any) -> list[str | openai.APIStatusError]:
    """Texts, or errors, of streams that all run at once."""
    url = f"http://{front.address}/v1"

    async def one(api: openai.AsyncOpenAI, prompt: str) -> str:
        chunks = await api.completions.create(model=MODEL_NAME, prompt=prompt, stream=True, **asked)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=60) as api:
        return await asyncio.gather(*(one(api, prompt) for prompt in prompts), return_exceptions=True)


def test_64_streams(front: OpenAIServer, engine: Engine) -> None:
    prompts = [f"{number} foxes" for number in range(64)]
    expected = engine.generate(prompts, _params(max_tokens=16))
    assert asyncio.run(_many(front, prompts, max_tokens=16, **GREEDY)) == [output.text for output in expected]


def test_overload(client: Client, api: openai.OpenAI) -> None:
    """Of more prompts than may run and wait some are refused at once, and so the whole request."""
    with pytest.raises(openai.RateLimitError, match="max_waiting is 64") as caught:
        api.completions.create(model=MODEL_NAME, prompt=["the fox"] * 128, **LONG)
    assert caught.value.response.headers["retry-after"] == "1"
    assert (caught.value.code, caught.value.type) == ("overloaded", "rate_limit_error")
    for gauge in ("kv_blocks_used", "requests_running", "requests_waiting"):
        client.await_metric(gauge, 0)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_cancels(client: Client, front: OpenAIServer, *, stream: bool) -> None:
    client.settle()  # so that nothing from before is counted
    aborted = client.metric("requests_ended_total", reason="abort") or 0
    body = {
        "model": MODEL_NAME,
        "prompt": ["the fox"] * 64,
        "stream": stream,
        "max_tokens": CONTEXT,
        "ignore_eos": True,
    }
    connection = http_client.HTTPConnection(front.address)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    if stream:
        assert connection.getresponse().readline().startswith(b"data: ")
    else:
        eventually(lambda: client.metric("requests_running"))
    connection.close()
    for gauge in ("kv_blocks_used", "requests_running", "requests_waiting"):
        client.await_metric(gauge, 0)
    eventually(lambda: (client.metric("requests_ended_total", reason="abort") or 0) > aborted)


def test_serve(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """The example works; at SIGTERM a stream that runs is finished."""
    (port,) = free_ports(1)
    arguments = ["--model", str(tiny_llama_dir), "--dtype", "float32", "--device", "cpu", "--openai", str(port)]
    cli = Cli(tmp_path, *arguments, PAGED_BACKEND_API_KEY="secret")
    example = next(line for line in cli.process.stdout if "/v1/chat/completions" in line)
    environment = {**os.environ, "PAGED_BACKEND_API_KEY": "secret"}
    answer = subprocess.run(example, shell=True, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(answer.stdout)["object"] == "chat.completion"

    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret") as api:
        some = LONG | {"max_tokens": 400}  # far less than the front waits for, on any machine
        chunks = iter(api.completions.create(model=MODEL_NAME, prompt="the fox", stream=True, **some))
        first = next(chunks)
        cli.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
    assert first.choices[0].text
    assert rest[-1].choices[0].finish_reason == "length"
    assert cli.end() == (0, "stopped\n")


def test_serve_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, output = Cli(tmp_path, "--model", "any", "--openai", str(port)).end()
    assert code == 2
    assert output.startswith(f"error: openai={port}: cannot listen on 127.0.0.1: ")
    assert output.endswith("choose another with --openai\n")


def test_serve_without_fastapi(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['fastapi'] = None"
    code, output = Cli(tmp_path, "--model", "any", "--openai", "1", setup=hidden).end()
    assert (code, output) == (2, "error: --openai needs fastapi and uvicorn: pip install 'paged-backend[openai]'\n")


@pytest.mark.skipif(not models.is_pulled("smollm2-135m-instruct"), reason="the model is not in the cache")
def test_real_chat() -> None:
    http_port, grpc_port, metrics_port, port = free_ports(4)
    config = EngineConfig(model="smollm2-135m-instruct", device="cpu", max_model_len=512, num_blocks=128)
    with (
        TritonServer(config, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port) as server,
        OpenAIServer("127.0.0.1", port, server.address("grpc")) as front,
        openai.OpenAI(base_url=f"http://{front.address}/v1", api_key="any") as api,
    ):
        messages: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
        answer = api.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        messages += [answer.choices[0].message, {"role": "user", "content": "And of Italy?"}]
        chunks = api.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0, stream=True)
        assert "Rome" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

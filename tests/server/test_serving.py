"""Answers of the real server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine import Engine
from paged_backend.request import SamplingParams
from tests.server.client import CONTEXT, ENGINE, Client, Stream, eventually


def test_many_streams_and_one_bad_request(client: Client, tiny_llama_dir: Path) -> None:
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    prompts = [" ".join(rng.choices(words, k=rng.randint(1, 40))) for _ in range(64)]
    lengths = [rng.randint(1, 60) for _ in prompts]
    engine = Engine(EngineConfig(model=str(tiny_llama_dir), **ENGINE))
    params = [SamplingParams(max_tokens=length, temperature=0, ignore_eos=True) for length in lengths]
    expected = engine.generate(prompts, params)
    client.settle()
    before = client.metric("output_tokens_total")

    streams = []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        if number == 32:
            bad = client.stream(prompt, sampling={"max_tokens": 4, "top_p": 1.5})
        streaming = number % 4 > 0
        sampling = {"max_tokens": length, "temperature": 0, "ignore_eos": True}
        streams.append(client.stream(prompt, sampling=sampling, stream=streaming, exclude=True))
    texts = [stream.finish() for stream in streams]
    bad.finish()

    assert [stream.error for stream in streams] == [None] * 64
    assert texts == [output.text for output in expected]
    assert all(len(stream.chunks) == 1 for stream in streams[::4])
    assert max(len(stream.chunks) for stream in streams) > 1
    assert bad.error is not None
    assert all(part in bad.error for part in ("top_p", "1.5", "less than or equal to 1"))
    client.await_metric("output_tokens_total", before + sum(output.num_output_tokens for output in expected))
    client.await_metric("kv_blocks_used", 0)


def test_http(client: Client) -> None:
    parameters = {"max_tokens": 6, "temperature": "0", "ignore_eos": True}
    answer = client.stream("the fox", sampling=parameters).finish()
    whole = client.generate({"id": "7", "text_input": "the fox", "parameters": parameters})
    assert (whole.status_code, whole.json()["text_output"]) == (200, "the fox" + answer)
    assert whole.json()["id"] == "7"

    body = {"text_input": "the fox", "stream": True, "sampling_parameters": json.dumps(parameters)}
    streamed = client.http.post("/v2/models/paged_llm/generate_stream", json=body)
    events = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
    assert "".join(json.loads(event)["text_output"] for event in events) == answer

    bad = client.generate({"text_input": "the fox", "parameters": {"max_tokens": 0}})
    assert bad.status_code == 400
    assert "max_tokens=0: Input should be greater than or equal to 1" in bad.json()["error"]


SHORT = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
BAD = {
    "empty prompt": (
        {"text": ""},
        "text_input='': the prompt must have at least one character; or send prompt_token_ids or messages",
    ),
    "no prompt": ({"text": None}, "text_input='': the prompt must have at least one character"),
    "two prompts": (
        {"inputs": {"prompt_token_ids": [5]}},
        "prompt_token_ids=[5]: not together with text_input: a request has one prompt",
    ),
    "tools of a text": ({"inputs": {"tools": "[]"}}, "tools='[]': only allowed with messages"),
    "not UTF-8": ({"text": b"ab\xff"}, "text_input=b'ab\\xff': must be UTF-8; invalid start byte at byte 2"),
    "too long": ({"text": "q" * CONTEXT}, f"({CONTEXT + 2} characters): has {CONTEXT} tokens; at most {CONTEXT - 1}"),
    "ids too long": (
        {"text": None, "inputs": {"prompt_token_ids": [5] * CONTEXT}},
        f"has {CONTEXT} tokens; at most {CONTEXT - 1} are allowed",
    ),
    "negative id": ({"text": None, "inputs": {"prompt_token_ids": [-1]}}, "prompt_token_ids[0]=-1: must be a token id"),
    "messages not JSON": ({"text": None, "inputs": {"messages": "[{"}}, "messages='[{': must be JSON; "),
    "no messages": ({"text": None, "inputs": {"messages": "[]"}}, "messages='[]': must be a JSON list of objects"),
    "messages no objects": (
        {"text": None, "inputs": {"messages": "[1]"}},
        "messages='[1]': must be a JSON list of obj",
    ),
    "messages no list": ({"text": None, "inputs": {"messages": "{}"}}, "messages='{}': must be a JSON list"),
    "tools no objects": (
        {"text": None, "inputs": {"messages": '[{"role": "user"}]', "tools": "[1]"}},
        "tools='[1]': must be a JSON list of objects",
    ),
    "template": (
        {"text": None, "inputs": {"messages": '[{"content": "{}"}]', "chat_template_kwargs": '{"tools": []}'}},
        "chat_template_kwargs='tools': must be a variable of the template's own",
    ),
    "template refuses": (
        {"text": None, "inputs": {"messages": '[{"content": 1}]', "chat_template_kwargs": '{"messages": 1}'}},
        "messages=[{'content': 1}]: the chat template refuses them: ",
    ),
    "surrogate in a message": (
        {"text": None, "inputs": {"messages": r'[{"content": "\ud800"}]'}},
        "must be valid Unicode: surrogates not allowed at",
    ),
    "prompt when streaming": (
        {"exclude": False},
        "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed.",
    ),
    "prompt of ids in the output": (
        {"text": None, "inputs": {"prompt_token_ids": [5]}, "exclude": False, "stream": False},
        "exclude_input_in_output=False: only a text_input can be in the output",
    ),
    "not JSON": ({"sampling": '{"max_tokens": '}, "sampling_parameters='{\"max_tokens\": ': must be JSON"),
    "deep JSON": ({"sampling": '{"a":' * 100_000}, "must be JSON"),
    "JSON list": ({"sampling": "[1]"}, "sampling_parameters='[1]': must be a JSON object"),
    "sampling not UTF-8": ({"sampling": b"\xff"}, "sampling_parameters=b'\\xff': must be UTF-8"),
    "wrong type": ({"sampling": {"max_tokens": "many"}}, "max_tokens='many': Input should be a valid integer"),
    "out of range": ({"sampling": {"top_k": -2}}, "top_k=-2: Input should be greater than or equal to -1"),
    "not finite": ({"sampling": '{"temperature": NaN}'}, "temperature=nan: Input should be a finite number"),
    "half a surrogate pair": ({"sampling": r'{"seed": "\ud800"}'}, r"seed='\ud800': Input should be a valid string"),
    "empty stop string": ({"sampling": {"stop": ["a", ""]}}, "stop.1='': String should have at least 1 character"),
    "request parameter": ({"parameters": {"temperature": -1}}, "temperature=-1: Input should be greater"),
    "no boolean": (
        {"parameters": {"stream": "perhaps"}, "stream": None},
        "stream='perhaps': Input should be a valid b",
    ),
    "ids not JSON": ({"parameters": {"stop_token_ids": "1,2"}}, "stop_token_ids='1,2': must be JSON; Extra data"),
    "ids no list": ({"parameters": {"stop_token_ids": "{}"}}, "stop_token_ids='{}': must be a JSON list of token ids"),
    "bias no object": ({"parameters": {"logit_bias": "[1]"}}, "logit_bias='[1]': must be a JSON object"),
    "bias of no token": ({"sampling": {"logit_bias": {"99999": 1}}}, "logit_bias=99999: must be a token id in 0.."),
    "negative timeout": ({"sampling": {"timeout_ms": -1}}, "timeout_ms=-1: Input should be greater than or equal to 0"),
    "two names": (
        {"parameters": {"max_tokens": 3, "max_new_tokens": 3}},
        "not together with max_",  # in any order: request parameters have none
    ),
    "more outputs than slots": ({"sampling": {"n": 17}}, "n=17: at most max_num_seqs=16"),
    "beams that sample": (
        {"sampling": {"beam_width": 2, "logprobs": 1}},
        "logprobs=1: must be None with beam_width > 1, which does not sample",
    ),
    "guide of no kind": (
        {"sampling": {"guided_decoding_guide_type": "xml"}},
        "guided_decoding_guide_type='xml': Input should be '', 'none', 'json', 'json_schema', 'regex' or 'ebnf_gramma",
    ),
    "no grammar": (
        {"sampling": {"structured_outputs": {"rgx": "a"}}},
        "structured_outputs.rgx='a': unknown field of StructuredOutputs; did you mean 'regex'?",
    ),
    "no guide": (
        {"sampling": {"guided_decoding_guide_type": "regex"}},
        "guided_decoding_guide='': guided_decoding_guide_type='regex' needs one",
    ),
}


@pytest.mark.parametrize(("request_", "message"), BAD.values(), ids=BAD)
def test_bad_input_fails_alone(client: Client, request_: dict, message: str) -> None:
    assert message in client.refusal(**{"text": "the fox"} | request_)
    assert client.stream("the fox", sampling=SHORT).finish()


def test_a_stream_gets_its_text_before_the_error(client: Client) -> None:
    """Here all of it is held back, as it may be a stop string, until the time is up."""
    text = client.ask("the fox", sampling=SHORT | {"max_tokens": 400})["text_output"][0]
    for timeout in (30, 60, 100, 200, 400, 800, 1600):
        sampling = SHORT | {"max_tokens": 500, "stop": [text + "never"], "timeout_ms": timeout}
        cut = client.stream("the fox", sampling=sampling, inputs={"return_finish_reason": True})
        if received := cut.finish():
            break
    assert text.startswith(received.rstrip("\ufffd"))  # perhaps cut inside one character
    assert received
    assert {response["finish_reason"][0] for response in cut.responses} == {"None"}
    assert cut.error is not None
    assert f"timeout={timeout / 1000:g}: the request was ended after" in cut.error
    whole = client.stream("the fox", sampling=sampling, stream=False, exclude=True)
    assert (whole.finish(), whole.responses) == ("", [])


def test_overload_and_cancellation(client: Client) -> None:
    """Running, queued and unstreamed requests all end when their client cancels, and give their blocks back."""
    aborted = client.metric("requests_ended_total", reason="abort") or 0
    long = {"max_tokens": CONTEXT, "ignore_eos": True, "n": 8}
    streams: list[Stream] = []
    while sum(stream.error is not None for stream in streams) < 8:
        assert len(streams) < 500
        streams.append(client.stream("the fox", sampling=long, stream=len(streams) % 2 > 0))
    refused = [stream for stream in streams if stream.error is not None]
    assert all("max_waiting is 64" in stream.error for stream in refused)
    eventually(lambda: client.metric("requests_running") and client.metric("kv_blocks_used"))
    for stream in streams:
        stream.cancel()
    for gauge in ("kv_blocks_used", "requests_running", "requests_waiting"):
        client.await_metric(gauge, 0)
    # Some of those that ran may have come to their end while others were cancelled.
    least = aborted + ENGINE["max_waiting"] // 2
    eventually(
        lambda: (client.metric("requests_ended_total", reason="abort") or 0) >= least,
        lambda: (
            f"{len(streams)} streams, {len(refused)} refused; aborted {aborted}, then "
            + ", ".join(
                f"{r} {client.metric('requests_ended_total', reason=r)}" for r in ("abort", "length", "stop", "error")
            )
        ),
    )
    assert client.stream("the fox", sampling=SHORT).finish()

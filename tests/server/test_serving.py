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


def test_prompt_is_prepended_unless_streaming_or_excluded(client: Client) -> None:
    sampling = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}
    answer = client.stream("the fox", sampling=sampling, stream=True).finish()
    assert answer
    assert client.stream("the fox", sampling=sampling, stream=None).finish() == "the fox" + answer
    assert client.stream("the fox", sampling=sampling, stream=False, exclude=False).finish() == "the fox" + answer
    assert client.stream("the fox", sampling=sampling, stream=False, exclude=True).finish() == answer
    assert client.stream("the fox", sampling=sampling, stream=True, exclude=True).finish() == answer


def test_sampling_fields_from_all_places(client: Client) -> None:
    strings = {"max_tokens": "3", "temperature": "0", "ignore_eos": "true", "unknown": 1}
    three = client.stream("the fox", parameters=strings).finish()
    five = client.stream("the fox", parameters=strings, sampling={"max_tokens": 5}).finish()
    assert three
    assert five.startswith(three)
    assert len(five) > len(three)


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
    "empty prompt": ({"text": ""}, "text_input='': the prompt must have at least one character"),
    "not UTF-8": ({"text": b"ab\xff"}, "text_input=b'ab\\xff': must be UTF-8; invalid start byte at byte 2"),
    "too long": ({"text": "q" * CONTEXT}, f"has {CONTEXT} tokens; at most {CONTEXT - 1} are allowed"),
    "prompt when streaming": (
        {"exclude": False},
        "Error generating stream: When streaming, `exclude_input_in_output` = False is not allowed.",
    ),
    "not JSON": ({"sampling": '{"max_tokens": '}, "sampling_parameters='{\"max_tokens\": ': must be JSON"),
    "deep JSON": ({"sampling": '{"a":' * 100_000}, "must be JSON"),
    "JSON list": ({"sampling": "[1]"}, "sampling_parameters='[1]': must be a JSON object"),
    "sampling not UTF-8": ({"sampling": b"\xff"}, "sampling_parameters=b'\\xff': must be UTF-8"),
    "unknown key": ({"sampling": {"max_tokns": 3}}, "max_tokns=3: unknown field of SamplingParams"),
    "key of Python's": ({"sampling": {"self": 3}}, "self=3: unknown field of SamplingParams"),
    "half a surrogate pair": ({"sampling": r'{"\ud800": 3}'}, r"'\ud800': Input should be a valid string"),
    "wrong type": ({"sampling": {"max_tokens": "many"}}, "max_tokens='many': Input should be a valid integer"),
    "out of range": ({"sampling": {"top_k": -2}}, "top_k=-2: Input should be greater than or equal to -1"),
    "not finite": ({"sampling": '{"temperature": NaN}'}, "temperature=nan: Input should be a finite number"),
    "null": ({"sampling": {"max_tokens": None}}, "max_tokens=None: Input should be a valid integer"),
    "empty stop string": ({"sampling": {"stop": ["a", ""]}}, "stop.1='': String should have at least 1 character"),
    "request parameter": ({"parameters": {"temperature": -1}}, "temperature=-1: Input should be greater"),
}


@pytest.mark.parametrize(("request_", "message"), BAD.values(), ids=BAD)
def test_bad_input_fails_alone(client: Client, request_: dict, message: str) -> None:
    stream = client.stream(**{"text": "the fox"} | request_)
    stream.finish()
    assert stream.error is not None
    assert message in stream.error
    assert client.stream("the fox", sampling=SHORT).finish()


def test_overload_and_cancellation(client: Client) -> None:
    """Running, queued and unstreamed requests all end when their client cancels, and give their blocks back."""
    aborted = client.metric("requests_ended_total", reason="abort") or 0
    long = {"max_tokens": CONTEXT, "ignore_eos": True}
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

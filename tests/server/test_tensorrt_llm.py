"""Clients of TensorRT-LLM's Triton models, before the model that serves them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.client import CONTEXT, ENGINE, Client, Stream, eventually
from tests.server.requests import requests
from triton_server_model.launcher import MODEL_NAME, packaged_repository
from triton_server_model.launcher import TENSORRT_LLM_NAME as NAME
from triton_server_model.tensorrt_llm_protocol import INPUTS

GREEDY = {"temperature": 0, "ignore_eos": True}
"""Of paged_llm. It is what TensorRT-LLM does unless asked for something else."""
TENSORS = {each["name"]: [each["data_type"].removeprefix("TYPE_"), str(each["dims"])] for each in INPUTS}


@pytest.fixture(scope="module", autouse=True)
def _model(client: Client, repository: Path) -> Iterator[None]:
    shutil.copytree(packaged_repository() / NAME, repository / NAME)
    client.http.post(f"/v2/repository/models/{NAME}/load").raise_for_status()
    yield
    client.unload(NAME)


def ask(
    client: Client,
    text: str | bytes = "the fox",
    *,
    max_tokens: int | None = 8,
    parameters: dict[str, Any] | None = None,
    model: str = NAME,
    **inputs: Any,
) -> Stream:
    """Start a request with each input as a tensor of shape [1, n]."""
    values = {"text_input": text, "max_tokens": max_tokens, **inputs}
    tensors = [_tensor(name, value) for name, value in values.items() if value is not None]
    return Stream(client.server.address("grpc"), tensors, {"ignore_eos": True} | (parameters or {}), model=model)


DTYPES = {"BOOL": np.bool_, "BYTES": np.object_, "FP32": np.float32, "INT32": np.int32, "UINT64": np.uint64}


def _tensor(name: str, value: Any, rows: int = 1) -> Any:
    values = [one.encode() if isinstance(one, str) else one for one in (value if isinstance(value, list) else [value])]
    kind = TENSORS[name][0].replace("STRING", "BYTES")
    array = np.array([values] * rows, dtype=DTYPES[kind])
    tensor = triton.InferInput(name, array.shape, kind)
    tensor.set_data_from_numpy(array)
    return tensor


def answer(client: Client, text: str = "the fox", **inputs: Any) -> dict[str, Any]:
    """The one response to a request that does not stream."""
    stream = ask(client, text, **{"exclude_input_in_output": True} | inputs)
    stream.finish()
    assert stream.error is None, stream.error
    (response,) = stream.responses
    return response


def test_many_streams(client: Client) -> None:
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(["the", "quick", "brown", "fox"], k=rng.randint(1, 40))) for _ in range(32)]
    lengths = [rng.randint(1, 60) for _ in prompts]
    work = list(zip(prompts, lengths, strict=True))
    direct = [client.stream(text, sampling=GREEDY | {"max_tokens": length}) for text, length in work]
    expected = [stream.finish() for stream in direct]

    streams = [
        ask(client, text, max_tokens=length, stream=number % 4 > 0, exclude_input_in_output=number % 8 > 0)
        for number, (text, length) in enumerate(work)
    ]
    texts = [stream.finish() for stream in streams]
    assert [stream.error for stream in streams] == [None] * 32
    assert texts == [text if n % 8 else prompts[n] + text for n, text in enumerate(expected)]
    assert all(len(stream.responses) == 1 for stream in streams[::4])
    assert max(len(stream.responses) for stream in streams) > 1
    client.await_metric("kv_blocks_used", 0)


def test_the_tensors_that_their_own_client_sends(client: Client) -> None:
    expected = client.ask("the fox", sampling=GREEDY | {"max_tokens": 8})["text_output"][0]
    inputs = {
        **{"stream": False, "beam_width": 1, "temperature": 1.0, "num_return_sequences": 1},
        **{"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
        **{"bad_words": [""], "stop_words": [""], "end_id": 50256, "pad_id": 50256},
        **{"return_context_logits": False, "num_draft_tokens": 0, "top_k": 0, "top_p": 0.0},
        **{"exclude_input_in_output": False, "random_seed": 1, "min_length": 0},
    }
    response = answer(client, **inputs)
    assert response == {"text_output": ["the fox" + expected], "batch_index": [[0]], "sequence_index": [[0]]}
    tensors = [_tensor(name, value) for name, value in {"text_input": "the fox", "max_tokens": 8, **inputs}.items()]
    outputs = [triton.InferRequestedOutput(name) for name in ("text_output", "sequence_index")]
    address, parameters = client.server.address("grpc"), {"ignore_eos": True}
    stream = Stream(address, tensors, parameters, model=NAME, outputs=outputs, request_id="1")
    assert stream.finish() == "the fox" + expected
    assert [response.keys() for response in stream.responses] == [{"text_output", "sequence_index"}]
    assert ask(client, **inputs | {"stream": True}).finish() == expected


def test_sampling(client: Client) -> None:
    common = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    common |= {"presence_penalty": 0.3, "frequency_penalty": 0.2, "seed": 7, "min_tokens": 2}
    expected = client.ask("the fox", sampling=common | {"max_tokens": 20, "ignore_eos": True})["text_output"]
    assert answer(client, max_tokens=20, **common)["text_output"] == expected
    assert answer(client, max_tokens=20, **common | {"seed": 8})["text_output"] != expected


def test_stop_words_stay_and_bad_words_do_not_come(client: Client) -> None:
    (text,) = answer(client, max_tokens=20)["text_output"]
    word = text[3]
    assert answer(client, max_tokens=20, stop_words=["", word])["text_output"] == [text[: text.index(word) + 1]]
    assert word not in answer(client, max_tokens=20, bad_words=[word])["text_output"][0]


def test_outputs_asked_for(client: Client) -> None:
    direct = client.ask(
        "the fox",
        sampling=GREEDY | {"max_tokens": 8, "logprobs": 0},
        inputs={"return_logprobs": True, "return_cumulative_logprob": True},
    )
    expected = [one["logprob"] for token in json.loads(direct["logprobs"][0]) for one in token.values()]
    flags = {"return_log_probs": True, "return_num_input_tokens": True, "return_num_output_tokens": True}
    whole = answer(client, **flags)
    assert whole["output_log_probs"] == [[pytest.approx(expected)]]
    assert whole["cum_log_probs"] == [pytest.approx(direct["cumulative_logprob"])]
    assert (whole["num_input_tokens"], whole["num_output_tokens"]) == ([[7]], [[8]])

    stream = ask(client, stream=True, **flags)
    stream.finish()
    streamed = [one for part in stream.responses for one in part["output_log_probs"][0][0]]
    assert streamed == pytest.approx(expected)
    assert sum(part["num_output_tokens"][0][0] for part in stream.responses) == 8
    assert stream.responses[-1]["cum_log_probs"] == whole["cum_log_probs"]


@pytest.mark.parametrize("stream", [True, False])
def test_parameters_of_paged_llm_change_what_it_answers(client: Client, *, stream: bool) -> None:
    """Its log-probabilities are "null" where the sampling has none."""
    odd = ask(client, stream=stream, parameters={"return_logprobs": True, "return_finish_reason": True, "stream": 0})
    text = odd.finish()
    assert odd.error is None
    assert text == ("" if stream else "the fox") + answer(client)["text_output"][0]
    body = {"text_input": "a", "max_tokens": 4, "return_logprobs": True, "stream": stream}
    assert client.http.post(f"/v2/models/{NAME}/generate{'_stream' if stream else ''}", json=body).is_success


@pytest.mark.parametrize("stream", [True, False])
def test_sequences_have_responses_of_their_own(client: Client, stream: bool) -> None:
    sampling = {"top_p": 0.9, "seed": 7}
    direct = client.ask("the fox", sampling=sampling | {"n": 3, "max_tokens": 8, "ignore_eos": True})
    asked = ask(client, num_return_sequences=3, stream=stream, exclude_input_in_output=True, **sampling)
    asked.finish()
    texts = {0: "", 1: "", 2: ""}
    for response in asked.responses:
        (text,) = response["text_output"]
        texts[response["sequence_index"][0][0]] += text
    assert list(texts.values()) == direct["text_output"]
    assert stream or len(asked.responses) == 3


def test_beams_come_together(client: Client) -> None:
    sampling = {"beam_width": 3, "n": 3, "length_penalty": 0.0, "max_tokens": 8, "ignore_eos": True}
    direct = client.ask("the fox", sampling=sampling, inputs={"return_cumulative_logprob": True})
    response = answer(client, beam_width=3, temperature=1.0, return_log_probs=True)
    assert response["text_output"] == direct["text_output"]
    assert response["cum_log_probs"] == [pytest.approx(direct["cumulative_logprob"])]
    stream = ask(client, beam_width=3, stream=True)
    stream.finish()
    assert [part["text_output"] for part in stream.responses] == [direct["text_output"]]
    assert answer(client, beam_width=3, num_return_sequences=2)["text_output"] == direct["text_output"][:2]


BAD = {
    "no max_tokens": ({"max_tokens": None}, "max_tokens=None: required; must be at least 1"),
    "no tokens": ({"max_tokens": 0}, "max_tokens=0: required; must be at least 1"),
    "empty prompt": ({"text": ""}, "text_input='': the prompt must have at least one character"),
    "not UTF-8": ({"text": b"ab\xff"}, "text_input=b'ab\\xff': must be UTF-8; invalid start byte at byte 2"),
    "too long": ({"text": "q" * CONTEXT}, f"has {CONTEXT} tokens; at most {CONTEXT - 1} are allowed"),
    "out of range": ({"top_p": 1.1}, "top_p=1.1: Input should be less than or equal to 1"),
    "not finite": ({"temperature": float("nan"), "top_k": 2}, "temperature=nan: Input should be a finite number"),
    "two names": ({"seed": 1, "random_seed": 2}, "not together with random_seed, which means the same"),
    "logits": ({"return_context_logits": True}, "return_context_logits=True: not supported"),
    "draft": ({"num_draft_tokens": 2}, "num_draft_tokens=2: not supported"),
    "bias": ({"embedding_bias_words": ["a"]}, "embedding_bias_words=['a']: not supported"),
    "guide": ({"guided_decoding_guide_type": "x"}, "guided_decoding_guide_type='x': Input should be"),
}


@pytest.mark.parametrize(("request_", "message"), BAD.values(), ids=BAD)
def test_bad_input_fails_alone(client: Client, request_: dict, message: str) -> None:
    stream = ask(client, **request_)
    stream.finish()
    assert message in stream.error
    assert ask(client).finish()


def test_no_batches(client: Client) -> None:
    tensors = [_tensor("text_input", "the fox", rows=2), _tensor("max_tokens", 8, rows=2)]
    stream = Stream(client.server.address("grpc"), tensors, None, model=NAME)
    stream.finish()
    assert f"batch-size must be <= 1 for '{NAME}'" in stream.error


def test_http(client: Client) -> None:
    expected = client.ask("the fox", sampling=GREEDY | {"max_tokens": 8})["text_output"][0]
    body = {"text_input": "the fox", "max_tokens": 8, "bad_words": "", "stop_words": "", "ignore_eos": True}
    whole = client.http.post(f"/v2/models/{NAME}/generate", json=body | {"min_p": 0.5}).json()
    assert whole["text_output"] == "the fox" + expected
    assert (whole["batch_index"], whole["sequence_index"]) == (0, 0)
    streamed = client.http.post(f"/v2/models/{NAME}/generate_stream", json=body | {"stream": True})
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.text.splitlines() if line]
    assert "".join(event["text_output"] for event in events) == expected
    for name, value in {"top_p": 1.5, "image_url_input": "http://x"}.items():
        bad = client.http.post(f"/v2/models/{NAME}/generate", json=body | {name: value})
        assert (bad.status_code, f"{name}={value!r}: " in bad.json()["error"]) == (400, True)


def test_overload_and_cancellation(client: Client) -> None:
    """Running, queued and unstreamed requests all end when their client cancels."""
    aborted = client.metric("requests_ended_total", reason="abort") or 0
    errors: list[str] = []
    many = triton.InferenceServerClient(client.server.address("grpc"), channel_args=[("grpc.enable_http_proxy", 0)])
    many.start_stream(lambda result, error: errors.append(error.message()) if error else None)
    for number in range(ENGINE["max_num_seqs"] + ENGINE["max_waiting"] + 40):
        values = {"text_input": "the fox", "max_tokens": CONTEXT, "stream": number % 2 > 0}
        tensors = [_tensor(name, value) for name, value in values.items()]
        many.async_stream_infer(NAME, tensors, parameters={"ignore_eos": True})
    eventually(lambda: len(errors) >= 8)
    assert all("max_waiting is 64" in error for error in errors)
    many.stop_stream(cancel_requests=True)
    many.close()
    for gauge in ("kv_blocks_used", "requests_running", "requests_waiting"):
        client.await_metric(gauge, 0)
    # Some of those that ran may have come to their end while others were cancelled.
    least = aborted + ENGINE["max_waiting"] // 2
    eventually(lambda: (client.metric("requests_ended_total", reason="abort") or 0) >= least)
    assert ask(client).finish()


def test_unload_and_reload_of_the_model_that_works(client: Client) -> None:
    stream = ask(client, max_tokens=400, stream=True)
    stream.wait_for(lambda: stream.chunks)
    client.unload(MODEL_NAME)
    assert stream.finish()
    assert stream.error is None
    refused = ask(client)
    refused.finish()
    assert refused.error is not None
    assert f"model '{MODEL_NAME}', which does the work, is not loaded" in refused.error
    client.http.post(f"/v2/repository/models/{MODEL_NAME}/load").raise_for_status()
    assert ask(client).finish()


def test_a_stream_gets_its_text_before_the_error(client: Client) -> None:
    (text,) = answer(client, max_tokens=400)["text_output"]
    for timeout in (30, 60, 100, 200, 400, 800, 1600):
        parameters = {"stop": text + "never", "timeout_ms": timeout}
        cut = ask(client, max_tokens=500, stream=True, parameters=parameters)
        if received := cut.finish():
            break
    assert text.startswith(received.rstrip("\ufffd"))  # perhaps cut inside one character
    assert received
    assert cut.error is not None
    assert f"timeout={timeout / 1000:g}: the request was ended after" in cut.error


def test_any_request_is_answered(client: Client) -> None:
    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(requests(TENSORS), min_size=10, max_size=10))
    def send(batch: list[tuple[dict[str, list[Any]], dict[str, Any]]]) -> None:
        streams = [
            ask(client, inputs.pop("text_input"), parameters=parameters, **inputs) for inputs, parameters in batch
        ]
        for stream in streams:
            stream.finish()
            assert stream.error is None or stream.error.startswith("Error generating stream: ")

    send()
    assert ask(client).finish()
    for gauge in ("kv_blocks_used", "requests_running"):
        client.await_metric(gauge, 0)


FAULTY = """
from triton_server_model import tensorrt_llm
from triton_server_model.tensorrt_llm import TritonPythonModel

take, look = tensorrt_llm.Answer.take, tensorrt_llm._Line._look

def faulty_take(self, *, ended):
    if self._question.prompt == "cannot be sent":
        raise RuntimeError("unforeseen")
    return take(self, ended=ended)

def faulty_look(self):
    if any(call._answer._question.prompt == "cuts the line" for call in self.calls.values()):
        raise RuntimeError("unforeseen")
    look(self)

tensorrt_llm.Answer.take, tensorrt_llm._Line._look = faulty_take, faulty_look
"""


def test_a_fault_leaves_no_request_unanswered(client: Client, repository: Path) -> None:
    shutil.copytree(packaged_repository() / NAME, repository / "faulty")
    (repository / "faulty" / "1" / "model.py").write_text(FAULTY)
    client.http.post("/v2/repository/models/faulty/load").raise_for_status()
    long = ask(client, max_tokens=400, stream=True, model="faulty")
    long.wait_for(lambda: long.chunks)
    alone = ask(client, "cannot be sent", max_tokens=400, stream=True, model="faulty")
    alone.finish()
    assert alone.error == "Error generating stream: unforeseen"
    assert ask(client, model="faulty").finish()
    cut = ask(client, "cuts the line", max_tokens=400, model="faulty")
    cut.finish()
    assert cut.error == "the model that does the work has gone"
    long.finish()
    assert ask(client, model="faulty").finish()
    client.await_metric("requests_running", 0)
    client.unload("faulty")


def test_model_that_is_not_there(client: Client, repository: Path) -> None:
    shutil.copytree(packaged_repository() / NAME, repository / "ensemble")
    config = repository / "ensemble" / "config.pbtxt"
    config.write_text(config.read_text().replace("paged_llm", "nobody"))
    client.http.post("/v2/repository/models/ensemble/load").raise_for_status()
    answer = client.http.post("/v2/models/ensemble/generate", json={"text_input": "the fox", "max_tokens": 8})
    assert "model 'nobody', which does the work, is not loaded" in answer.json()["error"]
    client.unload("ensemble")

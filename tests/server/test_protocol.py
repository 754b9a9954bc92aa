"""Reading requests, without a server."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from paged_backend.errors import DeadlineExceeded, EngineDead, InvalidArgument, Overloaded
from paged_backend.request import RequestOptions, SamplingParams
from paged_backend.structured_outputs import StructuredOutputs
from paged_backend.text.chat import Chat
from tests.server.requests import requests
from triton_server_model.protocol import Cancelled, Generation, Refused, error_code, parse_request
from triton_server_model.protocol_table import NAMES, document
from triton_server_model.unknown import UnknownParameters

HI = {"text_input": [b"hi"]}
REFUSED = [name for name in NAMES if name.status == "refused"]


def params(inputs: dict[str, list[Any]] | None = None, **parameters: Any) -> SamplingParams:
    return parse_request(HI | (inputs or {}), parameters).params


def as_json(**sampling: Any) -> SamplingParams:
    return params({"sampling_parameters": [json.dumps(sampling).encode()]})


def test_defaults() -> None:
    whole = Generation("hi", SamplingParams(), RequestOptions(), False, "hi", (), "text_input", ())
    assert parse_request(HI, {}) == whole
    stream = Generation("hi", SamplingParams(), RequestOptions(), True, "", (), "text_input", ())
    assert parse_request(HI | {"stream": [True]}, {}) == stream


def test_tensors_go_before_json_and_json_before_parameters() -> None:
    inputs = {
        "sampling_parameters": [b'{"max_tokens": 5, "stop": ["x"], "bad_words": "w", "return_logprobs": true}'],
        "stop_words": [b"y", b""],
        "bad_words": [b""],
        "return_logprobs": [False],
    }
    parameters = {"max_tokens": 9, "temperature": "0.1", "ignore_eos": "false", "stop": "z", "top_k": "2"}
    generation = parse_request(HI | inputs, parameters)
    assert generation.params == SamplingParams(
        max_tokens=5, stop=("y",), bad_words=("w",), temperature=0.1, ignore_eos=False, top_k=2
    )
    assert generation.asked == ()


@pytest.mark.parametrize(
    ("sent", "field", "value"),
    [
        ({"temperature": "0.1"}, "temperature", 0.1),
        ({"top_k": "2"}, "top_k", 2),
        ({"top_k": 2.0}, "top_k", 2),
        ({"ignore_eos": "false"}, "ignore_eos", False),
        ({"ignore_eos": "True"}, "ignore_eos", True),
        ({"ignore_eos": 1}, "ignore_eos", True),
        ({"early_stopping": "never"}, "early_stopping", "never"),
        ({"early_stopping": "false"}, "early_stopping", False),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": '["x"]'}, "stop", ('["x"]',)),
        ({"stop": ""}, "stop", ()),
        ({"stop_words": ""}, "stop", ()),
        ({"bad_words": ""}, "bad_words", ()),
        ({"stop_token_ids": 5}, "stop_token_ids", (5,)),
        ({"stop_token_ids": "5"}, "stop_token_ids", (5,)),
        ({"stop_token_ids": "[5, 6]"}, "stop_token_ids", (5, 6)),
        ({"stop_token_ids": ""}, "stop_token_ids", ()),
        ({"allowed_token_ids": "[5]"}, "allowed_token_ids", (5,)),
        ({"logit_bias": '{"5": "-1.5"}'}, "logit_bias", {5: -1.5}),
        ({"logit_bias": ""}, "logit_bias", {}),
        ({"structured_outputs": '{"regex": "a+"}'}, "structured_outputs", StructuredOutputs(regex="a+")),
        ({"structured_outputs": ""}, "structured_outputs", None),
        (
            {"guided_decoding": '{"choice": ["a"], "json": null}'},
            "structured_outputs",
            StructuredOutputs(choice=("a",)),
        ),
        ({"logprobs": False}, "logprobs", None),
        ({"logprobs": "false"}, "logprobs", None),
        ({"logprobs": 0}, "logprobs", 0),
        ({"prompt_logprobs": False}, "prompt_logprobs", None),
        ({"min_length": "3"}, "min_tokens", 3),
        ({"random_seed": "3"}, "seed", 3),
        ({"num_return_sequences": 3}, "n", 3),
        ({"max_new_tokens": "3"}, "max_tokens", 3),
        ({"end_id": "7"}, "stop_token_ids", (7,)),
        ({"end_id": 7, "stop_token_ids": "5"}, "stop_token_ids", (5, 7)),
        ({"end_id": -1}, "stop_token_ids", ()),
        ({"end_id": 7, "ignore_eos": True}, "stop_token_ids", ()),
        ({"return_cumulative_logprob": "true"}, "logprobs", 0),
        ({"return_cumulative_logprob": "true", "logprobs": "3"}, "logprobs", 3),
        ({"return_cumulative_logprob": "true", "beam_width": "3"}, "logprobs", None),
        ({"return_logprobs": "true"}, "logprobs", None),
        ({"guided_decoding_guide_type": "none", "guided_decoding_guide": "x"}, "n", 1),
    ],
)
def test_values(sent: dict[str, Any], field: str, value: object) -> None:
    for ask in (params, as_json):
        got = getattr(ask(**sent), field)
        assert (got, type(got)) == (value, type(value))


def test_lists_and_objects_in_json() -> None:
    asked = as_json(stop=["x", "y"], stop_token_ids=[5], logit_bias={"5": 1}, allowed_token_ids=None, seed=None)
    assert asked == SamplingParams(stop=("x", "y"), stop_token_ids=(5,), logit_bias={5: 1})


def test_request_options() -> None:
    sent = {"priority": "-3", "tenant": "me", "cache_salt": "s", "timeout_ms": "1500", "queue_timeout_ms": 250}
    inputs = {"sampling_parameters": [json.dumps(sent).encode()]}
    options = RequestOptions(priority=-3, tenant="me", cache_salt="s", timeout=1.5, queue_timeout=0.25)
    assert parse_request(HI, sent).options == parse_request(HI | inputs, {}, 7).options == options
    assert parse_request(HI, {"timeout_ms": 0, "queue_timeout_ms": "0"}).options == RequestOptions()
    assert parse_request(HI, {}, 2_000_000).options == RequestOptions(timeout=2)
    assert parse_request(HI, {"timeout": "1000000"}, 2_000_000).options == RequestOptions(timeout=1)


def test_chat() -> None:
    inputs = {"messages": [b'[{"role": "user", "content": "hi"}]'], "tools": [b'[{"a": 1}]'], "text_input": [b""]}
    generation = parse_request(inputs | {"chat_template_kwargs": [b'{"b": 2}']}, {})
    assert generation.prompt == Chat([{"role": "user", "content": "hi"}], [{"a": 1}], {"b": 2})
    assert (generation.prompt_input, generation.prefix) == ("messages", "")


def test_outputs_asked_for_come_in_one_order() -> None:
    inputs = {"return_logprobs": [True], "return_finish_reason": [True], "return_num_input_tokens": [False]}
    asked = parse_request(HI | inputs, {"prompt_logprobs": 1, "return_output_token_ids": "true"}).asked
    assert asked == ("finish_reason", "logprobs", "output_token_ids", "prompt_logprobs")


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name.name)
def test_refused_names(name: Any) -> None:
    if not name.parameter:
        with pytest.raises(InvalidArgument, match=f"^{name.name}=.*: not supported by this model"):
            parse_request(HI | {name.name: [b"x"]}, {})
        assert parse_request(HI | {name.name: [b""]}, {}) == parse_request(HI, {})
        return
    for ask in (params, as_json):
        for value in ("yes", 2, -1.5):
            with pytest.raises(InvalidArgument, match=f"^{name.name}={value!r}: not supported by this model"):
                ask(**{name.name: value})
        neutral = (
            [True, "1"] if name.name in ("detokenize", "spaces_between_special_tokens") else [0, "0", False, "false"]
        )
        for value in ("", "None", *neutral):
            assert ask(**{name.name: value}) == SamplingParams()
    assert as_json(**{name.name: None}) == SamplingParams()


@pytest.mark.parametrize(
    ("sent", "guide"),
    [
        ({"guided_decoding_guide_type": "json"}, {"json_object": True}),
        ({"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{}"}, {"json": "{}"}),
        ({"guided_decoding_guide_type": "regex", "guided_decoding_guide": "a+"}, {"regex": "a+"}),
        ({"guided_decoding_guide_type": "ebnf_grammar", "guided_decoding_guide": "r"}, {"grammar": "r"}),
    ],
)
def test_guides_become_structured_outputs(sent: dict[str, str], guide: dict[str, Any]) -> None:
    for ask in (params, as_json):
        assert ask(**sent).structured_outputs == StructuredOutputs(**guide)
    with pytest.raises(InvalidArgument, match=r"guided_decoding_guide_type='.*': not together with structured_outputs"):
        params(structured_outputs='{"regex": "a"}', **sent)


VLLM: dict[str, Any] = {
    **dict.fromkeys(["json", "regex", "choice", "grammar", "json_object", "whitespace_pattern", "structural_tag"]),
    **dict.fromkeys(["disable_fallback", "disable_any_whitespace", "disable_additional_properties"], False),
}
"""`dataclasses.asdict` of what Triton's OpenAI front end makes: vLLM's parameters, and what its older ones have too."""


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("structured_outputs", {"_backend": None, "_backend_was_auto": False}),
        ("guided_decoding", {"backend": None, "backend_was_auto": False}),
    ],
)
def test_structured_outputs_with_all_of_vllms_fields(name: str, more: dict[str, Any]) -> None:
    schema = {"type": "object"}
    wanted = StructuredOutputs(json=schema)
    for ask in (params, as_json):
        assert ask(**{name: json.dumps(VLLM | more | {"json": schema})}).structured_outputs == wanted
    assert as_json(**{name: VLLM | more | {"json": schema}}).structured_outputs == wanted
    for refused, value in [("structural_tag", "{}"), ("disable_any_whitespace", True), (min(more), "xgrammar")]:
        with pytest.raises(InvalidArgument, match=f"^structured_outputs.{refused}={value!r}: not supported"):
            params(**{name: json.dumps(VLLM | more | {"json": schema, refused: value})})
    with pytest.raises(InvalidArgument, match=r"^structured_outputs=\[\]: must have exactly one of"):
        params(**{name: json.dumps(VLLM | more)})


def test_unknown_parameters_are_told_apart() -> None:
    sent = {"tempreature": 1, "id": "7", "triton_x": 1, "accumulate_tokens": True, "text_input": "no", "n": 1}
    assert parse_request(HI, sent).unknown == ("tempreature", "text_input")
    inputs = HI | {"sampling_parameters": [json.dumps(sent | {"self": 1, "queue_timeout": 3}).encode()]}
    generation = parse_request(inputs, {"x": 1, "tempreature": 2})
    assert generation.unknown == ("x", "tempreature", "text_input", "self", "queue_timeout")
    assert (generation.prompt, generation.options) == ("hi", RequestOptions())


def test_nulls_are_not_given() -> None:
    for name in NAMES:
        if name.parameter:
            assert as_json(**{name.name: None}) == SamplingParams()
    assert params({"sampling_parameters": [b'{"max_tokens": null, "max_new_tokens": 4}']}, max_tokens=5).max_tokens == 4
    assert params({"sampling_parameters": [b'{"max_tokens": null}']}, max_tokens=5).max_tokens == 5


def test_unknown_parameters_are_counted_in_bounds(caplog: pytest.LogCaptureFixture) -> None:
    registry = CollectorRegistry()
    unknown = UnknownParameters(registry)
    with caplog.at_level(logging.WARNING):
        for number in range(100):
            unknown.count([f"name{number}", "name0", "a\nb", "x" * 1000])

    def count(name: str) -> float | None:
        return registry.get_sample_value("paged_backend_unknown_parameters_total", {"name": name})

    assert count("name0") == 101
    assert (count("name63"), count("name64")) == (1, None)
    assert count("other") == 36 + 200
    assert len(caplog.records) == 64
    assert caplog.records[0].message.startswith("request parameter name0 is none of this model's")


def test_document_is_up_to_date() -> None:
    path = Path(__file__).parents[2] / "docs" / "protocol.md"
    assert path.read_text() == document(), "python -m triton_server_model.protocol_table > docs/protocol.md"


@settings(max_examples=1000)
@given(requests(), st.integers(0, 2**63))
def test_any_request_is_read_or_refused(request_: tuple[dict[str, list[Any]], dict[str, Any]], timeout: int) -> None:
    inputs, parameters = request_
    with contextlib.suppress(InvalidArgument, Refused):
        generation = parse_request(inputs, parameters, timeout)
        assert isinstance(generation.params, SamplingParams)
        assert not set(generation.unknown) & {name.name for name in NAMES if name.parameter}


@given(text=st.binary(), sampling=st.binary(), parameters=st.dictionaries(st.text(), st.booleans() | st.text()))
def test_bad_bytes_are_refused(text: bytes, sampling: bytes, parameters: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"sampling_parameters|text_input"):
        parse_request({"text_input": [text], "sampling_parameters": [b"[" + sampling]}, parameters)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("top_p", 2, "at most 1"), "INVALID_ARG"),
        (Overloaded("full"), "UNAVAILABLE"),
        (EngineDead("dead"), "UNAVAILABLE"),
        (DeadlineExceeded("timeout=1: too late"), "UNAVAILABLE"),
        (Cancelled(), "CANCELLED"),
        (Refused("when streaming"), "INVALID_ARG"),
        (ZeroDivisionError(), "INTERNAL"),
        (ValueError("operands could not be broadcast together"), "INTERNAL"),
        (FloatingPointError("not finite"), "INTERNAL"),
    ],
)
def test_error_codes(error: Exception, code: str) -> None:
    assert error_code(error) == code
